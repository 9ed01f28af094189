"""Planted faults: what is wrong must fail, by name, and must not leave as a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from pipeline import RTX, Built, Ended

from tlexport.errors import GateError, RunError
from tlexport.progress import Silent
from tlexport.recipe import with_overrides
from tlexport.results import CompileResult, Variant
from tlexport.run import Run
from tlexport.stages import bench, compile, package, verify

Cli = Callable[..., Ended]


def damage(graph: Path) -> None:
    """Turn the head around: every class score becomes its negative. Shapes, types and nodes stay as they were."""
    model = onnx.load(graph)
    classes = 10
    turned = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.int8 and array.ndim == 2 and classes in array.shape:
            flipped = np.negative(array, where=array > -128, out=np.full_like(array, 127))
            tensor.CopyFrom(numpy_helper.from_array(flipped, tensor.name))
            turned += 1
    assert turned == 1, "the head's weights were not found"
    onnx.save(model, graph)


def by_name(variants: tuple[Variant, ...]) -> dict[str, Variant]:
    return {variant.name: variant for variant in variants}


def test_a_damaged_int8_graph_fails_and_is_not_chosen(run_copy: Run, tmp_path: Path) -> None:
    recipe = with_overrides(run_copy.recipe, ["precision=[fp32, int8]"], targets=["cpu"])
    damage(run_copy / "graphs/int8-cpu.onnx")
    compile.run(run_copy, recipe, Silent())
    judged = by_name(verify.run(run_copy, recipe, Silent()).variants)
    broken = [variant for name, variant in judged.items() if name.endswith("int8")]
    assert broken and all(v.verdict == "fail" and v.drop > 0.3 and v.flips > 50 for v in broken), judged
    assert all("over max_drop" in v.reason for v in broken)
    assert all(v.verdict == "pass" for name, v in judged.items() if name.endswith("fp32"))
    measured = by_name(bench.run(run_copy, recipe, Silent()).variants)
    assert all(measured[v.name].p50_ms is None for v in broken)  # a failed one is not even timed
    with pytest.raises(RunError, match="int8-cpu"):  # its graph is not the one quantize made
        package.run(run_copy, recipe, Silent(), out=tmp_path / "out")


def test_build_heals_a_damaged_graph(run_copy: Run, tmp_path: Path, tlx: Cli) -> None:
    damage(run_copy / "graphs/int8-cpu.onnx")
    healed = tlx("build", run_copy.path, "--target", "cpu", "-p", "int8", "--out", tmp_path / "out", "--json")
    assert healed.code == 0 and healed.json["chosen"]["cpu"].endswith("int8")


def test_an_artifact_changed_after_compiling_fails_verify(run_copy: Run) -> None:
    recipe = run_copy.recipe
    (victim, *_) = (v for v in run_copy.result("compile", CompileResult).variants if v.file)
    path = run_copy / victim.file
    path.write_bytes(path.read_bytes() + b"\n")
    judged = by_name(verify.run(run_copy, recipe, Silent()).variants)[victim.name]
    assert judged.verdict == "fail" and "changed after it was compiled" in judged.reason
    assert judged.metric is None and judged.drop is None


def test_a_truncated_artifact_is_a_failed_verdict_not_a_crash(run_copy: Run) -> None:
    """The manifest is made to agree with the damaged file, as if the compiler had written it."""
    from tlexport.run import digest

    victim = next(
        v for v in run_copy.result("compile", CompileResult).variants if v.name == "cpu-onnxruntime-fp32"
    )
    path = run_copy / victim.file
    path.write_bytes(path.read_bytes()[:1000])
    text = (run_copy / "manifest.json").read_text().replace(victim.sha256, digest(path))
    document = json.loads(text)
    del document["stages"]["verify"]
    (run_copy / "manifest.json").write_text(json.dumps(document))
    judged = by_name(verify.run(run_copy, run_copy.recipe, Silent()).variants)
    assert judged[victim.name].verdict == "fail" and judged[victim.name].reason
    assert any(variant.verdict == "pass" for variant in judged.values()) or len(judged) < 4


def test_a_receipt_that_disagrees_fails_with_the_layers_named(
    run_copy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP32 is compiled where INT8 was expected: the real compiler's receipt must give it away."""
    from tlexport.graph import inspect

    real = inspect.compute_dtypes
    monkeypatch.setattr(inspect, "compute_dtypes", lambda model: dict.fromkeys(real(model), "int8"))
    recipe = with_overrides(run_copy.recipe, ["precision=[fp32]"], targets=["cpu"])
    compiled = compile.run(run_copy, recipe, Silent())
    made = [variant for variant in compiled.variants if variant.file]
    assert made and all(v.verdict == "fail" and "receipt disagrees in" in v.reason for v in made), compiled
    layer = next(iter(real(onnx.load(run_copy / "graphs/fp32.onnx"))))
    assert all(layer in variant.reason for variant in made)
    monkeypatch.undo()
    judged = verify.run(run_copy, recipe, Silent())
    assert all(variant.verdict == "fail" and variant.metric is None for variant in judged.variants)
    bench.run(run_copy, recipe, Silent())
    with pytest.raises(GateError, match="receipt disagrees"):
        package.run(run_copy, recipe, Silent(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compile_exits_9_or_10_where_a_receipt_disagrees(
    run_copy: Run, tlx: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlexport.graph import inspect

    real = inspect.compute_dtypes
    monkeypatch.setattr(inspect, "compute_dtypes", lambda model: dict.fromkeys(real(model), "fp16"))
    told = tlx("compile", run_copy.path, "-p", "fp32", "-t", "cpu", "--json")
    assert told.code == 9 and "receipt disagrees" in told.err
    assert {variant["verdict"] for variant in told.json["variants"]} == {"fail"}


def test_no_drop_allowed_fails_what_is_lossy_and_keeps_what_is_not(run_copy: Run) -> None:
    recipe = with_overrides(run_copy.recipe, ["gates.max_drop=0"])
    judged = by_name(verify.run(run_copy, recipe, Silent()).variants)
    assert judged["cpu-onnxruntime-fp32"].verdict == "pass" and judged["cpu-onnxruntime-fp32"].flips == 0
    lossy = [v for v in judged.values() if v.drop_high is not None and v.drop_high > 0]
    assert lossy and all(v.verdict == "fail" for v in lossy)
    assert all(v.precision != "fp32" for v in lossy)


@pytest.mark.parametrize("gate", ["gates.max_size_mb=0.001", "gates.max_flips=0"])
def test_size_and_flip_gates_hold(run_copy: Run, gate: str, tlx: Cli) -> None:
    told = tlx("verify", run_copy.path, gate, "--json")
    judged = [v for v in told.json["variants"] if v["metric"] is not None]
    wrong = [v for v in judged if gate.startswith("gates.max_size_mb") or v["flips"]]
    assert wrong and all(
        v["verdict"] == "fail" and gate.split(".")[1].split("=")[0] in v["reason"] for v in wrong
    )
    assert told.code == (10 if "size" in gate else 0)


def test_p99_that_the_count_does_not_support_fails_its_gate(run_copy: Run) -> None:
    recipe = with_overrides(run_copy.recipe, ["gates.max_p99_ms=1000", "precision=[fp32]"], targets=["cpu"])
    for stage in (compile, verify):
        stage.run(run_copy, recipe, Silent())
    measured = bench.run(run_copy, recipe, Silent())
    assert all(v.p99_ms is None for v in measured.variants) and any("p99" in why for why in measured.withheld)
    timed = [v for v in measured.variants if v.count]
    assert timed and all(v.verdict == "fail" and "needs more runs" in v.reason for v in timed)


@pytest.mark.skipif(not RTX, reason="needs tensorrt_rtx")
def test_an_engine_that_cannot_run_here_has_no_latency(built: Built) -> None:
    variants = [v for v in bench.load(Run(built.run)).variants if v.target == "sm89"]
    assert {v.precision for v in variants} == {"fp32", "fp16", "int8"}
    for variant in variants:
        if "sm89" in _runs():
            assert variant.p50_ms is not None
            continue
        assert (variant.verdict, variant.p50_ms, variant.p99_ms, variant.speedup) == (
            "compiled, not run here",
            None,
            None,
            None,
        )
        assert variant.throughput is None and variant.count is None
        assert "onnxruntime" in variant.judged_by and variant.metric is not None and variant.receipt


def _runs() -> tuple[str, ...]:
    from tlexport.backends import registry

    return registry.BACKENDS["tensorrt_rtx"].availability().runs


def test_numbers_are_held_against_the_reference(built: Built) -> None:
    """verify.json recomputed by hand from the stored predictions."""
    document = json.loads((built.run / "verify.json").read_text())
    labels, outputs = (np.load(built.run / f"reference/{name}.npy") for name in ("labels", "outputs"))
    assert document["reference"] == pytest.approx((outputs.argmax(1) == labels).mean())
    assert document["reference"] > 0.3 and document["samples"] == len(labels) == 200
    import onnxruntime

    inputs = np.load(built.run / "reference/inputs.npy")
    variant = next(v for v in document["variants"] if v["name"] == "cpu-onnxruntime-int8")
    session = onnxruntime.InferenceSession(built.run / variant["file"], providers=["CPUExecutionProvider"])
    got = np.concatenate([session.run(None, {"images": inputs[i : i + 4]})[0] for i in range(0, 200, 4)])
    assert variant["metric"] == pytest.approx((got.argmax(1) == labels).mean(), abs=0.011)
    assert variant["drop"] == pytest.approx(document["reference"] - variant["metric"])
    assert variant["max_abs_error"] == pytest.approx(np.abs(got - outputs).max(), rel=0.2)
    assert variant["drop_low"] <= variant["drop"] <= variant["drop_high"]
