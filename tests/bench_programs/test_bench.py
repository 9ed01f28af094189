"""The measuring programs: each runs with tiny settings and writes what it promises; and what they share counts right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
# What each program promises beside the common head, and its arguments for a machine without the optional extras.
PROMISED = {
    "startup": {"tlexport_s", "typer_s", "ratio"},
    "finetune": {"full", "probe", "threads"},
    "latency": {"models", "small_models", "geometric_mean", "failed"},
    "memory": {"peak", "timeline_mb", "build", "settings"},
    "accuracy": {"cases"},
    "quantize": {"cases"},
    "gpu": {"device", "target", "settings", "cells", "groups", "left"},
    "open_loop": {"stall", "overhead", "bound", "watch"},
    "serve": {"cases", "left_out", "servers"},
    "soak": {"soak"},
    "gate": {"accuracy", "latency", "sessions", "measured"},
    "report": {"cases"},
    "search_cost": {"build_s", "by_hand_s", "ratio", "making", "stages_s", "settings"},
}


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(BENCH))


common = module("common")
chromium = module("chromium")


def run(name: str, folder: Path, *words: str) -> dict:
    """The result of a quick run in a process of its own."""
    out = folder / f"{name}.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    }
    line = [sys.executable, str(BENCH / f"{name}.py"), "--quick", "--out", str(out), *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 2, "no table"
    document = json.loads(out.read_text())
    assert set(common.HEAD) | PROMISED[name] == set(document)
    assert document["program"] == name and document["quick"] is True
    assert str(folder) not in out.read_text(), "a folder of this machine is in the result"
    assert document["machine"]["usable_cores"] >= 1 and document["versions"]["torch"]
    for found in document["goals"]:
        assert found["met"] == (
            (found["value"] >= found["limit"]) if found["at_least"] else (found["value"] <= found["limit"])
        )
    return document


def test_startup(tmp_path: Path):
    document = run("startup", tmp_path)
    assert len(document["tlexport_s"]) == len(document["typer_s"]) == len(document["ratio"]["pairs"]) == 2
    assert document["command"] == "python bench/startup.py --quick"
    assert len(document["goals"]) == 1


def test_open_loop(tmp_path: Path):
    """A stall of 200 ms in one second at 200/s: 40 requests are due meanwhile, so the p99 of 200 lies deep in it."""
    document = run("open_loop", tmp_path)
    stall, beside = document["stall"], document["bound"]
    assert len(stall["open_ms"]) == len(stall["closed_plain_ms"]) == 2
    assert min(stall["open_ms"]) >= 100, "a latency that counts from the scheduled start shows it"
    assert len(beside["ours_us"]) == len(beside["python_us"]) == 10 and beside["python"]["pairs"] == 10
    assert beside["c_left_out"] == "no --ort-headers" and "c" not in beside
    assert len(document["overhead"]["open_ns"]) == 2 and document["watch"]["readings"] >= 2


@pytest.mark.slow
def test_serve(tmp_path: Path):
    """The embedded server alone; the others need environments of their own, and that is said."""
    document = run("serve", tmp_path, "--only", "tlexport", "kserve")
    assert document["left_out"] == {"kserve": "no --kserve-python"}
    for servers in document["cases"].values():
        found = servers["tlexport"]
        assert all(len(of) == 2 for of in found.values())
        assert min(found["capacity_per_s"]) > 0 and min(found["p50_ms"]) > 0 and max(found["goodput"]) > 0
    assert len(document["goals"]) == 5


@pytest.mark.slow
def test_soak(tmp_path: Path):
    """New versions, malformed and cut requests among others, and each answer is the one that was asked for."""
    found = run("soak", tmp_path)["soak"]
    assert found["lost"] == found["duplicated"] == found["wrong"] == 0
    assert found["answered"] + found["cut"] + found["refused"]["400"] == found["requests"]
    assert found["events"]["version loaded"] >= 2 and set(found["refused"]) == {"400"} and found["cut"] > 0
    assert found["closest"] > 1e-4


def test_finetune(tmp_path: Path):
    document = run("finetune", tmp_path)
    (full,) = document["full"].values()
    assert (
        len(full["plain_images_per_s"]) == len(full["ours_images_per_s"]) == len(full["ratio"]["pairs"]) == 2
    )
    expected = np.array(full["ours_images_per_s"]) / np.array(full["plain_images_per_s"])
    assert np.allclose(full["ratio"]["pairs"], expected, rtol=1e-2)
    assert document["probe"]["epochs"] == 10 and len(document["probe"]["ours_s"]) == 2
    assert len(document["goals"]) == 2


@pytest.mark.browser
@pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing() or "all is there")
def test_report(tmp_path: Path):
    document = run("report", tmp_path)
    (case,) = document["cases"].values()
    assert case["requests"] == case["console"] == 0 and case["drawings"] >= 8 and case["sections"] >= 10
    assert len(case["seconds"]) == len(case["load_ms"]) == 3 and min(case["seconds"]) > 0
    assert case["bytes"] < 5e6 and len(document["goals"]) == 3


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_latency(tmp_path: Path):
    document = run("latency", tmp_path)
    (model,) = document["models"].values()
    candidates = {
        "torch-eager",
        "torch-channels-last",
        "torch-compile",
        "torch-aotinductor",
        *model["variants"],
    }
    assert set(model["second_ms"]) == candidates and set(model["first_ms"]) == candidates - {
        "torch-channels-last",
        "torch-compile",
        "torch-aotinductor",
    }
    assert model["chosen"] in model["variants"] and model["chosen_fp32"].endswith("fp32")
    medians = {who: float(np.median(times)) for who, times in model["second_ms"].items()}
    assert model["chosen_over_best"]["ratio"] == pytest.approx(
        medians[model["chosen"]] / min(medians.values()), rel=1e-3
    )
    assert set(document["geometric_mean"]) == {"all", "fp32_only"} and not document["failed"]


@pytest.mark.slow
def test_memory(tmp_path: Path):
    document = run("memory", tmp_path, "--targets", "cpu")
    peak = document["peak"]
    assert 200 < peak["tree_pss_mb"] <= peak["tree_rss_mb"]
    assert peak["judged_mb"] == max(peak["tree_pss_mb"], peak["largest_process_mb"])
    assert max(document["timeline_mb"]) == pytest.approx(peak["tree_pss_mb"], abs=0.2)


@pytest.mark.slow
def test_accuracy(tmp_path: Path):
    images(tmp_path / "data" / "pneumoniamnist" / "pneumoniamnist.npz")
    document = run(
        "accuracy", tmp_path, "--data", str(tmp_path / "data"), "--only", "chest-xray", "--targets", "cpu"
    )
    case = document["cases"]["chest-xray"]
    assert (
        document["command"] == "python bench/accuracy.py --quick --data DATA --only chest-xray --targets cpu"
    )
    assert case["metric"] == "auc" and 0 <= case["test"]["accuracy"] <= 1
    assert {v["precision"] for v in case["variants"]} == {"fp32", "fp16", "int8"}
    assert [g["what"] for g in document["goals"]][:2] == ["chest-xray: test auc", "chest-xray: test accuracy"]


@pytest.mark.slow
def test_quantize(tmp_path: Path):
    images(tmp_path / "data" / "pneumoniamnist" / "pneumoniamnist.npz")
    work = tmp_path / "work"
    words = ["--data", str(tmp_path / "data"), "--only", "lite0-chest-xray", "--work", str(work)]
    document = run("quantize", tmp_path, *words)
    case = document["cases"]["lite0-chest-xray"]
    rows = {(row["maker"], row["flavour"]): row for row in case["graphs"]}
    assert set(rows) == {("tlexport", "cpu"), ("tlexport", "trt"), *module("quantize").RIVALS}
    for flavour in ("cpu", "trt"):
        rival = rows["onnxruntime", flavour]
        assert rival["int8_macs"] > 0.8 and rival["drop_low"] <= rival["drop"] <= rival["drop_high"]
        if rows["tlexport", flavour]["drop"] is not None:
            assert rival["beyond"]["ratio"] == pytest.approx(
                rows["tlexport", flavour]["drop"] - rival["drop"]
            )
    assert all(row["reason"] for row in rows.values() if row["drop"] is None), (
        "no row is empty without a word"
    )
    assert rows["tlexport", "trt"]["settings"]["evaluations"] > 0, "it was searched"
    assert case["one_flip"] == pytest.approx(1 / 40) and case["rival_versions"]["onnx"]

    made = work / "made" / "lite0-chest-xray" / "onnxruntime-trt.onnx"
    before = made.stat().st_mtime_ns
    again = run("quantize", tmp_path, *words)["cases"]["lite0-chest-xray"]
    assert made.stat().st_mtime_ns == before, "a rival's graph is not made twice"
    assert again["test"] == case["test"], "nor is a network trained twice"


@pytest.mark.slow
def test_search_cost(tmp_path: Path):
    images(tmp_path / "data" / "pneumoniamnist" / "pneumoniamnist.npz")
    words = ["--data", str(tmp_path / "data"), "--case", "lite0-chest-xray", "--targets", "cpu"]
    document = run("search_cost", tmp_path, *words)
    expected = np.array(document["build_s"]) / np.array(document["by_hand_s"])
    assert len(expected) == 2 and np.allclose(document["ratio"]["pairs"], expected, rtol=1e-3)
    assert document["making"]["ratio"] < document["ratio"]["ratio"]
    assert {"export", "quantize", "compile"} < set(document["stages_s"])


def images(path: Path) -> None:
    """Two classes that differ in brightness."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        labels = np.arange(40) % 2
        arrays[f"{split}_images"] = (rng.integers(0, 120, (40, 28, 28)) + 100 * labels[:, None, None]).astype(
            np.uint8
        )
        arrays[f"{split}_labels"] = labels
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)


@pytest.mark.parametrize("name", PROMISED)
def test_help_says_what_it_measures_and_how_long(name: str):
    line = [sys.executable, str(BENCH / f"{name}.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120).stdout
    assert "--quick" in said and "minutes" in said and "Result:" in said


def test_a_pair_ratio_is_the_median_and_has_an_interval_from_six_pairs_on():
    few, many = (
        common.pair_ratio([2.0] * 5, [1.0] * 5),
        common.pair_ratio([2, 4, 6, 8, 10, 12, 99], [2.0] * 7),
    )
    assert (few["ratio"], few["low"], few["high"]) == (2.0, None, None)
    assert many["ratio"] == 4.0 and 1 <= many["low"] < 4 < many["high"] <= 49.5


def test_the_best_rival_is_found_anew_in_each_resample():
    rng = np.random.default_rng(0)
    first, second, own = (scale * rng.normal(1, 0.02, 160) for scale in (4.0, 4.02, 2.0))
    value, draws = common.best_ratio_draws([first, second], own, block=8)
    assert value == pytest.approx(min(np.median(first), np.median(second)) / np.median(own))
    low, high = common.interval(value, draws)["low"], common.interval(value, draws)["high"]
    assert low < value < high and high - low < 0.1
    assert draws.mean() <= common.best_ratio_draws([first], own, block=8)[1].mean()


def test_too_few_rounds_give_no_interval():
    value, draws = common.best_ratio_draws([[2.0] * 16], [1.0] * 16, block=8)
    assert common.interval(value, draws) == {"ratio": 2.0, "low": None, "high": None}


@pytest.mark.parametrize(
    ("found", "at_least", "met", "sure"),
    [
        ({"ratio": 1.8, "low": 1.75, "high": 1.9}, True, True, True),
        ({"ratio": 1.8, "low": 1.6, "high": 1.9}, True, True, False),
        ({"ratio": 1.6, "low": 1.5, "high": 1.9}, True, False, False),
        ({"ratio": 1.6, "low": 1.5, "high": 1.65}, True, False, True),
        ({"ratio": 1.6, "low": 1.5, "high": 1.9}, False, True, False),
        (1.7, True, True, None),
        (1.71, False, False, None),
    ],
)
def test_a_goal_is_judged_on_its_own_side(found: dict | float, at_least: bool, met: bool, sure: bool | None):
    judged = common.goal("it", found, 1.7, at_least=at_least)
    assert (judged["met"], judged["sure"]) == (met, sure)


def test_json_keeps_values_and_puts_numbers_on_one_line():
    document = {
        "a": [1, 2.5, -3e-05],
        "b": {"c": ["x", "y"], "d": [[1, 2], [3]]},
        "e": "text [1,\n 2] [3]",
        "f": [],
    }
    text = common.to_json(document)
    assert json.loads(text) == document
    assert '"a": [ 1, 2.5, -3e-05 ]' in text
    with pytest.raises(ValueError, match="Out of range"):
        common.to_json({"a": float("nan")})


def test_the_command_names_no_folder_of_this_machine(tmp_path: Path):
    parser = common.arguments("some", "")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args(
        ["--out", str(tmp_path / "x"), "--data", str(tmp_path), "--only", "a", "b", "--quick"]
    )
    assert common.command("some", parser, options) == "python bench/some.py --quick --data DATA --only a b"


def test_a_quick_run_does_not_land_among_the_results():
    parser = common.arguments("some", "")
    assert common.destination("some", parser.parse_args([])).parent == common.RESULTS
    assert common.RESULTS not in common.destination("some", parser.parse_args(["--quick"])).parents


def test_a_failing_command_ends_the_program_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(SystemExit, match="inspect ended with exit code 11"):
        common.tlexport(["inspect", "nowhere"], cwd=tmp_path, timeout=60)
    assert common.tlexport(["recipes", "list"], cwd=tmp_path, timeout=60)["recipes"]["insects"]


def test_a_failing_or_slow_start_ends_the_program(monkeypatch: pytest.MonkeyPatch):
    startup = module("startup")
    monkeypatch.setitem(startup.COMMANDS, "typer", [sys.executable, "-c", "import no_such_module"])
    with pytest.raises(SystemExit, match="no_such_module"):
        startup.seconds_of("typer")
    monkeypatch.setattr(startup, "TIMEOUT", 0.2)
    monkeypatch.setitem(startup.COMMANDS, "typer", [sys.executable, "-c", "import time; time.sleep(5)"])
    with pytest.raises(SystemExit, match="more than"):
        startup.seconds_of("typer")


ALLOCATE = "import time; held = b'x' * (200 << 20); time.sleep(0.6)"


def watched(line: list[str], folder: Path) -> SimpleNamespace:
    """`memory.watch` from a process as small as the program's own: the kernel counts a child's peak from its fork on."""
    code = "import dataclasses, json, memory, pathlib, sys; used = memory.watch(json.loads(sys.argv[1]), pathlib.Path())"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(json.dumps(dataclasses.asdict(used)))", json.dumps(line)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    return SimpleNamespace(**json.loads(done.stdout))


@pytest.mark.parametrize("depth", [1, 2])
def test_memory_of_the_whole_tree_is_seen(tmp_path: Path, depth: int):
    line = [sys.executable, "-c", ALLOCATE]
    if depth == 2:
        line = [
            sys.executable,
            "-c",
            f"import subprocess; held = b'x' * (100 << 20); subprocess.run({line!r})",
        ]
    used = watched(line, tmp_path)
    expected = (200 << 20) if depth == 1 else (300 << 20)
    assert expected < used.pss < expected + (60 << 20)
    assert (200 << 20) < used.largest < (400 << 20)
    assert max(used.timeline) == pytest.approx(used.pss / 1e6, abs=0.1)


def test_a_watched_command_that_fails_or_hangs_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = module("memory")
    with pytest.raises(SystemExit, match="exit code 3"):
        memory.watch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
    monkeypatch.setattr(memory, "TIMEOUT", 0.3)
    with pytest.raises(SystemExit, match="did not end"):
        memory.watch([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)


def test_the_stage_of_the_peak():
    stage_at = module("memory").stage_at
    seconds = {"export": 2.0, "quantize": 3.0}
    assert [stage_at(when, seconds, 6.0) for when in (0.5, 1.5, 3.5, 6.5)] == [
        "before export",
        "export",
        "quantize",
        "after the last stage",
    ]


def case(drop: float = 0.001, auc: float = 0.97) -> dict:
    variants = [
        {
            "name": f"cpu-{b}-int8",
            "target": "cpu",
            "precision": "int8",
            "drop": d,
            "drop_low": d,
            "drop_high": d,
        }
        for b, d in (("a", drop), ("b", -0.1), ("c", None))
    ]
    return {"metric": "auc", "test": {"auc": auc, "accuracy": 0.9}, "variants": variants}


def test_accuracy_goals_hold_the_worst_variant():
    accuracy = module("accuracy")
    good, bad = (accuracy.goals_of({"chest-xray": case(drop)}) for drop in (0.001, 0.006))
    assert [g["met"] for g in good] == [True, True, True]
    assert [g["met"] for g in bad] == [True, True, False] and bad[2]["what"].endswith("cpu-a-int8")
    assert not accuracy.goals_of({"chest-xray": case(auc=0.95)})[0]["met"]


def test_cases_of_several_calls_are_merged(tmp_path: Path):
    accuracy, out = module("accuracy"), tmp_path / "accuracy.json"
    assert accuracy.merged({"insects": {"new": 1}}, out) == {"insects": {"new": 1}}
    out.write_text(json.dumps({"cases": {"insects": {"old": 1}, "chest-xray": {"old": 2}}}))
    assert accuracy.merged({"insects": {"new": 1}}, out) == {"chest-xray": {"old": 2}, "insects": {"new": 1}}


def quantised(drop: float, high: float, share: float, beyond: float | None) -> dict:
    row = {"flavour": "cpu", "drop": drop, "drop_low": 0.0, "drop_high": high, "int8_macs": share}
    ours = row | {"maker": "tlexport", "beyond": None}
    theirs = row | {
        "maker": "nncf",
        "beyond": None if beyond is None else {"ratio": beyond, "low": beyond - 0.01, "high": beyond + 0.01},
    }
    return {"one_flip": 0.002, "graphs": [ours, theirs]}


@pytest.mark.parametrize(
    ("case", "met"),
    [
        (quantised(0.001, 0.004, 0.95, 0.002), [True, True, True, True]),
        (quantised(0.001, 0.006, 0.95, None), [True, False, True]),
        (quantised(0.006, 0.009, 0.79, 0.0021), [False, False, False, False]),
    ],
)
def test_quantisation_goals_hold_each_graph_and_each_rival(case: dict, met: list[bool]):
    goals = module("quantize").goals_of({"some": case})
    assert [g["met"] for g in goals] == met
    assert all(g["what"].startswith("some: INT8 cpu ") for g in goals)


def test_the_readme_tells_goals_alike_in_one_row_with_how_many_are_missed():
    readme, quantize = module("readme"), module("quantize")
    cases = {
        "a": quantised(0.001, 0.004, 0.95, 0.001),
        "b": quantised(0.006, 0.009, 0.7, 0.0021),
        "c": quantised(0.002, 0.004, 0.99, None),
    }
    told = readme.worst_of_alike(quantize.goals_of(cases))
    assert [goal["what"] for goal in told] == [
        "b: INT8 cpu drop (worst of 3, 1 missed)",
        "b: INT8 cpu drop at worst (worst of 3, 1 missed)",
        "b: INT8 cpu share of operations (worst of 3, 1 missed)",
        "b: INT8 cpu drop beyond nncf's (worst of 2, 1 missed)",
    ]
    assert [goal["value"] for goal in told] == [0.006, 0.009, 0.7, 0.0021]


def test_the_readme_has_a_row_for_each_network_and_flavour():
    readme = module("readme")
    case = quantised(0.001, 0.004, 0.95, 0.001) | {"metric": "auc", "reference": 0.98}
    case["graphs"] += [row | {"flavour": "trt"} for row in case["graphs"]]
    case["graphs"][-1] |= {"maker": "modelopt", "drop": None}
    header, rule, cpu, trt = readme.quantised({"a": case})
    assert header.count("|") == rule.count("|") == cpu.count("|") == trt.count("|")
    assert cpu == "| a | cpu | auc 0.9800 | +0.0010, at worst +0.0040 | 95% | - | +0.0010 | - | - | - |"
    assert trt.endswith("| 95% | - | - | - | no graph | - |")


def test_a_graph_that_was_not_made_misses_its_share():
    case = quantised(0.001, 0.004, 0.95, None)
    case["graphs"][0] |= {"drop": None}
    (goal,) = module("quantize").goals_of({"some": case})
    assert (goal["what"], goal["value"], goal["met"]) == ("some: INT8 cpu share of operations", 0.0, False)


def test_a_rival_that_is_missing_or_fails_says_so(tmp_path: Path):
    """The real script, on the tests' interpreter and with a graph that is none."""
    quantize = module("quantize")
    graph, samples = tmp_path / "fp32.onnx", tmp_path / "calibration.npy"
    graph.write_bytes(b"no graph")
    np.save(samples, np.zeros((2, 3, 8, 8), np.uint8))
    report = tmp_path / "onnxruntime-cpu.json"
    line = [sys.executable, str(BENCH / "quantize_rivals.py"), "onnxruntime", "cpu", "--metric", "auc"]
    line += ["--fp32", str(graph), "--calibration", str(samples), "--validation", str(tmp_path)]
    found = quantize.finished([*line, "--out", str(report.with_suffix(".onnx"))], tmp_path, report)
    assert set(found) == {"failed"} and found["failed"].startswith("exit code 1: ")
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "quantize_rivals.py").write_text((BENCH / "quantize_rivals.py").read_text())
    (shadow / "nncf.py").write_text("raise ImportError('no such package')")
    line[1:4] = [str(shadow / "quantize_rivals.py"), "nncf", "cpu"]
    found = quantize.finished([*line, "--out", str(report.with_suffix(".onnx"))], tmp_path, report)
    assert found == {"missing": "nncf: no such package"}


def test_operations_of_nodes_without_names_are_all_counted():
    """As some makers leave them: by name alone, the two would be one."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from tlexport.graph import cost

    wide, narrow = (numpy_helper.from_array(np.ones((4, n), np.float32), f"w{n}") for n in (4, 1))
    nodes = [helper.make_node("MatMul", ["x", "w4"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", n])
        for name, n in (("x", 4), ("y", 1))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [wide, narrow])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    assert sum(cost.macs(model).values()) == 4, "so the planted fault is there"
    assert sum(cost.macs(module("quantize_judge").named(model)).values()) == 20


def test_a_run_of_another_training_is_not_taken(tmp_path: Path):
    from tlexport.recipe import load
    from tlexport.run import Run, write_json

    training, case = module("quantize_training"), module("quantize_cases").CASES["lite0-cifar10"]
    words = ["data.path=images.npz", "transfer.epochs=3"]
    run = Run.create(tmp_path / "runs" / "some", load(case.recipe, [*words, "gates.max_drop=0.5"]))
    done = {"manifest_version": 1, "stages": {"finetune": {"result": {"backbone": "held"}}}}
    write_json(run / "manifest.json", done)
    assert training.fine_tuned("some", case, words, tmp_path)[1] == {"backbone": "held"}
    with pytest.raises(SystemExit, match=r"another recipe \(transfer\)"):
        training.fine_tuned("some", case, ["data.path=images.npz", "transfer.epochs=4"], tmp_path)


def test_missing_data_is_named(tmp_path: Path):
    with pytest.raises(SystemExit, match="needs hymenoptera in the folder that --data names"):
        module("accuracy").measured("insects", tmp_path, tmp_path, ["cpu"], True)


@pytest.mark.parametrize("probe", [False, True])
def test_the_plain_loop_learns_what_the_strategy_says(tmp_path: Path, probe: bool):
    finetune = module("finetune")
    from tlexport.models.image import create, describe_backbone

    _, data = finetune.dataset(tmp_path, 32, 20)
    spec = describe_backbone("timm/test_resnet", classes=10, task="multiclass", image_size=32)
    loop = finetune.Plain(spec, data, 10, probe=probe)
    before = {name: value.clone() for name, value in loop.backbone.state_dict().items()}
    head = loop.head.weight.clone()
    assert loop.epoch() > 0
    changed = [name for name, value in loop.backbone.state_dict().items() if not value.equal(before[name])]
    assert not loop.head.weight.equal(head) and bool(changed) != probe
    pixels, label = finetune.InMemory(data.train, spec)[3]
    expected = create(spec).normalise(data_tensor(data, 3))[0]
    assert label == 3 and np.allclose(pixels.numpy(), expected.numpy(), atol=1e-5), (
        "both sides see the same input"
    )


def data_tensor(data, index: int):
    import torch

    return torch.from_numpy(data.preprocessing.batch(data.train.images[index : index + 1]))


def test_a_wrong_choice_is_seen():
    latency = module("latency")
    rng = np.random.default_rng(0)
    slow, fast, eager = (scale * rng.normal(1, 0.01, 96) for scale in (3.0, 2.0, 6.0))
    times = {
        who: (eager * scale).tolist() for who, scale in zip(latency.TORCH, (1.2, 1.0, 1.1, 1.3), strict=True)
    }
    times |= {
        "openvino-fp32": fast.tolist(),
        "onnxruntime-fp32": slow.tolist(),
        "openvino-int8": (fast * 9)[:24].tolist(),
    }
    model = {
        "chosen": "onnxruntime-fp32",
        "chosen_fp32": "openvino-fp32",
        "second_ms": times,
        "torch_alone_ms": {who: times[who] for who in latency.TORCH},
        "dropped": {"openvino-int8": "too slow"},
    }
    judged = latency.judged(model, 0)
    assert judged["chosen_over_best"]["ratio"] == pytest.approx(1.5, rel=0.01)
    assert judged["chosen_over_best"]["low"] > 1.05, "not taken for chance"
    assert judged["torch_eager_over_chosen"]["ratio"] == pytest.approx(2.4, rel=0.01)
    assert judged["torch_best"] == "torch-channels-last" and judged["best"] == "openvino-fp32"
    assert judged["torch_best_over_chosen_fp32"]["ratio"] == pytest.approx(3.0, rel=0.01)
    mean = latency.geometric_mean([judged["draws"]["all"], judged["draws"]["fp32_only"]])
    assert mean["ratio"] == pytest.approx(6**0.5, rel=0.01) and mean["low"] < mean["ratio"] < mean["high"]


def test_a_candidate_that_computes_something_else_ends_the_program():
    latency = module("latency")

    class Constant:
        def __init__(self, value: float) -> None:
            self.value = value

        def run(self, inputs: dict) -> dict:
            return {"probabilities": np.full((len(inputs["images"]), 2), self.value, np.float32)}

    images = np.zeros((2, 3, 4, 4), np.uint8)
    found = latency.agreements(
        {"torch-eager": Constant(0.5), "openvino-int8": Constant(0.6)}, {"images": images}, "probabilities"
    )
    assert found["openvino-int8"]["max_abs_error"] == pytest.approx(0.1, abs=1e-6)
    with pytest.raises(SystemExit, match="onnxruntime-fp32 differs"):
        latency.agreements(
            {"torch-eager": Constant(0.5), "onnxruntime-fp32": Constant(0.6)},
            {"images": images},
            "probabilities",
        )


def test_random_weights_are_made_to_answer_differently():
    import torch

    serving = module("latency_cases").sane_model("timm/test_resnet", 32)
    with torch.inference_mode():
        answers = serving(torch.from_numpy(common.smooth_images(16, 32, 5)))
    assert len(set(answers.argmax(1).tolist())) >= 3 and answers.std(dim=0).mean() > 0.02


@pytest.mark.slow
def test_gate(tmp_path: Path):
    document = run("gate", tmp_path, "--only", "latency", "sessions")
    assert [(row["slower"], row["neighbour"]) for row in document["latency"]] == [
        (1.0, False),
        (1.1, False),
        (1.0, True),
        (1.1, True),
    ]
    assert [(row["slower"], row["history"]) for row in document["sessions"]] == [
        (1.0, 0),
        (1.0, 4),
        (1.1, 0),
        (1.1, 4),
    ]
    for row in document["latency"] + document["sessions"]:
        assert sum(of["ratio"] for of in row["tolerance 0"].values()) == pytest.approx(1)
    assert document["accuracy"] == [] and set(document["measured"]) == {"latency", "sessions"}


def test_a_planted_drop_of_the_gates_population_is_what_it_says():
    """The share that is replaced makes the metric drop by so much: checked on a million drawn samples."""
    cases = module("gate_cases")
    real, rng = cases.population(), np.random.default_rng(0)
    for metric in ("accuracy", "auc"):
        labels, old, new = real.sample(1_000_000, real.replaced(metric, 0.02), rng)
        before, after = (
            cases.evaluated(labels, np.log(side[:, 1] / side[:, 0]))[metric] for side in (old, new)
        )
        # Three standard errors of a difference of two shares of a million are 0.0015 at most.
        assert before - after == pytest.approx(0.02, abs=0.0015), metric


def test_shares_of_gate_runs_have_clopper_and_pearsons_interval():
    share = module("gate").share
    assert share(0, 500) == {"ratio": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 500))}
    assert share(500, 500)["low"] == pytest.approx(0.025 ** (1 / 500))


def test_the_readme_tells_further_machines_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    readme = module("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    for name, cpu in (("serve", "first"), ("serve.other", "other"), ("soak", "first")):
        of = {"program": name.partition(".")[0], "machine": {"cpu": cpu}, "goals": [{"what": "p50"}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(of))
    told = [(of["program"], of["goals"][0]["what"]) for of in readme.results()]
    assert told == [("serve", "p50"), ("serve", "p50 (on other)"), ("soak", "p50")]
