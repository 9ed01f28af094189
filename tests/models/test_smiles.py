"""Molecules: every backend answers as torch does; what was learned on other tokens is carried over by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tlexport.backends import registry, trt
from tlexport.errors import RecipeError, WeightsError
from tlexport.graph import cast, inspect, trace
from tlexport.graph.calibration import calibrate
from tlexport.graph.quantize import quantize, tensors_to_calibrate
from tlexport.modalities.dataset import DataReport, Dataset, Split
from tlexport.modalities.molecule_preparation import SPECIAL, Preparation
from tlexport.models import checkpoint, molecule, smiles, weights
from tlexport.models.network import ServingModel
from tlexport.recipe import Pretrain, Recipe, parse
from tlexport.tensors import Profile, named

needs_rtx = pytest.mark.skipif(not trt.RTX.availability().installed, reason="tensorrt-rtx is not installed")
VOCABULARY = (*SPECIAL, "C", "c", "O", "N", "1", "(", ")")
LENGTH, BITS, DESCRIPTORS = 24, 64, 5
INPUTS = ("tokens", "fingerprint", "descriptors")
SIZES = {"tokens": 16, "layers": 2, "heads": 2, "fingerprint": 16, "members": 4, "width": 16, "depth": 2}


def prepared(vocabulary: tuple[str, ...] = VOCABULARY, **changes: Any) -> Preparation:
    fields = {
        "smiles": "smiles",
        "target": ("y",),
        "missing": ("",),
        "vocabulary": vocabulary,
        "length": LENGTH,
        "bits": BITS,
        "descriptors": tuple("abcde"),
        "rdkit": "0",
    }
    return Preparation.model_validate(fields | changes)


def samples(n: int, seed: int = 0, kinds: int = len(VOCABULARY)) -> np.ndarray:
    """Tokens, padded; counts; descriptors of very different sizes, some undefined."""
    random = np.random.default_rng(seed)
    found = np.zeros(n, prepared().dtype())
    for row, length in enumerate(random.integers(1, LENGTH + 1, n)):
        found["tokens"][row, :length] = random.integers(len(SPECIAL), kinds, length)
    found["fingerprint"] = random.poisson(0.3, (n, BITS))
    found["descriptors"] = random.normal(0, 1, (n, DESCRIPTORS)) * [1, 1e4, 1e-3, 30, 0] + [0, 1e4, 0, 0, 7]
    found["descriptors"][random.random((n, DESCRIPTORS)) < 0.1] = np.nan
    return found


def dataset(task: str = "binary") -> Dataset:
    def split(n: int, seed: int) -> Split:
        inputs = samples(n, seed)
        score = inputs["fingerprint"][:, :8].sum(axis=1) + (inputs["tokens"] == 5).sum(axis=1) - 4.0
        labels: Any = {
            "binary": (score > 0).astype(np.int64),
            "multilabel": np.stack([score > 0, score > 2], axis=1).astype(np.int8),
            "regression": score[:, None].astype(np.float32),
        }[task]
        return Split(
            inputs, labels, None, tuple(map(str, range(n))), keys=tuple(f"{seed}-{i}" for i in range(n))
        )

    report = DataReport(source="", samples={}, counts={}, split_origin={}, groups=None, sha256="")
    names = {"binary": ("no", "yes"), "multilabel": ("a", "b"), "regression": ("value",)}[task]
    return Dataset(split(300, 0), split(60, 1), split(60, 2), task, names, prepared(), report)


def recipe(**backbone: Any) -> Recipe:
    options = SIZES | backbone.pop("options", {})
    document = {
        "name": "x",
        "modality": "molecule",
        "data": {"path": "x"},
        "backbone": {"options": options, **backbone},
    }
    return parse(document, [])


def model(task: str = "binary") -> Any:
    torch.manual_seed(0)
    return molecule.create(molecule.describe(recipe(), dataset(task))).eval()


def tensors(batch: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in named(batch, INPUTS).values())


def traced(serving: ServingModel) -> Any:
    metadata = {"class_names": "[]", "preprocessing": "{}", "task": serving.model.spec.task}
    return trace.trace(
        serving,
        tensors(samples(2)),
        opset=20,
        input_names=INPUTS,
        output_name=serving.output,
        metadata=metadata,
    )


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_backends_answer_as_torch_does(task: str, tmp_path: Path) -> None:
    serving = ServingModel(model(task)).eval()
    trace.save(traced(serving), tmp_path / "fp32.onnx")
    batch = samples(50, 7)
    with torch.no_grad():
        expected = serving(*tensors(batch)).numpy()
    assert np.isfinite(expected).all() and np.ptp(expected, axis=0).min() > 1e-3
    dtypes = inspect.compute_dtypes(trace.load(tmp_path / "fp32.onnx"))
    for name in ("onnxruntime", "openvino"):
        backend = registry.BACKENDS[name]
        if not backend.availability().installed:
            continue
        out = tmp_path / f"model{backend.SUFFIX}"
        made = registry.build(name, tmp_path / "fp32.onnx", out, "cpu", Profile(max=64), dtypes, 120)
        with backend.runner(made.path, threads=1) as runner:
            for rows in (slice(0, 1), slice(0, 50)):
                got = runner.run(named(batch[rows], INPUTS))[serving.output]
                np.testing.assert_allclose(got, expected[rows], rtol=1e-4, atol=1e-5)


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_rtx_builds_what_the_types_say(precision: str, tmp_path: Path) -> None:
    graph = traced(ServingModel(model()).eval())
    if precision == "fp16":
        graph = cast.to_half(graph, "fp16")
    if precision == "int8":
        feed = [named(samples(64, 3), INPUTS)]
        ranges = calibrate(graph, feed, tensors_to_calibrate(graph, "trt"), method="max")
        graph = quantize(graph, ranges, "trt")
    trace.save(graph, tmp_path / "m.onnx")
    dtypes = inspect.compute_dtypes(graph)
    made = registry.build(
        "tensorrt_rtx", tmp_path / "m.onnx", tmp_path / "e", "sm89", Profile(max=8), dtypes, 120
    )
    assert made.receipt.disagreements == () and made.receipt.built() == dtypes and len(dtypes) >= 10


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_numbers_answer_nearly_alike(precision: str) -> None:
    serving = ServingModel(model()).eval()
    graph, batch = traced(serving), samples(64, 9)
    if precision == "fp16":
        smaller = cast.to_half(graph, "fp16")
    else:
        feed = [named(samples(128, 3), INPUTS)]
        ranges = calibrate(graph, feed, tensors_to_calibrate(graph, "cpu"), method="max")
        smaller = quantize(graph, ranges, "cpu", reduce_range=True)
    session = ort.InferenceSession(smaller.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, named(batch, INPUTS))
    with torch.no_grad():
        np.testing.assert_allclose(got, serving(*tensors(batch)).numpy(), atol=0.02)


def test_padding_changes_no_answer_and_training_leaves_it_out() -> None:
    encoder = model().backbone.encoder
    tokens = torch.from_numpy(samples(8)["tokens"])
    longer = torch.cat([tokens, torch.zeros(8, 6, dtype=torch.int32)], dim=1)
    assert smiles.shortened(longer, 0).shape[1] <= LENGTH
    with torch.no_grad():
        whole = encoder(tokens)
        cut = smiles.shortened(tokens[:3], 0)
        torch.testing.assert_close(encoder(cut), whole[:3])
        assert torch.isfinite(encoder(torch.zeros(1, LENGTH, dtype=torch.int32))).all(), (
            "a molecule of no token"
        )


def test_descriptors_are_scaled_by_train_alone_and_undefined_ones_are_its_mean() -> None:
    branch, data = model().backbone.branch, dataset()
    own = torch.from_numpy(data.train.inputs["descriptors"])
    scaled = branch.scaled(own)
    assert torch.isfinite(scaled).all() and scaled.abs().max() <= 4
    known = ~torch.isnan(own)
    assert abs(float(scaled[:, 0][known[:, 0]].mean())) < 0.02
    assert (scaled[~known] == 0).all()
    assert (branch.scaled(own * 0 + 1e30)[:, 4] == 0).all(), "what never changed in train says nothing"


def test_a_checkpoint_is_rebuilt_with_its_scaling(tmp_path: Path) -> None:
    made = model("regression")
    checkpoint.save_checkpoint(tmp_path, made, made.spec, {})
    loaded, spec, _ = checkpoint.load_checkpoint(tmp_path)
    assert spec == made.spec
    with torch.no_grad():
        torch.testing.assert_close(loaded(*tensors(samples(5))), made(*tensors(samples(5))))


def test_pretext_learns_and_its_masks_follow_the_seed() -> None:
    made, data = model(), dataset()
    task = molecule.pretext(made, Pretrain(mask=0.3), data)
    # A pattern to find out: tokens alternate.
    rows = torch.zeros(64, LENGTH, dtype=torch.int32)
    rows[:, :20] = torch.tensor([3, 4] * 10) + (torch.arange(64)[:, None] % 2) * 2

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = task(rows)
        return found

    with torch.no_grad():
        before = [float(loss(seed)) for seed in range(4)]
        assert before[0] == float(loss(0)) and before[0] != before[1]
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    with torch.no_grad():
        assert max(float(loss(seed)) for seed in range(4)) < 0.7 * min(before)
    with pytest.raises(RecipeError, match="there is: masked"):
        molecule.pretext(made, Pretrain(objective="forecast"), data)


def test_weights_of_another_vocabulary_are_carried_over_by_token() -> None:
    theirs = (*SPECIAL, "O", "c", "Cl", "C")
    data = dataset()
    source = molecule.create(
        molecule.describe(recipe(), data).model_copy(update={"vocabulary": theirs, "descriptors": ()})
    )
    assert isinstance(source, molecule.Reader) and source.INPUTS == ("tokens",)
    state = source.backbone.state_dict()
    spec = molecule.describe(recipe(), data)
    found, notes = molecule.align(state, source.spec, spec)
    learned, own = state["encoder.embedding.weight"], found["encoder.embedding.weight"]
    assert own.shape[0] == len(VOCABULARY)
    for token in ("C", "c", "O"):
        assert torch.equal(own[VOCABULARY.index(token)], learned[theirs.index(token)])
    assert torch.equal(own[VOCABULARY.index("N")], learned[smiles.UNKNOWN])
    assert notes == ["vocabulary: 6 of 10 tokens by name, 4 start as the unknown token (N, 1, (, ))"]


def test_a_pretrained_transformer_is_loaded_whole_and_the_rest_is_new(tmp_path: Path) -> None:
    data = dataset()
    torch.manual_seed(1)
    source = molecule.create(
        molecule.describe(recipe(), data).model_copy(update={"descriptors": (), "bits": 0})
    )
    checkpoint.save_checkpoint(tmp_path, source, source.spec, {})
    made = model()
    before = {name: tensor.clone() for name, tensor in made.backbone.state_dict().items()}
    report = weights.load(made, str(tmp_path))
    assert report.exact and report.matched == report.total == len(source.backbone.state_dict())
    for name, tensor in made.backbone.state_dict().items():
        expected = source.backbone.state_dict()[name] if name.startswith("encoder.") else before[name]
        assert torch.equal(tensor, expected), name


def test_a_transformer_of_other_sizes_is_refused(tmp_path: Path) -> None:
    spec = molecule.describe(recipe(options={"tokens": 32}), dataset()).model_copy(update={"descriptors": ()})
    source = molecule.create(spec)
    checkpoint.save_checkpoint(tmp_path, source, spec, {})
    with pytest.raises(WeightsError, match="of another shape"):
        weights.load(model(), str(tmp_path))


def test_mistakes_name_what_there_is() -> None:
    data = dataset()
    with pytest.raises(RecipeError, match="did you mean 'width'"):
        molecule.describe(recipe(options={"widht": 3}), data)
    with pytest.raises(RecipeError, match=r"must be even and a multiple of heads \(3\)"):
        molecule.describe(recipe(options={"heads": 3}), data)
    with pytest.raises(RecipeError, match="there are: molecule/smiles, huggingface/"):
        molecule.describe(recipe(name="molecule/graph"), data)
    with pytest.raises(RecipeError, match="nobody publishes weights"):
        molecule.published(molecule.describe(recipe(), data))


def test_every_parameter_is_in_one_stage() -> None:
    made = model()
    stages = made.stages()
    assert [name for name, _ in stages] == ["embedding", "layer1", "layer2", "norm", "branch", "ensemble"]
    staged = [name for _, names in stages for name in names]
    assert sorted(staged) == sorted(name for name, _ in made.backbone.named_parameters())
