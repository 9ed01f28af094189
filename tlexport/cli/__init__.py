"""The command line: parse, call one function, show. The only place that prints and exits."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import typer

from tlexport.cli import show
from tlexport.cli.app import app, recipes_app
from tlexport.cli.options import Output
from tlexport.errors import TlexportError

# isort: off
# Each adds its commands to the application; --help lists them in this order.
from tlexport.cli import training, building, evidence, bundles, serving, live, about  # noqa: F401

# isort: on

__all__ = ["Output", "app", "main", "recipes_app"]

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


def main() -> NoReturn:
    """Run the command line; every error becomes one line and its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    _open_streams()
    arguments = sys.argv[1:] or ["--help"]
    # A mistake in the arguments is found before the flag's callback runs.
    Output.as_json = "--json" in arguments
    try:
        # Typer hands back the code of an Exit, it does not raise it.
        code = app(arguments, standalone_mode=False)
    except TlexportError as error:
        _fail(str(error), type(error).__name__, error.exit_code)
    except _Terminated:
        _fail("terminated; the same command resumes", "Terminated", TERMINATED)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the one place where anything unforeseen ends as an exit code)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            _fail(error.format_message(), "UsageError", error.exit_code)
        _fail(*_unforeseen(error))
    if code == INTERRUPTED:
        _fail("interrupted; the same command resumes", "Interrupted", INTERRUPTED)
    sys.exit(code or 0)


def _open_streams() -> None:
    """What was closed (`>&-`) leads nowhere: else the next file that is opened gets its number, and what libraries print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        name = ("stdin", "stdout", "stderr")[number]
        setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    os.close(number)


def _unforeseen(error: Exception) -> tuple[str, str, int]:
    """A full disk or a lost permission is the user's to mend, wherever it happens; the rest is ours."""
    from tlexport.run import storage_errors

    try:
        with storage_errors(Path("the output")):
            raise error
    except TlexportError as known:
        return str(known), type(known).__name__, known.exit_code
    except Exception as unknown:  # noqa: BLE001
        return f"unexpected {type(unknown).__name__}: {unknown} (--debug shows where)", "Unexpected", 1


class _Terminated(BaseException):
    """A request to end, from SIGTERM; not an Exception, so that nothing on the way takes it for a failure."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _fail(message: str, kind: str, code: int) -> NoReturn:
    if Output.debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if Output.as_json:
        with contextlib.suppress(OSError):  # the error that is being told counts
            show.document({"error": message, "kind": kind, "exit_code": code})
    show.error(message)
    sys.exit(code)
