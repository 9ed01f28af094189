"""AOTInductor: one real compilation of a network with every kind of product, its receipt, its numbers, its refusals."""

from __future__ import annotations

import json
import os
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from tlexport.backends import Artifact, Network, Options, eager, inductor, inductor_code, registry
from tlexport.errors import BackendCrash, CompileError, NoCompilerError, NotInstalledError, RecipeError
from tlexport.graph import inspect, trace
from tlexport.recipe import BackendName, parse
from tlexport.tensors import Profile

METADATA = {"class_names": json.dumps([]), "preprocessing": json.dumps({}), "task": "multiclass"}
PROFILE = Profile(min=1, opt=1, max=4)
INPUTS = ("images", "numbers")
needs_compiler = pytest.mark.skipif(not inductor.availability().builds, reason="no C++ compiler")


class Products(nn.Module):
    """uint8 images [n x 3 x 9 x 7] and numbers [n x 2] -> probabilities [n x 5].

    A folded BatchNorm, a grouped convolution without a bias that is used twice, a transposed one, attention, einsum.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 8, 2, 2)
        self.qkv = nn.Linear(8, 24)
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.head = nn.Linear(26, 5)
        nn.init.uniform_(self.stem[1].running_mean, -1, 1)
        nn.init.uniform_(self.stem[1].running_var, 0.5, 2)

    def forward(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        x = self.stem(images.float() / 127.5 - 1)
        x = self.up(self.shared(torch.relu(self.shared(x)) + x))
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).unsqueeze(1).chunk(3, -1)
        x = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        scores = torch.einsum("btd,qd->bqt", x, self.queries).softmax(-1)
        x = (scores @ x).flatten(1)
        return (self.head(torch.cat([x, numbers], 1)) * 4).softmax(-1)


class Narrow(nn.Module):
    """One product in BF16, between two in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(numbers))
        x = torch.relu(x.bfloat16() @ self.second.weight.bfloat16()).float()
        return self.third(x).softmax(-1)


def samples(count: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, 3, 9, 7), dtype=np.uint8)
    return {"images": images, "numbers": generator.normal(size=(count, 2)).astype(np.float32)}


def network(module: type[nn.Module], names: tuple[str, ...]) -> Network:
    example = samples(2)
    return Network(
        module().eval(), names, "probabilities", tuple(torch.from_numpy(example[n]) for n in names)
    )


def hanging() -> Network:
    time.sleep(600)
    raise AssertionError("nobody waits so long")


def graph_of(made: Network, path: Path) -> Path:
    ends = {"input_names": made.inputs, "output_name": made.output}
    trace.save(trace.trace(made.module, made.example, opset=20, metadata=METADATA, **ends), path)
    return path


@dataclass(frozen=True)
class Compiled:
    made: Network
    graph: Path
    artifact: Artifact

    def reference(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return self.made.module(*(torch.from_numpy(inputs[name]) for name in INPUTS)).numpy()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if not inductor.availability().builds:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("inductor")
    made = network(Products, INPUTS)
    graph = graph_of(made, folder / "g.onnx")
    expected = inspect.compute_dtypes(trace.load(graph))
    artifact = registry.build(
        *("inductor", graph, folder / "model.pt2", "cpu", PROFILE, expected),
        options=Options(network=partial(network, Products, INPUTS)),
    )
    return Compiled(made, graph, artifact)


@pytest.mark.slow
def test_every_product_is_read_back_as_fp32(compiled) -> None:
    found = compiled.artifact.receipt
    assert found.disagreements == () and len(found.expected) == 10
    assert found.built() == dict.fromkeys(found.expected, "fp32")
    assert "AOTInductor" in found.source
    kinds = [inductor_code.kind(layer.kind) for layer in found.layers]
    assert kinds.count("convolution") == 4 and "product" in kinds


@pytest.mark.slow
def test_agrees_with_eager_at_every_batch(compiled) -> None:
    with inductor.runner(compiled.artifact.path, threads=1) as runner:
        for count in (1, 2, 3, 4, 17):  # 17: larger than what it was asked for, the batch is free
            inputs = samples(count)
            expected = compiled.reference(inputs)
            assert expected.std() > 0.02  # else agreement would mean nothing
            np.testing.assert_allclose(runner.run(inputs)["probabilities"], expected, atol=1e-5)
        assert "AOTInductor" in runner.provider and "cpu" in runner.provider
        with pytest.raises(CompileError, match="needs numbers; given: images"):
            runner.run({"images": samples(1)["images"]})


@pytest.mark.slow
def test_a_bound_call_computes_anew_and_claims_its_threads(compiled) -> None:
    inputs, before = samples(3), torch.get_num_threads()
    ends = {"inputs": INPUTS, "output": "probabilities"}
    with (
        eager.runner_for(compiled.made.module, threads=2, **ends) as reference,
        inductor.runner(compiled.artifact.path, threads=1) as runner,
    ):
        bound, beside = runner.bind(inputs), reference.bind(inputs)
        beside.call()
        assert torch.get_num_threads() == 2
        bound.call()
        assert torch.get_num_threads() == 1
        first = bound.outputs()["probabilities"]
        np.testing.assert_allclose(first, beside.outputs()["probabilities"], atol=1e-5)
        runner.run({name: 2 * array for name, array in samples(5).items()})
        np.testing.assert_array_equal(bound.outputs()["probabilities"], first)
        inputs["numbers"][:] += 3  # the tensors share this memory
        bound.call()
        assert np.abs(bound.outputs()["probabilities"] - first).max() > 1e-3
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_the_artifact_holds_no_sources(compiled) -> None:
    names = zipfile.ZipFile(compiled.artifact.path).namelist()
    assert any(name.endswith(".so") for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".o", "flags.json", ".pkl"))]
    assert sorted(path.name for path in compiled.artifact.path.parent.iterdir()) == ["g.onnx", "model.pt2"]


def retold(source: Path, path: Path, **changes: str) -> Path:
    """A copy of the artifact that says something else of itself."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("metadata.json"):
                content = json.dumps(json.loads(content) | changes).encode()
            changed.writestr(name, content)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"torch": "1.0.0"}, "compiled with torch 1.0.0"),
        ({"instructions": "avx_of_the_future"}, "avx_of_the_future, which this one lacks"),
    ],
)
def test_an_artifact_for_another_torch_or_cpu_is_not_loaded(changes, told, compiled, tmp_path) -> None:
    path = retold(compiled.artifact.path, tmp_path / "model.pt2", **changes)
    with pytest.raises(CompileError, match=told), inductor.runner(path, threads=1):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"no archive", 1000])
def test_a_damaged_artifact_is_an_error(content, compiled, tmp_path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(compiled.artifact.path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(CompileError, match=r"model\.pt2 is not what"), inductor.runner(path, threads=1):
        pass


@pytest.mark.slow
def test_predict_runs_it_in_a_child(compiled, tmp_path) -> None:
    inputs = samples(5)
    rows = np.empty(5, [(name, array.dtype, array.shape[1:]) for name, array in inputs.items()])
    for name, array in inputs.items():
        rows[name] = array
    np.save(tmp_path / "x.npy", rows)
    where = registry.predict(
        *("inductor", compiled.artifact.path, tmp_path / "x.npy", tmp_path / "y.npy"),
        input_names=INPUTS,
        batch_size=2,
        threads=1,
    )
    assert "AOTInductor" in where
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), compiled.reference(inputs), atol=1e-5)


@pytest.mark.slow
def test_a_changed_artifact_is_not_loaded_by_the_stages(compiled, run_copy) -> None:
    from tlexport.models.checkpoint import describe_checkpoint
    from tlexport.results import Variant
    from tlexport.stages.verify import Judge

    (run_copy / "variants/x").mkdir()
    changed = run_copy / "variants/x/model.pt2"
    changed.write_bytes(compiled.artifact.path.read_bytes() + b"\0")
    variant = Variant(
        name="x",
        backend="inductor",
        target="cpu",
        precision="fp32",
        file="variants/x/model.pt2",
        sha256="0" * 64,
        verdict="unjudged",
    )
    described = describe_checkpoint(run_copy / "checkpoint")
    judged = Judge(run_copy, run_copy.recipe, described, 1).tried(variant).variant
    assert judged.verdict == "fail" and "changed after it was compiled" in judged.reason


@needs_compiler
@pytest.mark.slow
def test_a_product_in_bf16_is_not_claimed_as_fp32(tmp_path) -> None:
    made = network(Narrow, ("numbers",))
    graph = graph_of(made, tmp_path / "g.onnx")
    nodes = [node.name for node in trace.load(graph).graph.node if node.op_type in ("Gemm", "MatMul")]
    assert len(nodes) == 3
    out = tmp_path / "model.pt2"
    built = inductor.build(
        graph, out, "cpu", PROFILE, dict.fromkeys(nodes, "fp32"), Options(network=lambda: made)
    ).receipt
    wrong = [line for line in built.disagreements if "asked fp32" in line]
    assert wrong == [line for line in built.disagreements if line.startswith(nodes[1])] and len(wrong) == 1


@needs_compiler
def test_a_compilation_that_takes_too_long_is_stopped(tmp_path) -> None:
    graph = graph_of(network(Narrow, ("numbers",)), tmp_path / "g.onnx")
    with pytest.raises(BackendCrash, match=r"inductor: compiling g\.onnx for cpu gave no answer within 3 s"):
        registry.build(
            *("inductor", graph, tmp_path / "model.pt2", "cpu", PROFILE, {}, 3.0),
            options=Options(network=hanging),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_without_a_compiler(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(network(Narrow, ("numbers",)), tmp_path / "g.onnx")
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = inductor.availability()
    assert (
        found.installed and found.builds == () and found.runs == ("cpu",)
    )  # what was compiled elsewhere runs
    assert "g++" in found.note
    load = partial(network, Narrow, ("numbers",))
    for fails in (
        lambda: registry.chosen(["auto", "inductor"]),
        lambda: registry.build(
            "inductor", graph, tmp_path / "m.pt2", "cpu", PROFILE, {}, options=Options(network=load)
        ),
    ):
        with pytest.raises(NoCompilerError, match=r"needs a C\+\+ compiler .*apt install g\+\+") as refused:
            fails()
        assert isinstance(refused.value, NotInstalledError) and refused.value.exit_code == 5


def test_what_it_does_not_do_is_refused(tmp_path) -> None:
    assert inductor.refusal("cpu", "fp32") == ""
    assert "int8" in inductor.refusal("cpu", "int8") and "sm89" in inductor.refusal("sm89", "fp32")
    for target, load, told in (("cpu", None, "without one"), ("sm89", hanging, "never read back")):
        with pytest.raises(CompileError, match=told):
            inductor.build(
                tmp_path / "g.onnx", tmp_path / "m.pt2", target, PROFILE, {}, Options(network=load)
            )


def test_a_recipe_chooses_the_backends() -> None:
    assert set(get_args(BackendName)) == {"auto", *registry.BACKENDS}
    assert set(registry.chosen(["auto"])) == set(registry.BACKENDS) - {"inductor"}
    assert list(registry.chosen(["onnxruntime"])) == ["onnxruntime"]

    def recipe(backends: list[str]) -> tuple[str, ...]:
        document = {"name": "x", "data": {"path": "x"}, "compile": {"backends": backends}}
        return parse(document, []).compile.backends

    assert recipe(["auto", "inductor"]) == ("auto", "inductor")
    assert parse({"name": "x", "data": {"path": "x"}}, []).compile.backends == ("auto",)
    for wrong, told in (([], "at least one"), (["onnx"], "onnxruntime")):
        with pytest.raises(RecipeError, match=told):
            recipe(wrong)


CODE = """
    constants_info_[0].name = "w";
    constants_info_[0].dtype = cached_torch_dtype_{weight};
    aoti_torch_empty_strided(2, s, t, cached_torch_dtype_float32, cpu, 0, &buf0_handle);
    // Topologically Sorted Source Nodes: [relu, {source}], Original ATen: [aten.mm]
    aoti_torch_cpu_mm_out(buf0, arg0, reinterpret_tensor_wrapper(w, 2, s, t, 0L));
"""


def read(code: str, *products: inductor_code.Product, kernels: str = "") -> dict[str, str]:
    layers = inductor_code.read_layers(code, kernels, products)
    return {node: layer.dtype for layer in layers for node in layer.nodes}


def test_what_the_generated_code_is_taken_to_say() -> None:
    one, two = (inductor_code.Product(name, "product", (name.upper(),)) for name in ("one", "two"))
    plain = CODE.format(weight="float32", source="one")
    assert read(plain, one) == {"ONE": "fp32"}
    assert read(CODE.format(weight="float32", source="fused_into"), one) == {"ONE": "fp32"}
    assert read(CODE.format(weight="bfloat16", source="one"), one) == {"ONE": "bf16+fp32"}
    assert read(plain, one, two) == {"ONE": "fp32", "TWO": "fp32"}  # no call: in the loops
    assert read(plain, one, two, kernels="at::vec::Vectorized<at::BFloat16>") == {
        "ONE": "fp32",
        "TWO": "fp32+narrow",
    }
    assert (
        read(CODE.format(weight="float32", source="fused_into"), one, two) == {}
    )  # whose call it is, is not known


def test_products_without_a_counterpart_are_not_claimed() -> None:
    program = {"a": [("sdpa", "attention"), ("mm", "product")], "b": [("conv", "convolution")]}
    graph = {"a": [("X", "product"), ("Y", "product"), ("Z", "product")], "b": [("C", "convolution")]}
    found = {product.name: product.nodes for product in inductor_code.matched(program, graph)}
    assert found == {"sdpa": ("X", "Y"), "mm": ("Z",), "conv": ("C",)}
    fewer = {"a": graph["a"][:2], "b": graph["b"]}
    found = {product.name: product.nodes for product in inductor_code.matched(program, fewer)}
    assert found == {"sdpa": (), "mm": (), "conv": ("C",)}


def test_the_cpus_instructions_are_told() -> None:
    if not Path("/proc/cpuinfo").is_file() or os.uname().machine != "x86_64":
        pytest.skip("not Linux on x86-64")
    found = inductor._instructions()
    assert "sse4_2" in found and "hypervisor" not in found
