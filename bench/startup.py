"""How long `tlexport --help` takes beside importing the library that parses its command line.

Twenty pairs of fresh processes of the same interpreter, in turns; at most five minutes, usually half of one.
Result: `tlexport_s` and `typer_s` (seconds of every call) and `ratio` {ratio, low, high, pairs}.
"""

from __future__ import annotations

import subprocess
import sys
import time

from common import ROOT, arguments, destination, finish, goal, pair_ratio, say, shown, stamp, table

COMMANDS = {
    "tlexport": [sys.executable, "-m", "tlexport", "--help"],
    "typer": [sys.executable, "-c", "import typer"],
}
TIMEOUT = 7.0  # of one call: 42 calls stay below five minutes
LIMIT = 2.0


def seconds_of(name: str) -> float:
    started = time.perf_counter()
    try:
        done = subprocess.run(
            COMMANDS[name], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{' '.join(COMMANDS[name][1:])} took more than {TIMEOUT:g} s") from None
    elapsed = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(COMMANDS[name][1:])} failed: {done.stderr.strip()[-500:]}")
    return elapsed


def main() -> None:
    parser = arguments("startup", __doc__ or "")
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("startup", parser, options)
    pairs = 2 if options.quick else options.pairs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for name in COMMANDS:
        seconds_of(name)  # writes bytecode and warms the file cache
    for pair in range(pairs):
        for name in list(COMMANDS) if pair % 2 else reversed(COMMANDS):
            times[name].append(round(seconds_of(name), 5))
        say(f"pair {pair + 1}/{pairs}: " + ", ".join(f"{name} {of[-1]:.3f} s" for name, of in times.items()))
    found = pair_ratio(times["tlexport"], times["typer"])
    document |= {"tlexport_s": times["tlexport"], "typer_s": times["typer"], "ratio": found}
    middle = {name: sorted(of)[len(of) // 2] for name, of in times.items()}
    table(
        ["call", "median s"],
        [
            ["tlexport --help", f"{middle['tlexport']:.3f}"],
            ["import typer", f"{middle['typer']:.3f}"],
            ["ratio", shown(found)],
        ],
    )
    goals = [goal("tlexport --help over import typer, wall time", found, LIMIT, at_least=False)]
    finish(document, goals, destination("startup", options), started)


if __name__ == "__main__":
    main()
