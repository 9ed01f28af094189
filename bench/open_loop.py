"""What the timing itself costs, that a stall shows in an open loop, and that a p50 is the model's and not the recorder's.

One tabular network (the recipe breast-cancer) in ONNX Runtime on one thread. Three questions, each several times over:
  stall     10 s at 200 requests a second with one call that stalls for 200 ms, open loop and closed loop, beside runs without it;
            of 2000 requests at a fixed rate 20 are due in the stall's first half and wait for more than 100 ms, so that the
            p99 is just above; with Poisson arrivals (also told) it is about as often below, as 20 of them are 20 +- 4
  overhead  a call that does nothing, in the closed and in the open loop: what is shown is the measuring's own
  bound     our p50 against a bare Python loop over bound buffers, timed as a whole, and against the same in C (bench/ort_loop.c),
            in turns, block by block; about 5 minutes; C is left out, and that is said, without a compiler or --ort-headers, the folder of
            onnxruntime_c_api.h
Result: `stall` {open_ms, closed_ms, ...: p99 of every repetition}, `overhead` {closed_ns, open_ns}, `bound` {python, c: ratios}.
On a busy machine other work holds up the open loop's generator: `late` says in which repetitions it was late itself.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, destination, finish, goal, pair_ratio, say, shown, stamp, table

from tlexport.evidence.latency import closed_loop, open_loop
from tlexport.evidence.latency.quantiles import bounds_of
from tlexport.evidence.latency.recorder import Recorder, collector_off
from tlexport.evidence.latency.watch import Watcher

STALL_S, RATE = 0.2, 200.0
SHOWS_MS, MOVES = 100.0, 1.5
OVERHEAD_US = 2.0
AGREES = 0.05
SETTLE, BLOCK, PART = 50, 200, 10  # calls of a round
TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "float64": 11}  # ONNXTensorElementDataType
Call = Callable[[], object]


def main() -> None:
    parser = arguments("open_loop", __doc__ or "")
    parser.add_argument("--repetitions", type=int, default=5, help="of each run with and without a stall")
    parser.add_argument("--rounds", type=int, default=100, help="of the comparison with bare loops")
    parser.add_argument("--ort-headers", type=Path, help="folder of onnxruntime_c_api.h")
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("open_loop", parser, options)
    repetitions, rounds, seconds = (
        (2, 10, 1.0) if options.quick else (options.repetitions, options.rounds, 10.0)
    )
    with ExitStack() as stack, Watcher() as watcher:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, inputs, output = network(folder, options.quick)
        runner = stack.enter_context(loaded(model))
        document["overhead"] = overhead(repetitions, seconds)
        document["bound"] = bound(folder, model, runner, inputs, output, rounds, options.ort_headers)
        document["stall"] = stall(runner.bind(inputs).call, repetitions, seconds)
    document["watch"] = watcher.record().model_dump(mode="json")
    show(document)
    finish(document, goals(document), destination("open_loop", options), started)


def network(folder: Path, quick: bool) -> tuple[Path, dict[str, np.ndarray], np.ndarray]:
    """The FP32 graph, one row for it and an array of the shape of its answer."""
    from latency import traced
    from latency_cases import small

    from tlexport.graph import trace

    case = small("tabular", quick)
    trace.save(traced(case), folder / "model.onnx")
    one = {name: np.ascontiguousarray(array[:1]) for name, array in case.fresh.items()}
    with loaded(folder / "model.onnx") as runner:
        return folder / "model.onnx", one, next(iter(runner.run(one).values()))


def loaded(model: Path) -> Any:
    from tlexport.backends import registry

    return registry.get("onnxruntime").runner(model, threads=1)


def overhead(repetitions: int, seconds: float) -> dict[str, list[float]]:
    """What is shown for a call that does nothing, in ns: the clock in the closed loop, the median request in the open one."""

    def nothing() -> None:
        pass

    found: dict[str, list[float]] = {"closed_ns": [], "open_ns": [], "open_p99_ns": []}
    for repetition in range(repetitions):
        at = open_loop.schedule(1000, seconds / 2, "poisson", repetition)
        latency = open_loop.run([nothing], at).latency
        found["closed_ns"].append(round(closed_loop.clock_ns(), 1))
        found["open_ns"].append(round(1e9 * float(np.median(latency)), 1))
        found["open_p99_ns"].append(round(1e9 * float(np.quantile(latency, 0.99)), 1))
    say(f"overhead: {found}")
    return found


def stall(call: Call, repetitions: int, seconds: float) -> dict[str, Any]:
    """p99 in ms of each repetition, with the stall and without."""
    kinds = (
        "open_ms", "open_plain_ms", "open_from_actual_start_ms", "open_poisson_ms", "closed_ms", "closed_plain_ms",
    )  # fmt: skip
    found: dict[str, Any] = {kind: [] for kind in kinds} | {"late": [], "closed_calls": []}
    for repetition in range(repetitions):
        for stalls in (True, False) if repetition % 2 else (False, True):
            at = open_loop.schedule(RATE, seconds, "fixed", repetition)
            served = open_loop.run([stalling(call, seconds / 2 if stalls else None)], at)
            closed = in_turn(stalling(call, seconds / 2 if stalls else None), seconds)
            suffix = "_ms" if stalls else "_plain_ms"
            found[f"open{suffix}"].append(p99(served.latency))
            found[f"closed{suffix}"].append(p99(closed))
            if stalls:
                found["open_from_actual_start_ms"].append(p99(served.service))
                found["closed_calls"].append(len(closed))
                chance = open_loop.schedule(RATE, seconds, "poisson", repetition)
                found["open_poisson_ms"].append(
                    p99(open_loop.run([stalling(call, seconds / 2)], chance).latency)
                )
            if open_loop.late(served):
                found["late"].append(
                    {"repetition": repetition, "stall": stalls, "said": open_loop.late(served)}
                )
        say(
            f"stall {repetition + 1}/{repetitions}: "
            + ", ".join(f"{kind} {found[kind][-1]:.3g}" for kind in kinds)
        )
    found["closed_moves"] = pair_ratio(found["closed_ms"], found["closed_plain_ms"])
    return found


def stalling(call: Call, after_s: float | None) -> Call:
    """The call, which once, `after_s` seconds from its first, takes STALL_S longer."""
    if after_s is None:
        return call
    due: list[float] = []

    def stalls() -> None:
        if not due:
            due.append(time.perf_counter() + after_s)
        if due[-1] and time.perf_counter() >= due[-1]:
            due.append(0.0)
            time.sleep(STALL_S)
        call()

    return stalls


def in_turn(call: Call, seconds: float) -> np.ndarray:
    """Seconds of every call that a closed loop makes in the time."""
    schedule = closed_loop.Schedule(
        block=1000, settle=0, warmup_s=0, budget_s=seconds, drop_ratio=None, clock_share=None
    )
    return closed_loop.interleave({"it": call}, samples=10**7, seed=0, schedule=schedule)["it"]


def p99(seconds: np.ndarray) -> float:
    return round(1e3 * float(np.quantile(seconds, 0.99)), 5)


def bound(
    folder: Path,
    model: Path,
    runner: Any,
    inputs: Mapping[str, np.ndarray],
    output: np.ndarray,
    rounds: int,
    headers: Path | None,
) -> dict[str, Any]:
    """Our p50 over those of the bare loops, round by round."""
    call = runner.bind(inputs).call
    recorder = Recorder(call, began=0.0)
    median = recorder.warm_up(5.0)
    recorder.share_clock(median, closed_loop.clock_ns(), closed_loop.TURNS.clock_share or 0.01)
    program, why_not = compiled(folder, headers)
    found: dict[str, list[float]] = {"ours_us": [], "python_us": []} | ({"c_us": []} if program else {})
    with ExitStack() as stack:
        child = stack.enter_context(started_loop(program, model, inputs, output, folder)) if program else None
        stack.enter_context(collector_off())
        rng = np.random.default_rng(0)
        for _ in range(rounds):
            for who in rng.permutation(list(found)):
                if who == "ours_us":
                    recorder.ns.clear()
                    recorder.block(SETTLE, 0.0, max(1, BLOCK // recorder.calls_per_sample))
                    found[who].append(round(float(np.median(recorder.ns)) / 1e3, 4))
                elif who == "python_us":
                    found[who].append(round(bare(call) / 1e3, 4))
                elif child:
                    found[who].append(round(asked(child) / 1e3, 4))
    ratios = {
        who: pair_ratio(found["ours_us"], found[f"{who}_us"])
        for who in ("python", "c")
        if f"{who}_us" in found
    }
    for ratio in ratios.values():
        ratio["pairs"] = len(ratio["pairs"])
    if "c_us" in found:
        ratios["over_c_us"] = difference(found["ours_us"], found["c_us"])
    return {**found, **ratios, "calls_per_sample": recorder.calls_per_sample, "c_left_out": why_not}


def difference(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The median of the differences round by round, with its order statistics' interval."""
    apart = np.array(ours) - np.array(theirs)
    low, high = bounds_of(apart - apart.min(), 0.5, 0.95) or (None, None)
    least = float(apart.min())
    ends = (
        {"low": None, "high": None}
        if low is None or high is None
        else {"low": low + least, "high": high + least}
    )
    return {"ratio": float(np.median(apart)), **ends}


def bare(call: Call) -> float:
    """Nanoseconds a call: BLOCK calls in parts of PART, each timed as a whole, and the median part: an interruption is in one."""
    for _ in range(SETTLE):
        call()
    times = []
    for _ in range(BLOCK // PART):
        began = time.perf_counter_ns()
        for _ in range(PART):
            call()
        times.append((time.perf_counter_ns() - began) / PART)
    return float(np.median(times))


def compiled(folder: Path, headers: Path | None) -> tuple[Path | None, str]:
    """ort_loop built against this ONNX Runtime, or why not."""
    import onnxruntime

    if headers is None:
        return None, "no --ort-headers"
    if (compiler := shutil.which("cc")) is None:
        return None, "no C compiler"
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    out, source = folder / "ort_loop", Path(__file__).with_name("ort_loop.c")
    (folder / "libonnxruntime.so.1").symlink_to(library)  # the name that the library gives itself
    words = [compiler, "-O2", "-I", headers, source, "-o", out, library, f"-Wl,-rpath,{folder}"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    return (out, "") if done.returncode == 0 else (None, f"it does not compile: {done.stderr.strip()[-300:]}")


def started_loop(
    program: Path, model: Path, inputs: Mapping[str, np.ndarray], output: np.ndarray, folder: Path
) -> subprocess.Popen[str]:
    words = []
    for place, (name, array) in enumerate(inputs.items()):
        (folder / f"{name}.raw").write_bytes(array.tobytes())
        words.append(described("i", place, array) + f" {folder / f'{name}.raw'}")
    words.append(described("o", 0, output))
    return subprocess.Popen(
        [str(program), str(model), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def described(kind: str, place: int, array: np.ndarray) -> str:
    return f"{kind} {place} {TYPES[array.dtype.name]} {array.ndim} {' '.join(map(str, array.shape))}"


def asked(child: subprocess.Popen[str]) -> float:
    """Median nanoseconds of a block in C."""
    assert child.stdin and child.stdout
    child.stdin.write(f"{SETTLE} {BLOCK}\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit("bench/ort_loop ended; what it said is above")
    return float(np.median([int(word) for word in line.split()]))


def goals(document: dict[str, Any]) -> list[dict[str, Any]]:
    stalls, costs = document["stall"], document["overhead"]
    found = [
        goal("open loop: p99 with a stall of 200 ms, least of all repetitions, ms", min(stalls["open_ms"]), SHOWS_MS, at_least=True),
        goal("closed loop: p99 with the same stall over that without", stalls["closed_moves"], MOVES, at_least=False),
        goal("measuring a call, closed loop, worst repetition, µs", max(costs["closed_ns"]) / 1e3, OVERHEAD_US, at_least=False),
        goal("measuring a request, open loop, worst repetition, µs", max(costs["open_ns"]) / 1e3, OVERHEAD_US, at_least=False),
    ]  # fmt: skip
    far = distance(document["bound"]["python"])
    found.append(
        goal("tabular p50: distance from a bare loop over bound buffers", far, AGREES, at_least=False)
    )
    if "over_c_us" in document["bound"]:
        more = document["bound"]["over_c_us"]
        found.append(
            goal("tabular p50 over that of a loop in C, µs a request", more, OVERHEAD_US, at_least=False)
        )
    return found


def distance(ratio: Mapping[str, float | None]) -> dict[str, Any]:
    """How far a ratio is from 1, with the interval's nearest and farthest end."""
    value, low, high = ratio["ratio"], ratio["low"], ratio["high"]
    assert value is not None
    if low is None or high is None:
        return {"ratio": abs(value - 1), "low": None, "high": None}
    ends = sorted((abs(low - 1), abs(high - 1)))
    return {"ratio": abs(value - 1), "low": 0.0 if low <= 1 <= high else ends[0], "high": ends[1]}


def show(document: dict[str, Any]) -> None:
    stalls, costs, beside = document["stall"], document["overhead"], document["bound"]
    middle = {key: float(np.median(of)) for key, of in stalls.items() if key.endswith("_ms")}
    rows = [
        [f"p99 {key.removesuffix('_ms').replace('_', ' ')}, ms", f"{of:.4g}"] for key, of in middle.items()
    ]
    rows += [[f"overhead {key.removesuffix('_ns')}, ns", f"{np.median(of):.0f}"] for key, of in costs.items()]
    rows += [[f"our p50 over {who}", shown(beside[who])] for who in ("python", "c") if who in beside]
    table(["median of the repetitions", ""], rows)


if __name__ == "__main__":
    main()
