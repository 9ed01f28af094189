"""Whether `tlexport serve` loses or mixes up answers, or grows, over as many requests as an hour at 500 a second has.

A bundle is built through the real command line and served in a process of its own. Several connections ask as fast as they are
answered: requests of 1 to 8 samples, each with an id of its own, and every answer is held against what the server said of the same
samples when they were asked alone. Meanwhile one request in a hundred is malformed, one in a hundred is cut off in the middle, and the
bundle is written anew every --reload seconds, which the server takes up while it answers. Its resident memory is read every second.
It takes 15 to 30 minutes on two cores.
Result: `soak` {requests, seconds, per_s, answered, refused {status: n}, cut, lost, duplicated, wrong, closest, events {log event: n},
memory_mib [...], growth {ratio, low, high}}. `lost`: requests of which nothing came back; `duplicated`: answers with another
request's id, and answers beyond one a request by the server's own count; `closest`: the least difference between two samples'
answers, beside which a difference of TOLERANCE is none; `growth`: median memory of the last fifth over that of the second; its 95%
interval is of 1000 resamples of blocks of ten readings.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import arguments, destination, finish, goal, interval, say, stamp, table, tlexport
from serve_cases import live

from tlexport import cores
from tlexport.bundle import manifest
from tlexport.errors import ServerError
from tlexport.run import replacing
from tlexport.serving import client
from tlexport.serving.datatypes import ProtocolError
from tlexport.tensors import named

RECIPE = "breast-cancer"
TIMEOUT = 1800.0
REQUESTS = 3600 * 500
POOL, SAMPLES, LARGEST, CONNECTIONS = 2000, 256, 8, 4
BLOCK = 10
ODD = 100  # one request in so many is malformed, another cut off
TOLERANCE = 1e-5  # of a probability: other sizes of batch add in another order


@dataclass
class Tally:
    """What one connection saw."""

    answered: int = 0
    wrong: int = 0
    foreign: int = 0  # answers with another request's id
    cut: int = 0
    refused: Counter[int] = field(default_factory=Counter)


def built(work: Path) -> Path:
    tlexport(["finetune", RECIPE, "--out", "run"], cwd=work, timeout=TIMEOUT)
    tlexport(["build", "run", "--target", "cpu", "--out", "bundle"], cwd=work, timeout=TIMEOUT)
    return work / "bundle"


def drawn(bundle: Path, own: client.Client, model: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """SAMPLES noisy golden samples whose answers are far apart, and what the server answers to each of them alone."""
    rng = np.random.default_rng(0)
    names = tuple(spec.name for spec in own.model(model).inputs)
    golden = named(np.load(bundle / "golden/inputs.npy", allow_pickle=False), names)
    pool = {}
    for name, array in golden.items():
        rows = np.resize(array, (POOL, *array.shape[1:]))
        pool[name] = (rows * rng.uniform(0.5, 1.5, rows.shape)).astype(array.dtype)
    alone = np.concatenate([_answer(own, model, pool, slice(i, i + 1)) for i in range(POOL)])
    order = np.argsort(alone[:, -1])
    kept = [order[0]]
    for row in order[1:]:
        if alone[row, -1] - alone[kept[-1], -1] > 10 * TOLERANCE:
            kept.append(row)
    rows = rng.permutation(kept)[:SAMPLES]
    return {name: array[rows] for name, array in pool.items()}, alone[rows]


def _answer(own: client.Client, model: str, samples: dict[str, np.ndarray], rows: slice) -> np.ndarray:
    (outputs,) = own.send(
        own.prepare(model, {name: array[rows] for name, array in samples.items()})
    ).outputs.values()
    return outputs


def ask(
    url: str,
    model: str,
    samples: dict[str, np.ndarray],
    alone: np.ndarray,
    requests: int,
    seed: int,
    tally: Tally,
) -> None:
    """`requests` of random samples, one after the other, over one connection."""
    rng, own = np.random.default_rng(seed), client.connect(url)
    for number in range(requests):
        rows = rng.choice(len(alone), rng.integers(1, LARGEST + 1), replace=False)
        identity = f"{seed}-{number}"
        prepared = own.prepare(model, {name: array[rows] for name, array in samples.items()}, id=identity)
        if number % ODD == 1:
            _cut(url, prepared)
            tally.cut += 1
            continue
        if number % ODD == 2:
            prepared = prepared.replace(b'"inputs"', b'"stupni"')
        try:
            answer = own.send(prepared)
        except ProtocolError as error:
            tally.refused[error.status] += 1
            continue
        except ServerError:
            continue  # nothing came back: it is lost, as the count says
        (outputs,) = answer.outputs.values()
        tally.answered += 1
        tally.foreign += answer.id != identity
        tally.wrong += outputs.shape != alone[rows].shape or bool(
            np.abs(outputs - alone[rows]).max() > TOLERANCE
        )
    own.close()


def _cut(url: str, prepared: bytes) -> None:
    """Send half of a request on a connection of its own and hang up."""
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as line:
        line.sendall(prepared[: len(prepared) // 2])


def soak(bundle: Path, requests: int, reload_s: float, read_s: float, folder: Path) -> dict[str, Any]:
    stop, memory = threading.Event(), []
    model = manifest.read(bundle).name
    with live("tlexport", bundle, model, cores.usable(), folder, {}) as up:
        first = client.connect(up.url)
        samples, alone = drawn(bundle, first, model)
        before = counted(up.url)
        tallies = [Tally() for _ in range(CONNECTIONS)]
        threads = [
            threading.Thread(target=ask, args=(up.url, model, samples, alone, requests // CONNECTIONS, seed, tally), daemon=True)
            for seed, tally in enumerate(tallies, start=1)
        ]  # fmt: skip
        watcher = threading.Thread(target=_watched, args=(up.process.pid, read_s, memory, stop), daemon=True)
        writer = threading.Thread(target=_rewritten, args=(bundle, reload_s, stop), daemon=True)
        started = time.monotonic()
        try:
            for thread in (*threads, watcher, writer):
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(10)
                    say(f"{sum(t.answered for t in tallies)} answered, {memory[-1] if memory else 0:.1f} MiB")
            seconds = time.monotonic() - started
        finally:
            stop.set()
            writer.join()
        after = counted(up.url)
    log = (folder / "log").read_text()
    if up.process.returncode:
        raise SystemExit(f"the server ended with exit code {up.process.returncode}: {log[-2000:]}")
    answered = sum(t.answered for t in tallies)
    events = Counter(json.loads(line)["event"] for line in log.splitlines() if line.startswith("{"))
    refused, cut = sum((t.refused for t in tallies), Counter[int]()), sum(t.cut for t in tallies)
    return {
        "requests": requests,
        "seconds": round(seconds, 1),
        "per_s": round(answered / seconds, 1),
        "answered": answered,
        "refused": {str(status): count for status, count in sorted(refused.items())},
        "cut": cut,
        "lost": requests // CONNECTIONS * CONNECTIONS - answered - cut - refused.total(),
        "duplicated": sum(t.foreign for t in tallies) + abs(after - before - answered),
        "wrong": sum(t.wrong for t in tallies),
        "closest": float(np.diff(np.sort(alone[:, -1])).min()),
        "events": dict(sorted(events.items())),
        "memory_mib": [round(m, 2) for m in memory],
        "growth": grown(np.array(memory)),
    }


def counted(url: str) -> int:
    """Requests over HTTP that the server counts as answered with 200, as its metrics say."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        round(float(line.split()[-1]))
        for line in lines
        if line.startswith('tlexport_requests_total{code="200",protocol="http"}')
    )


def _watched(pid: int, every_s: float, memory: list[float], stop: threading.Event) -> None:
    process = psutil.Process(pid)
    while not stop.wait(every_s):
        memory.append(process.memory_info().rss / 2**20)


def _rewritten(bundle: Path, every_s: float, stop: threading.Event) -> None:
    """The same bundle, written anew and put in place as package does it; a space makes its manifest another version's."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(bundle, Path(folder) / "bundle"))
        while not stop.wait(every_s):
            with (copy / manifest.NAME).open("a") as file:
                file.write(" ")
            with replacing(bundle) as partial:
                shutil.copytree(copy, partial, dirs_exist_ok=True)


def grown(memory: np.ndarray) -> dict[str, float | None]:
    """Median of the last fifth over that of the second fifth."""
    parts = np.array_split(memory, 5)
    blocks = [[part[i : i + BLOCK] for i in range(0, len(part), BLOCK)] for part in (parts[1], parts[4])]
    rng = np.random.default_rng(0)
    draws = []
    if min(map(len, blocks)) >= 3:
        for _ in range(1000):
            then, now = (
                np.median(np.concatenate([of[i] for i in rng.integers(len(of), size=len(of))]))
                for of in blocks
            )
            draws.append(now / then)
    return interval(float(np.median(parts[4]) / np.median(parts[1])), np.array(draws))


def main() -> None:
    parser = arguments("soak", __doc__ or "")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--reload", type=float, default=20.0, help="seconds between two versions")
    parser.add_argument("--work", type=Path, help="keep run and bundle here (default: a temporary directory)")
    options = parser.parse_args()
    started = time.monotonic()
    document = stamp("soak", parser, options)
    requests = 20_000 if options.quick else options.requests
    with tempfile.TemporaryDirectory() as folder:
        work: Path = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        reload_s, read_s = (2.0, 0.1) if options.quick else (options.reload, 1.0)
        found = soak(built(work), requests, reload_s, read_s, work / f"serve{time.time_ns()}")
    document["soak"] = found
    table(
        ("what", "found"),
        [(key, value) for key, value in found.items() if key not in ("memory_mib", "growth")],
    )
    goals = [
        goal("soak: answers lost", float(found["lost"]), 0.0, at_least=False),
        goal(
            "soak: answers given twice or to another",
            float(found["duplicated"] + found["wrong"]),
            0.0,
            at_least=False,
        ),
        goal("soak: memory at the end over the beginning", found["growth"], 1.02, at_least=False),
    ]
    finish(document, goals, destination("soak", options), started)


if __name__ == "__main__":
    main()
