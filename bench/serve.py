"""One graph behind several servers: what each adds to the bare session, keeps at 80% of its capacity, and does with twice as much.

A tabular network and ResNet-18, in ONNX Runtime, the same threads everywhere; the same client (tlexport load, on this machine,
so that it shares the cores), in turns, round by round:
  low       10 s a round over one connection at a twentieth of the capacity, 5 to 200 requests a second, and before that the bare
            session asked at such moments: p50, p99, and the p50 above the session's (of the tabular network it is held against a
            limit; ResNet-18's own p50 moves by more from round to round)
  capacity  16 connections that never wait: requests answered a second; here and below of 32 samples for the tabular network, as
            single ones cost this client more than the server
  load      80% of that capacity over 64 connections: p99 over p50
  overload  twice that capacity over 256 connections: goodput over the capacity, share that was refused; the server is told to
            answer within a second
  memory    proportional set size of all its processes, after all that
KServe and MLServer need environments of their own: --kserve-python, --mlserver-python; a server that is not there is left out, and
that is said. Only tlexport batches here: KServe, MLServer and this Ray application answer each request by itself, as they come.
The whole takes about 25 minutes with --seconds 4 (60 with the default).
Result: `cases` {network: {server: ...}}, `left_out`.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, destination, finish, goal, say, stamp, table
from latency_cases import image, small
from serve_cases import Live, bundle, live, versions

from tlexport import tensors
from tlexport.evidence.latency import capacity, open_loop
from tlexport.evidence.latency.quantiles import bounds_of
from tlexport.evidence.latency.recorder import Call

SERVERS = ("tlexport", "kserve", "mlserver", "ray")
LOW, LEAST, MOST, CONNECTIONS = 0.05, 5.0, 200.0, 16
# Samples a request under load: a single row costs the client, which is Python and shares the cores, more than the server, so
# that nothing beyond the server's capacity could be offered.
SAMPLES = {"tabular": 32, "resnet18": 1}
OVERHEAD_US, TAIL, KEEPS = 300.0, 5.0, 0.9


def main() -> None:
    parser = arguments("serve", __doc__ or "")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement in a round")
    parser.add_argument("--threads", type=int, default=1, help="of every session")
    parser.add_argument("--kserve-python", type=Path, help="interpreter that has kserve and onnxruntime")
    parser.add_argument("--mlserver-python", type=Path, help="interpreter that has mlserver and onnxruntime")
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS))
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("serve", parser, options)
    rounds, seconds = (2, 1.0) if options.quick else (options.rounds, options.seconds)
    pythons = {
        name: path
        for name, path in (("kserve", options.kserve_python), ("mlserver", options.mlserver_python))
        if path is not None
    }
    chosen, document["left_out"] = available(options.only, pythons)
    document["servers"] = versions(pythons)
    document["cases"] = {}
    cases = {"tabular": partial(small, "tabular", options.quick)}
    cases["resnet18"] = partial(
        image, "timm/test_resnet" if options.quick else "torchvision/resnet18", 64 if options.quick else 224
    )
    for name, make in cases.items():
        with tempfile.TemporaryDirectory(prefix="b", dir="/tmp") as folder:
            place = Path(folder)
            held = bundle(make(), name, place / "bundle", options.threads)
            document["cases"][name] = measured(
                name, held, chosen, options.threads, place, pythons, rounds, seconds
            )
    show(document)
    finish(document, goals(document), destination("serve", options), started)


def available(wanted: list[str], pythons: dict[str, Path]) -> tuple[list[str], dict[str, str]]:
    """Servers that can be started here, and why the others cannot."""
    left = {name: f"no --{name}-python" for name in ("kserve", "mlserver") if name not in pythons}
    if importlib.util.find_spec("ray") is None:
        left["ray"] = "ray[serve] is not installed"
    left = {name: why for name, why in left.items() if name in wanted}
    return [name for name in wanted if name not in left], left


def measured(
    name: str, held: Path, servers: list[str], threads: int, folder: Path, pythons: dict[str, Path], rounds: int,
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """One server at a time is up with the session, since idle ones take the cores, too; the rounds go through all servers."""
    found: dict[str, Any] = {server: {key: [] for key in KEYS} for server in servers}
    rng = np.random.default_rng(0)
    for number in range(rounds):
        for server in rng.permutation(servers):
            with ExitStack() as stack:
                call = stack.enter_context(bare(held, threads))
                up = stack.enter_context(
                    live(server, held, name, threads, folder / f"{server}{number}", pythons)
                )
                for key, value in once(up, held, call, seconds, number, SAMPLES[name]).items():
                    found[server][key].append(value)
            say(f"{name} {number + 1}/{rounds} {server}: {told(found[server])}")
    return found


KEYS = (
    "low_per_s", "p50_ms", "p99_ms", "session_p50_ms", "overhead_us", "capacity_per_s", "load_p50_ms", "load_p99_ms", "tail",
    "goodput", "shed", "not_answered", "waited", "memory_mib",
)  # fmt: skip


def once(
    up: Live, held: Path, call: Call, seconds: float, seed: int, samples: int
) -> dict[str, float | None]:
    """One round of one server."""
    peak = saturated(up.url, held, seconds, samples)
    rate = min(max(LOW * peak, LEAST), MOST)
    at = open_loop.schedule(rate, seconds, "fixed", seed)
    session = open_loop.run([call], at).latency
    low = asked(up.url, held, rate, seconds, 1, seed, arrivals="fixed")
    loaded = asked(up.url, held, 0.8 * peak, seconds, 64, seed, batch=samples)
    flooded = asked(up.url, held, 2 * peak, seconds, 256, seed, batch=samples, timeout_ms=1000.0)
    p50, p99 = quantiles(low)
    load_p50, load_p99 = quantiles(loaded)
    session_p50 = 1e3 * float(np.median(session))
    return {
        "low_per_s": rate,
        "p50_ms": p50,
        "p99_ms": p99,
        "session_p50_ms": session_p50,
        "overhead_us": 1e3 * (p50 - session_p50),
        "capacity_per_s": peak,
        "load_p50_ms": load_p50,
        "load_p99_ms": load_p99,
        "tail": load_p99 / load_p50,
        "goodput": (flooded.goodput_per_s or 0.0) / peak,
        "shed": flooded.shed,
        "not_answered": 1 - flooded.counts.get("ok", 0) / sum(flooded.counts.values()),
        "waited": flooded.waited,
        "memory_mib": up.memory_mib(),
    }


def asked(url: str, held: Path, rate: float, seconds: float, connections: int, seed: int, **more: Any) -> Any:
    """A LoadResult. Ends the program if an answer is wrong."""
    from tlexport.progress import Silent
    from tlexport.serving.client import Access
    from tlexport.stages import load

    ask = load.Ask(rate=rate, seconds=seconds, concurrency=connections, seed=seed, **more)
    result = load.run(url, held, ask, Access(timeout_s=10), Silent())
    if result.counts.get("wrong"):
        raise SystemExit(f"{url} answers wrongly: {result.errors['wrong']}")
    return result


def quantiles(result: Any) -> tuple[float, float]:
    """p50 and p99 in ms of the requests that were answered, from the histogram that holds every one of them."""
    from tlexport.evidence.latency import histogram

    if result.served is None:
        return float("nan"), float("nan")
    values, counts = histogram.decode(result.served.histogram)
    reached = np.cumsum(counts) / counts.sum()
    p50, p99 = (1e3 * float(values[np.searchsorted(reached, q)]) for q in (0.5, 0.99))
    return p50, p99


def saturated(url: str, held: Path, seconds: float, samples: int) -> float:
    """Requests of so many samples a second that CONNECTIONS connections which never wait get answered."""
    from tlexport.bundle import preflight
    from tlexport.serving import client as clients
    from tlexport.serving.asking import Asking

    document = preflight.check(held)
    inputs = np.load(held / "golden/inputs.npy", allow_pickle=False)
    with ExitStack() as stack:
        calls: list[Call] = []
        encoding = None
        for _ in range(CONNECTIONS):
            client = clients.connect(url)
            stack.callback(client.close)
            one = Asking(client, document.name, inputs, document.inputs, document.outputs[0])
            client.encoding = encoding or clients.negotiate(
                client, document.name, tensors.named(inputs[:1], one.names)
            )
            encoding = client.encoding
            calls.append(partial(client.send, one.prepared(np.arange(samples) % len(inputs))))
        return capacity.saturated(calls, 1, seconds).items_per_s


class bare:
    """A bound call of the session at batch 1."""

    def __init__(self, held: Path, threads: int) -> None:
        self.held, self.threads = held, threads

    def __enter__(self) -> Call:
        from tlexport.backends import registry
        from tlexport.bundle import preflight

        names = tuple(spec.name for spec in preflight.check(self.held).inputs)
        self.stack = ExitStack()
        runner = self.stack.enter_context(
            registry.get("onnxruntime").runner(self.held / "models/cpu/model.onnx", threads=self.threads)
        )
        return runner.bind(tensors.first(self.held / "golden/inputs.npy", names, 1)).call

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def middle(values: list[float]) -> dict[str, Any]:
    """The median of the rounds with its order statistics' interval; null below six."""
    array = np.array(values, float)
    low, high = bounds_of(array - array.min(), 0.5, 0.95) or (None, None)
    ends = (
        (None, None)
        if low is None or high is None or len(array) < 6
        else (low + array.min(), high + array.min())
    )
    return {"ratio": float(np.median(array)), "low": ends[0], "high": ends[1]}


def goals(document: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, servers in document["cases"].items():
        if (ours := servers.get("tlexport")) is None:
            continue
        of = f"tlexport serve, {name}"
        above = (f"{of}: p50 above the bare session, µs", "overhead_us", OVERHEAD_US, False)
        limits = (
            *((above,) if name == "tabular" else ()),
            (f"{of}: p99 over p50 at 80% of capacity", "tail", TAIL, False),
            (f"{of}: goodput at twice the capacity, over the capacity", "goodput", KEEPS, True),
        )
        found += [goal(what, middle(ours[key]), limit, at_least=least) for what, key, limit, least in limits]
    return found


def told(found: dict[str, list[float]]) -> str:
    return ", ".join(f"{key} {of[-1]:.4g}" for key, of in found.items() if of and of[-1] is not None)


def show(document: dict[str, Any]) -> None:
    rows = []
    for name, servers in document["cases"].items():
        for server, found in servers.items():
            cells = [np.median([of for of in found[key] if of is not None] or [np.nan]) for key in KEYS]
            rows.append([name, server, *(f"{value:.4g}" for value in cells)])
    table(["network", "server", *KEYS], rows)
    for server, why in document["left_out"].items():
        say(f"{server} left out: {why}")


if __name__ == "__main__":
    main()
