"""OpenTelemetry spans, where the process has configured a tracer provider before the server starts; else nothing is paid."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Ended = Callable[[int], None]  # is told the status
_SERVER_ERROR = 500


def _nothing(status: int) -> None:
    """The end of no span."""


class Tracer:
    """Starts a span for each inference, the child of what the W3C header `traceparent` names."""

    def __init__(self) -> None:
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
        self._tracer = (
            None
            if isinstance(provider, trace.ProxyTracerProvider)
            else provider.get_tracer("tlexport.serving")
        )

    def start(self, headers: Mapping[str, str]) -> Ended:
        """`headers` in lower case. Returns what ends the span."""
        tracer = self._tracer
        if tracer is None:
            return _nothing
        from opentelemetry import propagate, trace

        carried = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = tracer.start_span("infer", propagate.extract(carried), trace.SpanKind.SERVER)

        def ended(status: int) -> None:
            span.set_attribute("http.response.status_code", status)
            if status >= _SERVER_ERROR:
                span.set_status(trace.StatusCode.ERROR)
            span.end()

        return ended
