"""Spans where a tracer provider is configured, and nothing where none is."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("opentelemetry")

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

WITH_PROVIDER = f"""
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
from tlexport.serving.tracing import Tracer
tracer = Tracer()
tracer.start({{"traceparent": "{TRACEPARENT}", "authorization": "Bearer secret"}})(200)
tracer.start({{}})(500)
for span in exporter.get_finished_spans():
    parent = span.parent and format(span.parent.span_id, "016x")
    print(span.name, span.kind.name, parent, span.status.status_code.name, dict(span.attributes))
"""

WITHOUT_PROVIDER = """
from tlexport.serving import tracing
print(tracing.Tracer().start({}) is tracing._nothing)
"""


def said(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_span_is_the_child_of_who_asked() -> None:
    pytest.importorskip("opentelemetry.sdk")
    child, failed = said(WITH_PROVIDER)
    assert child == "infer SERVER b7ad6b7169203331 UNSET {'http.response.status_code': 200}"
    assert failed == "infer SERVER None ERROR {'http.response.status_code': 500}"


def test_without_a_provider_nothing_is_made() -> None:
    assert said(WITHOUT_PROVIDER) == ["True"]
