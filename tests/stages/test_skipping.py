"""A stage whose inputs are unchanged is skipped and says so; one whose input changed runs again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pipeline import SMALL, Built, Ended

import tlexport
from tlexport.errors import ExportError, RunError
from tlexport.progress import Silent
from tlexport.recipe import with_overrides
from tlexport.results import ExportResult, FinetuneResult
from tlexport.run import Run
from tlexport.stages import bench, compile, export, quantize, verify

Cli = Callable[..., Ended]
STAGES = {"export": export, "quantize": quantize, "compile": compile, "verify": verify, "bench": bench}
CHANGES = {
    "export": "golden.samples=4",
    "quantize": "calibration.method=max",
    "compile": "export.batch.opt=2",
    "verify": "verify.confidence=0.9",
    "bench": "bench.samples=11",
}


class Listener(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def finished(run: Run, stage: str) -> tuple[str, float]:
    record = run.manifest["stages"][stage]
    return record["finished"], record["seconds"]


@pytest.mark.parametrize("stage", STAGES)
def test_skipped_when_unchanged_and_redone_when_asked_for_something_else(run_copy: Run, stage: str) -> None:
    heard = Listener()
    manifest = (run_copy / "manifest.json").read_bytes()
    same = STAGES[stage].run(run_copy, run_copy.recipe, heard)
    assert heard.lines == [f"{stage}: unchanged, skipped"]
    assert (run_copy / "manifest.json").read_bytes() == manifest
    again = STAGES[stage].run(run_copy, with_overrides(run_copy.recipe, [CHANGES[stage]]), heard)
    assert heard.lines.count(f"{stage}: unchanged, skipped") == 1
    assert run_copy.manifest["stages"][stage]["config"] != json.loads(manifest)["stages"][stage]["config"]
    assert type(again) is type(same)


@pytest.mark.parametrize(
    ("stage", "relative"),
    [
        ("export", "graphs/fp32.onnx"),
        ("quantize", "graphs/fp16.onnx"),
        ("verify", "verify.json"),
        ("bench", "bench-samples.npz"),
    ],
)
def test_a_missing_or_changed_output_is_made_again(run_copy: Run, stage: str, relative: str) -> None:
    path = run_copy / relative
    path.write_bytes(b"changed by hand")
    heard = Listener()
    STAGES[stage].run(run_copy, run_copy.recipe, heard)
    assert path.stat().st_size > 100 and not any("skipped" in line for line in heard.lines)
    run_copy.require_unchanged(stage)
    path.unlink()
    STAGES[stage].run(run_copy, run_copy.recipe, heard)
    assert path.is_file() and not any("skipped" in line for line in heard.lines)


def test_a_changed_input_runs_the_stage_again(run_copy: Run) -> None:
    labels = run_copy / "reference/labels.npy"
    np.save(labels, np.roll(np.load(labels), 1))
    heard = Listener()
    result = verify.run(run_copy, run_copy.recipe, heard)
    assert not any("skipped" in line for line in heard.lines)
    assert result.reference < 0.35  # judged against the labels as they are now


def test_a_stage_before_its_turn_names_the_one_to_run(built: Built, tmp_path: Path, tlx: Cli) -> None:
    empty = Run.create(tmp_path / "run", Run(built.run).recipe)
    for stage in ("export", "quantize", "compile", "verify", "bench", "package"):
        refused = (
            tlx(stage, empty.path, "--out", tmp_path / "b", "--json")
            if stage == "package"
            else tlx(stage, empty.path, "--json")
        )
        assert (
            refused.code == 6
            and f"run: tlexport {'finetune' if stage == 'export' else ''}" in refused.json["error"]
        )
    with pytest.raises(RunError, match="no finished finetune stage"):
        empty.result("finetune", FinetuneResult)


def test_export_measures_parity_at_three_batches_on_real_images(built: Built) -> None:
    made = Run(built.run).result("export", ExportResult)
    assert [entry.batch for entry in made.parity] == [1, 2, 4]
    assert all(0 < entry.relative < 1e-4 and entry.scale > 0.1 for entry in made.parity)
    assert made.golden == 8 and made.opset == 20 and made.parameters > 100_000


def test_export_refuses_a_graph_that_disagrees(
    built: Built, run_copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is traced from a model whose last bias is off by a hundredth."""
    import torch

    from tlexport.graph import trace

    real = trace.trace

    def off(serving: torch.nn.Module, *arguments: object, **options: object) -> object:
        import copy

        other = copy.deepcopy(serving)
        with torch.no_grad():
            list(other.parameters())[-1][0] += 0.01
        return real(other, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trace, "trace", off)
    with pytest.raises(ExportError, match=r"disagrees with the reference at batch 1: output 'probabilities'"):
        export.run(run_copy, with_overrides(run_copy.recipe, ["export.opset=21"]), Silent())
    record = run_copy.manifest["stages"]["export"]
    assert record["config"]["export"]["opset"] == 20  # no record of the failed one


def test_synthetic_golden_samples_hold_no_test_image(run_copy: Run) -> None:
    recipe = with_overrides(run_copy.recipe, ["golden.source=synthetic", "golden.samples=5"])
    assert export.run(run_copy, recipe, Silent()).golden == 5
    images, golden = np.load(run_copy / "reference/inputs.npy"), np.load(run_copy / "golden/inputs.npy")
    assert golden.shape == (5, *images.shape[1:]) and golden.dtype == np.uint8
    distance = np.abs(images[None].astype(int) - golden[:, None]).mean(axis=(2, 3, 4))
    assert distance.min() > 20  # far from every image, in grey levels


def test_a_test_split_smaller_than_the_largest_batch(run_copy: Run) -> None:
    for name in ("inputs", "labels", "outputs"):
        path = run_copy / f"reference/{name}.npy"
        np.save(path, np.load(path)[:3])
    made = export.run(run_copy, run_copy.recipe, Silent())
    assert made.golden == len(np.load(run_copy / "golden/inputs.npy")) == 3
    assert [entry.batch for entry in made.parity] == [1, 2, 4]


def test_the_library_does_what_the_command_does(tmp_path: Path) -> None:
    run = tlexport.finetune(
        "digits-quickstart",
        out=tmp_path / "run",
        overrides=[*SMALL, "data.limit=40", "transfer.epochs=1", "precision=[fp32]", "gates.max_drop=1"],
    )
    assert isinstance(run, Run) and run.result("finetune", FinetuneResult).epochs == 1
    made = tlexport.build(run, bundle=tmp_path / "bundle", targets=["cpu"], overrides=["bench.samples=10"])
    assert made.failed == {} and made.bundle == str(tmp_path / "bundle") and set(made.chosen) == {"cpu"}
    again = tlexport.build(tmp_path / "run", bundle=tmp_path / "bundle", targets=["cpu"])
    assert again.chosen == made.chosen and sum(again.seconds.values()) < 0.5 * sum(made.seconds.values())
    with pytest.raises(tlexport.TlexportError):
        tlexport.build(tmp_path / "nothing", bundle=tmp_path / "b")
    assert set(tlexport.__all__) == {
        "TlexportError",
        "__version__",
        "build",
        "finetune",
        "predict",
        "pretrain",
    }
