"""Each known mistake, planted as nodes of an ONNX graph, is named; right servers and unknown corruptions are not accused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networks
import numpy as np
import onnx
import onnxruntime as ort
import planted
import pytest

from tlexport.evidence.accuracy import parity
from tlexport.evidence.live import mistakes
from tlexport.evidence.live.diagnosis import Hypothesis, diagnose
from tlexport.evidence.live.mistakes import answers
from tlexport.graph import inspect, retype
from tlexport.results import Diagnosis
from tlexport.tensors import named

IMAGES = (
    "test_efficientnet",
    "test_resnet",
    "test_vit",
)  # timm's networks for tests: convolutions, residuals, attention


@dataclass(frozen=True)
class Subject:
    """A model, its samples and what every known mistake makes of them."""

    graph: onnx.ModelProto
    samples: np.ndarray
    own: np.ndarray
    hypotheses: tuple[Hypothesis, ...]
    task: str

    @property
    def limit(self) -> float:
        return parity.limit(None, self.own)

    def look(self, given: np.ndarray) -> Diagnosis:
        behind = answers.explanations(given.astype(np.float64), self.own.astype(np.float64), self.task)
        return diagnose(given, self.own, (*behind, *self.hypotheses), self.limit)

    def ask(self, samples: np.ndarray) -> np.ndarray:
        return planted.outputs(self.graph, samples)


def subject(
    graph: onnx.ModelProto,
    samples: np.ndarray,
    modality: str,
    *,
    task: str = "multiclass",
    **preprocessing: object,
) -> Subject:
    floats = retype.taking_floats(graph)
    sessions = {
        kind: ort.InferenceSession(of.SerializeToString(), providers=["CPUExecutionProvider"])
        for kind, of in (("own", graph), ("float", floats))
        if of is not None
    }
    names = [of.name for of in sessions["own"].get_inputs()]

    def ask(of: np.ndarray) -> np.ndarray:
        real = "float" in sessions and of.dtype == np.float32
        return sessions["float" if real else "own"].run(None, named(of, names))[0]

    known = mistakes.known(modality, inspect.io(graph)[0], preprocessing)
    made = tuple(Hypothesis(of.says, of.advice, ask(of.change(samples)), of.least) for of in known)
    return Subject(graph, samples, ask(samples), made, task)


@pytest.fixture(scope="module", params=IMAGES)
def image(request: pytest.FixtureRequest) -> Subject:
    samples = networks.photographs()
    return subject(networks.image(request.param, samples), samples, "image")


@pytest.fixture(scope="module")
def table() -> Subject:
    columns = [{"name": name, "kind": "numeric"} for name in networks.COLUMNS]
    return subject(*networks.table(), "tabular", columns=columns)


@pytest.fixture(scope="module")
def series() -> Subject:
    return subject(*networks.series(), "series", task="regression", channels=networks.CHANNELS)


@pytest.fixture(scope="module")
def molecule() -> Subject:
    return subject(*networks.molecule(), "molecule")


def found(of: Subject, plant: planted.Plant) -> Diagnosis:
    return of.look(planted.outputs(planted.planted(of.graph, plant), of.samples))


@pytest.mark.parametrize("name", [*planted.images(networks.SIZE), *planted.answers(5)])
def test_a_mistake_with_pictures_is_named(image: Subject, name: str) -> None:
    plant = {**planted.images(networks.SIZE), **planted.answers(5)}[name]
    said = found(image, plant)
    assert said.verdict in ("named", "suspected"), said
    assert said.says.removeprefix("probably ").startswith(name), said
    assert (
        said.verdict == "named" or "wrong resize" in name
    )  # a round trip of resized pixels is an approximation


@pytest.mark.parametrize("name", [*planted.tables(6), *planted.answers(3)])
def test_a_mistake_with_tables_is_named(table: Subject, name: str) -> None:
    said = found(table, {**planted.tables(6), **planted.answers(3)}[name])
    assert said.verdict == "named" and said.says.startswith(name), said


@pytest.mark.parametrize("name", planted.windows(networks.DAYS))
def test_a_mistake_with_prices_is_named(series: Subject, name: str) -> None:
    said = found(series, planted.windows(networks.DAYS)[name])
    assert said.verdict == "named" and said.says.startswith(name), said


def test_a_value_in_another_unit_is_named(series: Subject) -> None:
    said = series.look(2.5 * series.own - 1)
    assert said.verdict == "named" and "times 2.5 plus -1" in said.says


def test_each_mistake_with_molecules_is_told_from_the_others(molecule: Subject) -> None:
    """The server's side is written out here, not taken from the list of mistakes."""

    def changed(field: str, to: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        samples = molecule.samples.copy()
        samples[field] = to(samples[field])
        return molecule.ask(samples)

    said = {
        "a fingerprint of bits": changed("fingerprint", lambda x: (x > 0).astype(np.uint8)),
        "missing descriptors as zeros": changed("descriptors", lambda x: np.where(np.isnan(x), 0, x)),
        "no descriptors": changed("descriptors", lambda x: 0 * np.nan_to_num(x)),
        "token numbers one too high": changed("tokens", lambda x: np.where(x > 0, x + 1, 0)),
    }
    for name, given in said.items():
        assert molecule.look(given).says.startswith(name)


def test_a_planted_mistake_is_not_seen_where_it_changes_nothing(table: Subject) -> None:
    """Without a missing value in the samples nobody can say how the server fills them in: no hypothesis, no accusation."""
    there = np.nan_to_num(table.samples, nan=1.0)
    own = table.ask(there)
    same = Hypothesis("missing values as zeros", "", table.ask(np.nan_to_num(there)))
    assert diagnose(own + 0.01, own, [same], parity.limit(None, own)).verdict == "unknown"


@pytest.mark.parametrize("seed", range(5))
def test_an_unknown_corruption_is_called_unknown(image: Subject, table: Subject, seed: int) -> None:
    """Noise, lighting, answers drawn at random, another sample's answers: none is on the list."""
    rng = np.random.default_rng(seed)
    pixels = image.samples.astype(np.float64)
    classes, rows = image.own.shape[1], np.roll(np.arange(len(image.own)), 1 + seed)
    corrupt = {
        "noise": image.ask(np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255).astype(np.uint8)),
        "brighter": image.ask(np.clip(pixels + 50 + 10 * seed, 0, 255).astype(np.uint8)),
        "random": rng.dirichlet(np.ones(classes), len(pixels)).astype(np.float32),
        "constant": np.repeat(image.own[seed : seed + 1], len(pixels), axis=0),
        "drift": image.own + rng.normal(0, 0.05, image.own.shape).astype(np.float32),
        "shuffled": image.own[rows],
    }
    for name, given in corrupt.items():
        said = image.look(given)
        assert said.verdict == "unknown" and "none of the known mistakes fits" in said.says, (name, said)
    scaled = table.ask((table.samples * rng.uniform(0.5, 1.5, table.samples.shape)).astype(np.float32))
    assert table.look(scaled).verdict == "unknown"


def test_random_answers_are_seldom_suspected() -> None:
    """500 servers whose answers say nothing of their samples, beside 20 mistakes of which none is theirs, near to constant as
    saturated networks are: at most 1% may be suspected (diagnosis.CHANCE), and 500 draws of 1% exceed 14 in 1 of 1000 cases.
    """
    rng = np.random.default_rng(0)
    suspected = 0
    for _ in range(500):
        own = rng.dirichlet(np.full(2, 0.3), 12)
        lists = [Hypothesis(str(k), "", rng.dirichlet((20, 20), 12), 0.6) for k in range(20)]
        suspected += diagnose(rng.dirichlet((5, 5), 12), own, lists, 1e-4).verdict != "unknown"
    assert suspected <= 14


def test_what_an_unknown_difference_looks_like_is_told(image: Subject) -> None:
    constant = image.look(np.full_like(image.own, 0.2) + np.float32(1e-6))
    assert "every answer is the same" in constant.says
    near = image.look(image.own + np.float32(0.002))
    assert "another precision" in near.says
    broken = image.own.copy()
    broken[3, 1] = np.nan
    assert "not finite" in image.look(broken).says


def test_mistakes_that_fit_equally_well_are_told_together() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.random((8, 3)), rng.random((8, 3))
    said = diagnose(other, own, [Hypothesis("one", "do this", other), Hypothesis("two", "", other)], 1e-4)
    assert said.verdict == "named" and said.says == "one (1 others fit, too)" and said.advice == "do this"
    assert [of.says for of in said.suspects] == ["one", "two"]
