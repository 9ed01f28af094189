"""BF16, FP8 and INT4 through the stages: what each target gets, and why not where it gets none."""

from __future__ import annotations

import pytest
from pipeline import RTX

from tlexport.progress import Silent
from tlexport.recipe import with_overrides
from tlexport.run import Run
from tlexport.stages import compile, quantize, verify


@pytest.mark.skipif(not RTX, reason="tensorrt-rtx is not installed")
def test_each_target_gets_what_its_compilers_can_make(run_copy: Run) -> None:
    overrides = [
        "precision=[bf16, fp8, int4]",
        "compile.backends=[onnxruntime, tensorrt_rtx]",
        "gates.max_drop=0.9",
    ]
    recipe = with_overrides(run_copy.recipe, overrides, targets=["cpu", "sm86", "sm89"])
    made = quantize.run(run_copy, recipe, Silent())
    assert made.refused == {}
    compute = {graph.name: graph.compute for graph in made.graphs}
    assert compute.keys() == {"fp32", "bf16", "fp8", "int4-cpu", "int4-trt"}
    assert compute["bf16"].keys() == {"bf16"} and compute["fp8"].keys() == {"fp8"}
    assert compute["int4-cpu"].keys() == {"int4", "fp32"} and compute["int4-trt"].keys() == {"int4", "fp16"}
    compile.run(run_copy, recipe, Silent())
    judged = {variant.name: variant for variant in verify.run(run_copy, recipe, Silent()).variants}
    assert {name for name, variant in judged.items() if variant.verdict == "refused"} == {
        "cpu-onnxruntime-bf16", "cpu-onnxruntime-fp8", "sm86-tensorrt_rtx-fp8",
    }  # fmt: skip
    assert "before SM89" in judged["sm86-tensorrt_rtx-fp8"].reason
    assert judged["cpu-onnxruntime-int4"].verdict == "pass"
    for name in ("sm86-tensorrt_rtx-bf16", "sm89-tensorrt_rtx-fp8", "sm86-tensorrt_rtx-int4"):
        assert judged[name].verdict == verify.NOT_RUN_HERE, judged[name]
        assert judged[name].max_abs_error > 0 and "onnxruntime" in judged[name].judged_by
