"""bench/gpu.py on its CPU path, and what it makes of processes that die, of time that runs out and of a GPU's own words."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from test_bench import BENCH, module, run

REFUSED = {"state": "refused", "reason": "said before"}


def options() -> SimpleNamespace:
    """Those of a real command line, on the CPU."""
    defaults = {
        "device": "cpu",
        "models": ["resnet18", "vit_tiny"],
        "backends": ["onnxruntime"],
        "precisions": ["fp32", "int8"],
        "batches": [1],
        "budget": 60.0,
        "seconds_per_cell": 1.0,
        "samples": 10,
        "quick": True,
    }
    return SimpleNamespace(**defaults)


def test_gpu_on_its_cpu_path(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--backends", "onnxruntime", "tensorrt", "--precisions", "fp32", "int8"]
    document = run("gpu", tmp_path, *words)
    cells = document["cells"]
    assert set(cells) == {
        f"test_resnet/1/{cell}"
        for cell in ("eager-fp32", "onnxruntime-fp32", "onnxruntime-int8", "tensorrt-fp32", "tensorrt-int8")
    }
    assert (document["device"], document["target"], document["left"]) == ("cpu", "cpu", [])
    for name, cell in cells.items():
        if "tensorrt" in name:
            assert cell["state"] == "refused"
            assert "NVIDIA GPUs only" in cell["reason"] or "not installed" in cell["reason"]
            continue
        assert cell["state"] == "measured" and cell["count"] == len(cell["samples_ms"]) >= 8
        assert cell["parts"] is None and cell["note"] == "", "nothing is told apart on the CPU"
        assert cell["latency"]["p50"]["value_ms"] == pytest.approx(np.median(cell["samples_ms"]), rel=1e-3)
        assert cell["latency"]["p99"]["value_ms"] is None, "too few calls"
        assert cell["max_abs_error"] < (0.5 if name.endswith("int8") else 1e-3)
    assert cells["test_resnet/1/eager-fp32"]["speedup"]["ratio"] == 1.0
    assert cells["test_resnet/1/onnxruntime-int8"]["receipt"].startswith("int8 x ")
    group = document["groups"]["test_resnet/1"]
    assert group["seconds"] > 0 and "note" in group["gpu_before"] and "note" in group["gpu_after"]
    again = run("gpu", tmp_path, *words, "--resume")
    assert again["cells"] == cells and again["groups"] == document["groups"], "nothing is measured twice"


def test_the_series_network_needs_no_data(tmp_path: Path) -> None:
    case = module("gpu_cases").case_of("series", True, tmp_path)
    (prices,) = case.fresh.values()
    assert prices.shape[1:] == (64, 5) and prices.dtype == np.float32
    (batch,) = module("gpu_cases").batches(case.fresh, 64)
    (rows,) = batch.values()
    assert len(rows) == 64 and np.array_equal(rows[: len(prices)], rows[len(prices) : 2 * len(prices)])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_torch_computes_in_16_bits(precision: str) -> None:
    import torch

    cases = module("gpu_cases")
    serving = module("latency_cases").sane_model("timm/test_resnet", 32)
    images = torch.from_numpy(module("common").smooth_images(4, 32, 5))
    seen = []
    half = cases.torch_module(serving, precision, "cpu")
    for part in half.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    with torch.inference_mode():
        expected, found = serving(images), half(images)
    assert set(seen) == {{"fp16": torch.float16, "bf16": torch.bfloat16}[precision]}
    assert {part.weight.dtype for part in half.modules() if isinstance(part, torch.nn.Conv2d)} == set(seen)
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.1
    assert next(serving.parameters()).dtype == torch.float32, "the network itself is left as it is"


def test_a_place_that_would_lie_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_run, common = module("gpu_run"), module("common")
    asked = SimpleNamespace(device="cpu", out=None, quick=False, dry_run=False)
    with pytest.raises(SystemExit, match="measures no GPU: name another file"):
        gpu_run.placed(asked)
    asked.out = common.RESULTS / "gpu.json"
    with pytest.raises(SystemExit, match="measures no GPU"):
        gpu_run.placed(asked)
    asked.out = tmp_path / "cpu.json"
    assert gpu_run.placed(asked) == ("cpu", tmp_path / "cpu.json")
    from tlexport import hardware

    monkeypatch.setattr(hardware, "capability", lambda: "")
    with pytest.raises(SystemExit, match="no NVIDIA GPU here; --device cpu"):
        gpu_run.placed(SimpleNamespace(device="cuda", out=None, quick=False, dry_run=False))


def test_a_process_that_dies_costs_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the group's process: it dies of one cell, and of another by an error that it could still write down."""
    gpu_run = module("gpu_run")
    calls = []

    def process(job: dict, limit: float) -> str:
        calls.append(dict(job["known"]))
        names = [f"{backend}-{precision}" for backend, precision in job["cells"]]
        cells = {name: {"state": "refused", "reason": why} for name, why in job["known"].items()}
        doing = next((name for name in names[1:] if name not in cells), "")
        if doing == "onnxruntime-int8":
            cells[doing] = REFUSED
        record = {"doing": doing, "cells": cells, "around": {}}
        Path(job["out"]).write_text(json.dumps(record))
        return "the process was killed by signal 11" if doing else ""

    monkeypatch.setattr(gpu_run, "process", process)
    found = gpu_run.measured(options(), "cpu", "resnet18", 1, tmp_path)["cells"]
    assert (
        found["onnxruntime-fp32"]["reason"]
        == "the process was killed by signal 11 while it was made or loaded"
    )
    assert found["onnxruntime-int8"] == REFUSED and len(calls) == 3

    def dies_while_timing(job: dict, limit: float) -> str:
        record = {"doing": "timing eager-fp32, onnxruntime-fp32", "cells": {}, "around": {}}
        Path(job["out"]).write_text(json.dumps(record))
        return "the process was killed by signal 6"

    monkeypatch.setattr(gpu_run, "process", dies_while_timing)
    found = gpu_run.measured(options(), "cpu", "resnet18", 1, tmp_path)["cells"]
    assert len(found) == 3 and all("signal 6 at timing" in cell["reason"] for cell in found.values())


def test_a_real_process_that_dies_is_told(tmp_path: Path) -> None:
    """A job that is none."""
    assert module("gpu_run").process({"work": str(tmp_path)}, 60) == "the process ended with exit code 1"


def test_what_the_budget_leaves_is_listed_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_run = module("gpu_run")
    asked, out = options(), tmp_path / "gpu.json"
    names = ("eager-fp32", "onnxruntime-fp32", "onnxruntime-int8")
    record = {"cells": dict.fromkeys(names, REFUSED), "around": {}}
    now = [0.0]

    def measured(*arguments: object) -> dict:
        now[0] += 100
        return record

    monkeypatch.setattr(gpu_run, "measured", measured)
    monkeypatch.setattr(gpu_run.time, "monotonic", lambda: now[0])
    document = {"cells": {}, "groups": {}, "left": [], "target": "cpu", "git": None}
    gpu_run.run(asked, document, out, tmp_path, 0.0)
    assert set(document["cells"]) == {f"resnet18/1/{name}" for name in names}
    assert document["left"] == [f"vit_tiny/1/{name}" for name in names]
    kept = json.loads(out.read_text())
    assert kept["cells"] == document["cells"] and kept["left"] == [
        *(f"resnet18/1/{n}" for n in names),
        *document["left"],
    ]
    now[0] = 0.0
    gpu_run.run(asked, document, out, tmp_path, 0.0)
    assert len(document["cells"]) == 6 and document["left"] == []
    head = {"device": "cpu", "target": "cpu", "settings": {}, "versions": {"torch": "1"}}
    assert gpu_run.resumed(head | {"cells": {"a": 1}, "groups": {}}, head)["cells"] == {"a": 1}
    with pytest.raises(SystemExit, match="the file's target are sm89"):
        gpu_run.resumed(head | {"target": "sm89"}, head)


def test_a_wrong_answer_is_no_candidate() -> None:
    held = module("gpu_group").held_against
    right = np.array([[0.2, 0.8]], np.float32)
    assert held(right, right, "fp32") == 0 and held(right, right + 0.01, "int8") == pytest.approx(
        0.01, abs=1e-6
    )
    with pytest.raises(ValueError, match="something else"):
        held(right, right + 0.01, "fp32")
    with pytest.raises(ValueError, match="NaN"):
        held(right, right * np.nan, "int8")


def test_the_parts_of_a_call_have_an_interval() -> None:
    group = module("gpu_group")
    times = iter(range(1000))
    bound = SimpleNamespace(timed_parts=lambda: {"enqueue": 0.1, "compute": float(next(times))})
    found = group.parts(bound)
    assert found["compute"]["value_ms"] == pytest.approx((group.PARTS - 1) / 2)
    assert found["compute"]["low_ms"] < found["compute"]["value_ms"] < found["compute"]["high_ms"]
    assert group.parts(SimpleNamespace(timed_parts=None)) is None


class NvmlStandIn:
    """The library's own names and errors; answers of an imagined GPU that lacks a sensor of its power."""

    def __init__(self, pynvml: ModuleType) -> None:
        self.pynvml = pynvml

    def __getattr__(self, name: str) -> object:
        pynvml = self.pynvml
        known = getattr(pynvml, name)  # so that a name it does not have is an error
        answers = {
            "nvmlDeviceGetName": lambda gpu: "imagined",
            "nvmlDeviceGetClockInfo": lambda gpu, kind: {pynvml.NVML_CLOCK_SM: 1410, pynvml.NVML_CLOCK_MEM: 1593}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: 1980,
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 71,
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=3 << 30),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: pynvml.nvmlClocksEventReasonSwPowerCap | 1,
        }  # fmt: skip
        return answers.get(name, self._lacks if callable(known) and "Error" not in name else known)

    def _lacks(self, *arguments: object) -> None:
        raise self.pynvml.NVMLError(self.pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_what_nvml_says_is_told_in_words() -> None:
    pynvml = pytest.importorskip("pynvml")
    state = module("gpu_state")
    found = state.of(NvmlStandIn(pynvml), object())
    assert found["reasons"] == ["idle", "software power cap"] and found["throttled"] is True
    assert found["name"] == "imagined"
    assert (found["sm_mhz"], found["celsius"], found["used_mib"], found["watts"]) == (1410, 71, 3072, None)
    assert state.words(0x1 | 0x200) == ["idle", "0x200"] and state.words(0) == []
    bits = {
        "SwPowerCap": 0x4, "HwSlowdown": 0x8, "SwThermalSlowdown": 0x20, "HwThermalSlowdown": 0x40,
        "HwPowerBrakeSlowdown": 0x80, "GpuIdle": 0x1, "ApplicationsClocksSetting": 0x2, "SyncBoost": 0x10,
        "DisplayClockSetting": 0x100,
    }  # fmt: skip
    assert {name: getattr(pynvml, f"nvmlClocksEventReason{name}") for name in bits} == bits
    assert set(bits.values()) == set(state.HARMLESS) | set(state.THROTTLING)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module("gpu")
    monkeypatch.setitem(gpu.NEEDED, "no_such_module", "no-such-package")
    monkeypatch.setattr(sys, "argv", [str(BENCH / "gpu.py")])
    with pytest.raises(SystemExit, match="cannot run without no-such-package: pip install no-such-package"):
        gpu.main()


def test_the_readme_has_a_row_for_each_group_or_says_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = module("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.on_a_gpu() == ["Latency on a GPU (`python bench/gpu.py`): not yet measured on a GPU."]

    def cell(p50: float, ratio: float) -> dict:
        return {"state": "measured", "latency": {"p50": {"value_ms": p50}}, "speedup": {"ratio": ratio}}

    cells = {
        "resnet18/1/eager-fp32": cell(2.0, 1.0),
        "resnet18/1/tensorrt-fp32": cell(1.0, 2.0),
        "resnet18/1/tensorrt-fp16": cell(0.5, 4.0),
        "resnet18/1/tensorrt-int8": REFUSED,
        "resnet18/64/eager-fp32": cell(20.0, 1.0),
    }
    gpu = {"name": "NVIDIA L4", "driver": "580.1"}
    document = {
        "program": "gpu",
        "command": "python bench/gpu.py --budget 60",
        "cells": cells,
        "machine": {"gpus": [gpu]},
        "versions": {"torch": "2.14.1", "onnxruntime-gpu": "1.31.1"},
        "target": "sm89",
    }
    (tmp_path / "gpu.json").write_text(json.dumps(document))
    said, _, header, rule, one, many = readme.on_a_gpu()
    assert "NVIDIA L4, driver 580.1, torch 2.14.1" in said and "`python bench/gpu.py --budget 60`" in said
    assert header == "| network/batch | eager | tensorrt |"
    assert rule.count("|") == header.count("|")
    assert one == "| resnet18/1 | 2 ms (fp32, 1.0x) | 0.5 ms (fp16, 4.0x) |"
    assert many == "| resnet18/64 | 20 ms (fp32, 1.0x) | - |"
