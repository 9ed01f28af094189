"""check-server against the embedded server: a right one passes bit for bit, each planted fault is told by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import junit_file
import networks
import numpy as np
import onnx
import planted
import pytest
from pipeline import Ended

from tlexport.evidence.accuracy import parity
from tlexport.progress import Silent
from tlexport.results import CheckServerResult
from tlexport.serving.client import Access
from tlexport.stages import check_server as stage

Cli = Callable[..., Ended]


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return networks.photographs()


@pytest.fixture(scope="module")
def graph(samples: np.ndarray) -> onnx.ModelProto:
    return networks.image("test_resnet", samples)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, graph: onnx.ModelProto, samples: np.ndarray) -> Path:
    return planted.bundle(tmp_path_factory.mktemp("image") / "bundle", graph, samples, "image")


def checked(url: str, bundle: Path, **asked: object) -> CheckServerResult:
    return stage.run(url, bundle, stage.Ask(**asked), Access(), Silent())


def test_the_right_model_passes_over_http_and_grpc_bit_for_bit(
    bundle: Path, graph: onnx.ModelProto, tmp_path: Path, tlx: Cli
) -> None:
    with planted.served(graph, tmp_path) as bound:
        done = tlx("check-server", bound.http, bundle, "--json", "--samples", 300)
        assert done.code == 0, done.err
        jsonschema.validate(done.json, tlx("schema", "check-server").json)
        result = CheckServerResult.model_validate(done.json)
        assert result.encoding == "binary" and result.diagnosis is None and result.metadata == ()
        assert {of.batch: (of.identical, of.answers) for of in result.bits} == dict.fromkeys(
            (1, 2, 4, 8), (16, 16)
        )
        assert result.requests > 50 and result.stream is not None and result.stream.over == 0
        assert not result.misplaced and result.golden.flips == 0
        assert bound.grpc is not None
        over_grpc = checked(bound.grpc, bundle)
        assert over_grpc.verdict == "pass" and over_grpc.encoding == "grpc"
        assert all(of.identical == of.answers for of in over_grpc.bits)
        said = tlx("check-server", bound.http, bundle)
        assert said.code == 0 and "16 of 16 at batch 8" in said.out
        absent = tlx("check-server", bound.http, bundle, "--model", "other")
        assert absent.code == 15 and "no model 'other'; this server has: planted" in absent.err.replace(
            "\n", " "
        )


@pytest.mark.parametrize("name", ["BGR for RGB", "0-1 for 0-255: the pixels", "wrong resize: nearest"])
def test_a_mistake_before_the_model_is_named(
    bundle: Path, graph: onnx.ModelProto, tmp_path: Path, tlx: Cli, name: str
) -> None:
    plant = planted.images(networks.SIZE)[name]
    with planted.served(planted.planted(graph, plant), tmp_path) as bound:
        done = tlx("check-server", bound.http, bundle)
        assert done.code == 10
        assert name in " ".join(done.err.split()), done.err


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("", []),
        ("split", [(2, 1), (4, 1), (8, 1)]),
        ("padded", [(1, 8), (2, 8), (4, 8)]),
        ("rounded", []),
    ],
)
def test_what_is_said_of_bits_is_what_was_seen(
    tmp_path: Path, fault: str, told: list[tuple[int, int]]
) -> None:
    """No server of these merges requests: one splits them, one pads them, one has other kernels."""
    graph, cells = networks.table()
    graph = planted.planted(graph, planted.batch_in_the_bits())
    columns = {"columns": [{"name": name, "kind": "numeric"} for name in networks.COLUMNS]}
    bundle = planted.bundle(tmp_path / "bundle", graph, cells, "tabular", columns)
    with planted.served(graph, tmp_path / "server", fault) as bound:
        result = checked(bound.http, bundle, samples=0)
    assert result.verdict == "pass"
    assert [(of.batch, int(other)) for of in result.bits for other in of.at_other_batch] == told
    notes = [
        f"of the answers at batch {batch} 16 have the bits of this machine's session at batch {other}, not at {batch}"
        for batch, other in told
    ]
    assert len(result.notes) == len(notes)
    assert all(note.startswith(start) for note, start in zip(result.notes, notes, strict=True)), result.notes
    same = {of.batch: of.identical for of in result.bits}
    assert same == {size: {"rounded": 0}.get(fault, 0 if size in dict(told) else 16) for size in (1, 2, 4, 8)}


def test_the_verdicts_are_a_junit_file(
    bundle: Path, graph: onnx.ModelProto, tmp_path: Path, tlx: Cli
) -> None:
    out = tmp_path / "o/server.xml"
    every = [
        "metadata",
        "golden samples",
        *(f"requests of {size} samples" for size in (2, 4, 8)),
        "shuffled stream",
    ]

    def written() -> dict[str, tuple[str, str]]:
        found = junit_file.read(out.read_text(encoding="utf-8"))
        return {name.removeprefix("planted: "): of for name, of in found.items()}

    with planted.served(graph, tmp_path / "right") as bound:
        assert tlx("check-server", bound.http, bundle, "--junit", out).code == 0
        assert written() == dict.fromkeys(every, ("pass", ""))
        nowhere = tlx("check-server", bound.http, bundle, "--samples", 0, "--junit", out / "below.xml")
        assert nowhere.code == 7, "a file stands where a folder should"
    with planted.served(graph, tmp_path / "swapped", "swapped") as bound:
        assert tlx("check-server", bound.http, bundle, "--junit", out).code == 10
    verdicts = {name: verdict for name, (verdict, _) in written().items()}
    assert verdicts == dict.fromkeys(every[:2], "pass") | dict.fromkeys(every[2:], "fail")
    assert "answers to other samples" in written()["shuffled stream"][1]
    with planted.served(networks.table()[0], tmp_path / "other") as bound:
        assert tlx("check-server", bound.http, bundle, "--junit", out).code == 14
    ((verdict, said),) = written().values()
    assert verdict == "undecided" and "the server has: features" in said
    assert tlx("check-server", "http://127.0.0.1:1", bundle, "--junit", out).code == 15
    ((verdict, said),) = written().values()
    assert verdict == "undecided" and said.startswith("ServerError: nothing answers at 127.0.0.1:1")


def test_permuted_classes_and_a_drift_of_twice_the_limit(tmp_path: Path, tlx: Cli) -> None:
    graph, cells = networks.table()
    columns = {"columns": [{"name": name, "kind": "numeric"} for name in networks.COLUMNS]}
    bundle = planted.bundle(tmp_path / "bundle", graph, cells, "tabular", columns)
    limit = parity.limit(0.0, np.load(bundle / "golden/outputs.npy"))
    with planted.served(
        planted.planted(graph, planted.answers(3)["permuted classes"]), tmp_path / "a"
    ) as bound:
        result = checked(bound.http, bundle)
        assert result.verdict == "fail" and result.diagnosis is not None
        assert "class 1 stands where class 0 should" in result.diagnosis.says
    with planted.served(planted.planted(graph, planted.drifted(2 * limit)), tmp_path / "b") as bound:
        result = checked(bound.http, bundle)
        assert result.verdict == "fail" and result.golden.over == len(cells)
        assert result.diagnosis is not None and result.diagnosis.verdict == "unknown"
        assert isinstance(stage.failure(result), Exception)
    with planted.served(planted.planted(graph, planted.drifted(0.5 * limit)), tmp_path / "c") as bound:
        assert checked(bound.http, bundle).verdict == "pass"


def test_answers_exchanged_between_samples_are_found(
    bundle: Path, graph: onnx.ModelProto, tmp_path: Path
) -> None:
    with planted.served(graph, tmp_path, "swapped") as bound:
        result = checked(bound.http, bundle)
    assert result.golden.over == 0, "alone, every sample is answered rightly"
    assert result.verdict == "fail" and result.misplaced and result.diagnosis is None
    first = result.misplaced[0]
    assert first.sent != first.answered and "got answers to other samples" in result.reason


def test_answers_that_are_not_finite_are_named(bundle: Path, graph: onnx.ModelProto, tmp_path: Path) -> None:
    with planted.served(graph, tmp_path, "not finite") as bound:
        result = checked(bound.http, bundle, samples=0)
    assert result.verdict == "fail" and "not finite" in result.reason and result.golden.not_finite
    CheckServerResult.model_validate(json.loads(result.model_dump_json()))


def test_an_older_version_is_recognised(bundle: Path, samples: np.ndarray, tmp_path: Path) -> None:
    older = networks.image("test_resnet", samples, seed=1)
    previous = planted.bundle(tmp_path / "older", older, samples, "image")
    with planted.served(older, tmp_path / "server") as bound:
        unknown = checked(bound.http, bundle, samples=0)
        assert unknown.diagnosis is not None and unknown.diagnosis.verdict == "unknown"
        told = checked(bound.http, bundle, samples=0, previous=(previous,))
        assert told.diagnosis is not None and told.diagnosis.says.startswith("an older version of the model")


def test_a_server_of_another_model_states_so(bundle: Path, tmp_path: Path, tlx: Cli) -> None:
    with planted.served(networks.table()[0], tmp_path) as bound:
        done = tlx("check-server", bound.http, bundle)
        assert done.code == 14
        assert "input 'images' is not there (the server has: features)" in " ".join(done.err.split())


def test_an_altered_bundle_is_refused_before_the_server_is_asked(
    bundle: Path, tmp_path: Path, tlx: Cli
) -> None:
    altered = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (altered / "models/cpu/receipt.json").write_text("{} ")
    done = tlx("check-server", "http://127.0.0.1:1", altered)
    assert done.code == 11


def test_nobody_answers(bundle: Path, tlx: Cli) -> None:
    done = tlx("check-server", "http://127.0.0.1:1", bundle)
    assert done.code == 15 and "nothing answers at 127.0.0.1:1" in done.err
    wrong = tlx("check-server", "ftp://127.0.0.1:1", bundle)
    assert wrong.code == 2 and "http://127.0.0.1:8000" in wrong.err
