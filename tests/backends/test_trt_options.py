"""Each option reaches the library or is refused; what TensorRT-RTX is said to ignore is shown on engines it builds here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tlexport import hardware
from tlexport.backends import Options, isolation, ort, registry, trt, trt_options
from tlexport.errors import BackendCrash, CompileError
from tlexport.recipe import TensorRT
from tlexport.tensors import Profile

needs_rtx = pytest.mark.skipif(not trt.RTX.availability().installed, reason="tensorrt-rtx is not installed")
PROFILE = Profile(min=1, opt=2, max=8)
# A value of each option that is not its default.
OTHER = {
    "workspace_mb": 512,
    "optimization_level": 0,
    "hardware_compatibility": "ampere_plus",
    "version_compatible": True,
    "strip_weights": True,
    "sparse_weights": True,
    "aux_streams": 2,
    "tf32": True,
    "timing_cache": "timing.cache",
    "runtime_cache": "runtime.cache",
}
IGNORED = ("optimization_level", "hardware_compatibility", "sparse_weights", "aux_streams")
FAILING = {"version_compatible": "lean", "strip_weights": "CUDA"}


def options(**changed) -> Options:
    return Options(TensorRT(**changed))


def build(graphs, out, precision: str = "fp32", target: str = "sm89", **changed):
    asked = options(**changed)
    return registry.build(
        *("tensorrt_rtx", graphs.paths[precision], out, target, PROFILE, graphs.expected(precision)),
        timeout=120,
        options=asked,
    )


def test_every_option_has_another_value_to_test_with() -> None:
    assert set(OTHER) == set(TensorRT.model_fields)
    assert set(trt_options.chosen(TensorRT(**OTHER))) == set(OTHER) and trt_options.chosen(TensorRT()) == {}


@pytest.mark.parametrize("name", OTHER)
def test_an_option_is_honoured_or_refused_by_name(name, graphs, tmp_path) -> None:
    for flavour in (trt.RTX, trt.TENSORRT):
        said = trt_options.refusal(flavour.NAME, TensorRT(**{name: OTHER[name]}))
        assert (name in trt_options.supported(flavour.NAME)) == (not said)
        assert not said or (flavour.NAME in said and f"tensorrt.{name}" in said)
    if trt.RTX.availability().installed and name not in trt_options.supported("tensorrt_rtx"):
        with pytest.raises(CompileError, match=rf"tensorrt_rtx cannot honour tensorrt\.{name}:"):
            build(graphs, tmp_path / "m.engine", **{name: OTHER[name]})
        assert list(tmp_path.iterdir()) == []


def test_every_refused_option_is_named_at_once() -> None:
    said = trt_options.refusal("tensorrt_rtx", TensorRT(**OTHER))
    assert [name for name in OTHER if f"tensorrt.{name}:" in said] == [
        name for name in OTHER if name not in ("workspace_mb", "tf32", "runtime_cache")
    ]


def test_other_backends_leave_the_options_alone(graphs, tmp_path) -> None:
    made = ort.build(
        *(graphs.paths["fp32"], tmp_path / "m.onnx", "cpu", PROFILE, graphs.expected("fp32")),
        options(**OTHER),
    )
    assert made.receipt.agrees and trt_options.used("onnxruntime", TensorRT(**OTHER)) == {}
    assert trt_options.used("tensorrt_rtx", TensorRT(tf32=True)) == {"tf32": True}


@needs_rtx
def test_a_workspace_that_is_too_small_is_named(tmp_path) -> None:
    path, expected = two_branches(tmp_path / "wide.onnx", width=512)
    for size, fits in ((1, False), (2048, True)):
        asked = options(workspace_mb=size)
        arguments = ("tensorrt_rtx", path, tmp_path / f"{size}.engine", "sm86", PROFILE, expected)
        if fits:
            assert registry.build(*arguments, timeout=120, options=asked).receipt.agrees
        else:
            with pytest.raises(CompileError, match=r"tensorrt\.workspace_mb is 1: allow more"):
                registry.build(*arguments, timeout=120, options=asked)


@needs_rtx
@pytest.mark.parametrize("precision, dtype", [("fp32", "tf32"), ("fp16", "fp16")])
def test_where_tf32_is_allowed_the_receipt_claims_no_fp32(precision, dtype, graphs, tmp_path) -> None:
    receipt = build(graphs, tmp_path / "m.engine", precision, tf32=True).receipt
    assert receipt.agrees and set(receipt.built().values()) == {dtype}


@needs_rtx
def test_without_it_tf32_is_off_in_the_engine(tmp_path) -> None:
    """The engines differ, so the flag arrives; the same build twice gives the same bytes for this graph."""
    path = two_branches(tmp_path / "branches.onnx", width=32)[0]
    plain, again, tf32 = (engine(path, tmp_path, **asked) for asked in ({}, {}, {"tf32": True}))
    assert plain == again != tf32


@needs_rtx
def test_the_timing_cache_is_written_and_read_again(tmp_path) -> None:
    """Through the functions that TensorRT shares; TensorRT-RTX has them too, though they do nothing for its engines."""
    path, cache = two_branches(tmp_path / "branches.onnx", width=8)[0], tmp_path / "caches" / "timing.cache"
    plain = engine(path, tmp_path)
    assert engine(path, tmp_path, timing_cache=str(cache)) == plain
    kept = cache.read_bytes()
    assert len(kept) > 100 and engine(path, tmp_path, timing_cache=str(cache)) == plain
    assert cache.read_bytes() == kept and [entry.name for entry in cache.parent.iterdir()] == [cache.name]


def test_a_cache_that_the_library_does_not_take_is_named(tmp_path) -> None:
    """What TensorRT answers for the cache of another GPU: False."""

    class Config:
        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            return cache == b"" or ignore_mismatch

    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"of another GPU")
    with (
        pytest.raises(
            CompileError, match=r"timing\.cache was not made by this library.*tensorrt\.timing_cache"
        ),
        trt_options.timing_cache(Config(), TensorRT(timing_cache=str(cache))),
    ):
        pass
    assert cache.read_bytes() == b"of another GPU"


@needs_rtx
def test_doctor_is_told_what_this_library_honours() -> None:
    assert trt.RTX.availability().options == ("workspace_mb", "tf32", "runtime_cache")
    assert ort.availability().options == ()


@needs_rtx
@pytest.mark.parametrize("name", IGNORED)
def test_what_is_said_to_be_ignored_changes_no_byte(name, tmp_path) -> None:
    """Fails for a version of TensorRT-RTX that honours it: its refusal is then out of date."""
    for width in (8, 32):
        path = two_branches(tmp_path / "branches.onnx", width)[0]
        plain = engine(path, tmp_path)
        try:
            assert engine(path, tmp_path, **{name: OTHER[name]}) == plain
        except CompileError as error:
            assert f"does not take tensorrt.{name}" in str(error)


@needs_rtx
@pytest.mark.skipif(bool(hardware.capability()), reason="this machine has a GPU")
@pytest.mark.parametrize("name", FAILING)
def test_what_is_said_to_fail_without_a_gpu_fails(name, graphs, tmp_path) -> None:
    with pytest.raises(CompileError, match=FAILING[name]):
        engine(graphs.paths["fp32"], tmp_path, **{name: OTHER[name]})


@needs_rtx
def test_a_value_that_the_library_corrects_is_an_error() -> None:
    """TensorRT-RTX takes 9 for 5 without a word; the recipe allows no such value, another version may know fewer levels."""
    import tensorrt_rtx

    builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
    config = builder.create_builder_config()
    trt_options.apply(tensorrt_rtx, config, TensorRT(optimization_level=4, workspace_mb=64))
    assert config.builder_optimization_level == 4
    with pytest.raises(
        CompileError, match=r"does not take tensorrt\.optimization_level: given 9, it holds 5"
    ):
        trt_options.apply(tensorrt_rtx, config, TensorRT.model_construct(optimization_level=9))


def test_the_caches_stand_in_the_run_or_where_they_are_named(tmp_path) -> None:
    asked = TensorRT(timing_cache="run", runtime_cache=str(tmp_path / "mine")).placed(tmp_path / "cache")
    assert asked.timing_cache == str(tmp_path / "cache" / "timing.cache")
    assert asked.runtime_cache == str(tmp_path / "mine")
    assert TensorRT().placed(tmp_path) == TensorRT()


@needs_rtx
def test_a_build_that_takes_too_long_is_stopped(graphs, tmp_path) -> None:
    with pytest.raises(BackendCrash, match=r"compiling fp32\.onnx for sm89 gave no answer within 0\.01 s"):
        registry.build(
            "tensorrt_rtx", graphs.paths["fp32"], tmp_path / "m.engine", "sm89", PROFILE, {}, timeout=0.01
        )
    assert not (tmp_path / "m.engine").exists()


def engine(path: Path, folder: Path, **changed) -> bytes:
    """Built in a child of its own, past the refusals."""
    out = folder / "engine"
    out.unlink(missing_ok=True)
    isolation.call(_unrefused, path, out, TensorRT(**changed), timeout=120, what="building")
    return out.read_bytes()


def _unrefused(path: Path, out: Path, asked: TensorRT) -> None:
    trt_options._CANNOT["tensorrt_rtx"] = {}
    trt.RTX.build(path, out, "sm89", PROFILE, {}, Options(asked))


def two_branches(path: Path, width: int) -> tuple[Path, dict[str, str]]:
    """Two inputs, a depthwise and a transposed convolution without biases, and a weight that two nodes share."""
    rng = np.random.default_rng(0)
    shapes = {"one": (width, 3, 1, 1), "deep": (width, 1, 5, 5), "up": (width, width, 2, 2)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) / 16 for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["left", "one"], ["a"], name="first"),
        helper.make_node("Conv", ["right", "one"], ["b"], name="second"),
        helper.make_node("Conv", ["b", "deep"], ["c"], name="depthwise", group=width, pads=[2] * 4),
        helper.make_node("Add", ["a", "c"], ["d"], name="sum"),
        helper.make_node("Relu", ["d"], ["e"], name="relu"),
        helper.make_node("ConvTranspose", ["e", "up"], ["out"], name="transposed", strides=[2, 2]),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, 7, 9]) for n in ("left", "right")]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", width, 14, 18])
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "branches", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path, dict.fromkeys(["first", "second", "depthwise"], "fp32")
