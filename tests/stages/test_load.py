"""load against the embedded server: what becomes of every request is told, and a refusal is no fast answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import junit_file
import networks
import numpy as np
import onnx
import planted
import pytest
from pipeline import Ended

from tlexport.errors import GateError, LatencyGateError, ServerError
from tlexport.progress import Silent
from tlexport.results import LoadResult
from tlexport.serving.client import Access
from tlexport.serving.place import Bound
from tlexport.stages import load as stage

Cli = Callable[..., Ended]


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return networks.table()[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, graph: onnx.ModelProto) -> Path:
    columns = {"columns": [{"name": name, "kind": "numeric"} for name in networks.COLUMNS]}
    return planted.bundle(
        tmp_path_factory.mktemp("table") / "bundle", graph, networks.table()[1], "tabular", columns
    )


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, graph: onnx.ModelProto) -> Iterator[Bound]:
    with planted.served(graph, tmp_path_factory.mktemp("live")) as bound:
        yield bound


def loaded(url: str, bundle: Path, **asked: object) -> LoadResult:
    return stage.run(url, bundle, stage.Ask(**asked), Access(timeout_s=20), Silent())


def test_every_request_is_answered_and_checked(live: Bound, bundle: Path, tmp_path: Path, tlx: Cli) -> None:
    out = tmp_path / "load.json"
    done = tlx(
        *(
            "load",
            live.http,
            bundle,
            "--rate",
            100,
            "--seconds",
            3,
            "--concurrency",
            8,
            "--out",
            out,
            "--json",
        )
    )
    assert done.code == 0, done.err
    jsonschema.validate(done.json, tlx("schema", "load").json)
    result = LoadResult.model_validate(done.json)
    assert result.counts == {"ok": 300} and result.shed == 0 and result.errors == {}
    assert result.max_abs_error is not None and result.max_abs_error < 1e-5
    assert result.served is not None and result.served.count == 300 and result.served.histogram
    raw = np.load(out.with_suffix(".npz"), allow_pickle=False)
    assert (raw["kinds"] == "ok").all() and len(raw["scheduled"]) == 300 and json.loads(out.read_text())


def test_a_limit_of_nothing_is_not_met(live: Bound, bundle: Path, tlx: Cli) -> None:
    """No answer takes 0.1 us, however many are needed to tell."""
    assert live.grpc is not None
    asked = ("--rate", 150, "--seconds", 4, "--concurrency", 4, "--arrivals", "fixed", "--max-p99", 0.0001)
    done = tlx("load", live.grpc, bundle, *asked)
    assert done.code == 13 and "limit 0.0001 ms" in done.err


def test_batches_are_sent_and_checked(live: Bound, bundle: Path, tlx: Cli) -> None:
    result = loaded(live.http, bundle, rate=50, seconds=1, batch=4, concurrency=2)
    assert result.counts == {"ok": 50} and result.batch == 4
    beyond = tlx("load", live.http, bundle, "--rate", 1, "--batch", planted.LARGEST + 1)
    assert beyond.code == 2 and "largest batch" in beyond.err


def test_the_largest_rate_within_a_limit_is_found(live: Bound, bundle: Path) -> None:
    result = loaded(live.http, bundle, max_p99_ms=5000.0, seconds=0.4, concurrency=8)
    assert result.largest is not None and result.largest.probes
    assert result.verdict == ("pass" if result.largest.rate_per_s else result.verdict)


def test_wrong_answers_fail_whatever_the_limit(bundle: Path, graph: onnx.ModelProto, tmp_path: Path) -> None:
    with planted.served(
        planted.planted(graph, planted.tables(6)["columns in reverse order"]), tmp_path
    ) as bound:
        result = loaded(bound.http, bundle, rate=50, seconds=1, max_p99_ms=1e4)
    assert result.counts == {"ok": 0, "wrong": 50} and result.goodput_per_s == 0 and result.served is None
    assert type(stage.failure(result)) is GateError and "is answered" in result.errors["wrong"]


def test_wrong_answers_fail_a_search_too(
    bundle: Path, graph: onnx.ModelProto, tmp_path: Path, tlx: Cli
) -> None:
    out = tmp_path / "load.xml"
    asked = ("--max-p99", 5000, "--seconds", 0.4, "--concurrency", 2, "--junit", out)
    wrong = planted.planted(graph, planted.tables(6)["columns in reverse order"])
    with planted.served(wrong, tmp_path) as bound:
        done = tlx("load", bound.http, bundle, *asked)
    assert done.code == 10 and "answers are not the model's" in done.err
    verdict, said = junit_file.read(out.read_text())["planted: answers"]
    assert verdict == "fail" and "is answered" in said


def test_the_verdicts_of_a_load_are_a_junit_file(live: Bound, bundle: Path, tmp_path: Path, tlx: Cli) -> None:
    out = tmp_path / "load.xml"
    asked = ("load", live.http, bundle, "--rate", 100, "--seconds", 3, "--concurrency", 4, "--junit", out)
    assert tlx(*asked).code == 0
    assert junit_file.read(out.read_text()) == {"planted: answers": ("pass", "")}
    assert tlx(*asked, "--arrivals", "fixed", "--max-p99", 0.0001).code == 13
    found = junit_file.read(out.read_text())
    assert found["planted: answers"] == ("pass", "")
    verdict, said = found["planted: p99 within 0.0001 ms"]
    assert verdict == "fail" and "limit 0.0001 ms" in said


def test_an_overload_is_offered_and_told(bundle: Path, graph: onnx.ModelProto, tmp_path: Path) -> None:
    """The server takes 20 ms a batch of at most 8 and lets 4 samples wait: 400 a second at most, and 900 are asked."""
    with planted.served(graph, tmp_path, "slow") as bound:
        result = loaded(bound.http, bundle, rate=900, seconds=1.5, concurrency=64, max_p99_ms=1e4)
    assert result.counts["overload"] > 0 and result.counts["ok"] > 0
    assert sum(result.counts.values()) == 1350, "no request is lost"
    assert result.shed is not None and 0 < result.shed < 1 and "429" in result.errors["overload"]
    assert result.verdict == "fail" and "were not answered" in result.reason
    assert type(stage.failure(result)) is LatencyGateError
    assert result.served is not None and result.served.count == result.counts["ok"]


def test_too_few_connections_are_told(bundle: Path, graph: onnx.ModelProto, tmp_path: Path) -> None:
    with planted.served(graph, tmp_path, "slow") as bound:
        result = loaded(bound.http, bundle, rate=200, seconds=1, concurrency=1)
    assert result.waited is not None and result.waited > 0.5
    assert any("raise --concurrency" in note for note in result.notes)


def test_a_server_that_goes_away_is_an_error(bundle: Path, graph: onnx.ModelProto, tmp_path: Path) -> None:
    with planted.served(graph, tmp_path) as bound:
        pass
    with pytest.raises(ServerError, match="nothing answers"):
        loaded(bound.http, bundle, rate=10, seconds=1)


def test_neither_rate_nor_limit(bundle: Path, tlx: Cli) -> None:
    done = tlx("load", "http://127.0.0.1:1", bundle)
    assert done.code == 2 and "--rate" in done.err and "--max-p99" in done.err
    assert tlx("load", "http://127.0.0.1:1", bundle, "--rate", 1, "--arrivals", "never").code == 2
