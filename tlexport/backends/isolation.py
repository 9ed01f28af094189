"""Run a function in a fresh child process: a compiler that crashes or hangs takes nothing down with it.

The child is a plain interpreter, not a fork and not multiprocessing's spawn: it never imports the caller's
`__main__`, so a user's script needs no guard. Whatever it prints is captured and only shown if it dies.
The pipe between the two carries one task, then any number of reports on how far it is, then one answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any, TypeVar, cast

from tlexport.errors import BackendCrash, CompileError, TlexportError

T = TypeVar("T")
Report = Callable[[str, float], None]  # (phase, share of the work that is done, 0 to 1)

_CHILD = "import sys; sys.path[:] = sys.argv[3:]; from tlexport.backends.isolation import _serve; _serve()"
_TAIL_LINES = 12
_REPORT = "report"
_PR_SET_PDEATHSIG = 1  # prctl(2)


class _InChild(Exception):
    """Carries the child's traceback, to be shown with --debug."""


class _TooLate(Exception):
    """The time is up. `phase` is the last that was reported."""

    def __init__(self, phase: str) -> None:
        super().__init__(phase)
        self.phase = phase


def call(
    function: Callable[..., T],
    *args: Any,
    timeout: float,
    what: str,
    limit: str = "",
    progress: Report | None = None,
) -> T:
    """Return `function(*args)`, computed in a child process. `function` must be importable (module level).

    `timeout` is in seconds, `limit` names the setting it comes from, and `what` names the work in messages
    ("compiling int8.onnx for sm89"). With `progress` the function gets a Report as one more argument, whose calls
    are made here, in their order. A TlexportError of the child is raised here as it was. Raises BackendCrash if the
    child is killed by a signal, ends without an answer, or has not answered in time however much it reports, and
    CompileError for any other exception in it.
    """
    pipe, theirs = Pipe()
    with pipe, tempfile.TemporaryFile() as output:
        child = _start(theirs, output)
        try:
            verdict, value = _answer(pipe, (function, args, progress), timeout)
        except _TooLate as late:
            raise BackendCrash(
                f"{what} gave no answer within {timeout:g} s{f' ({limit})' if limit else ''} and was stopped"
                f"{f' at {late.phase!r}' if late.phase else ''}; allow it more time or leave it out{_tail(output)}"
            ) from None
        except (EOFError, ConnectionError):
            raise BackendCrash(f"{what} {_death(child.wait())}{_tail(output)}") from None
        finally:
            _kill(child)
    return cast(T, _unpack(verdict, value, what))


def _answer(
    pipe: Connection, task: tuple[Callable[..., Any], tuple[Any, ...], Report | None], timeout: float
) -> tuple[str, Any]:
    """Send the task, pass its reports on, return the first message that is none. Raises _TooLate and what a pipe raises."""
    function, args, progress = task
    deadline = time.monotonic() + timeout
    pipe.send((function.__module__, function.__qualname__, args, progress is not None))
    phase = ""
    while (left := deadline - time.monotonic()) > 0 and pipe.poll(left):
        kind, value = pipe.recv()
        if kind != _REPORT:
            return kind, value
        phase, share = value
        if progress is not None:
            progress(phase, share)
    raise _TooLate(phase)


def _start(pipe: Connection, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """The child, in a process group of its own, with the other end of the pipe, which is closed here."""
    with pipe:
        descriptor = pipe.fileno()
        return subprocess.Popen(
            [
                sys.executable,
                "-X",
                "faulthandler",
                "-c",
                _CHILD,
                str(descriptor),
                str(os.getpid()),
                *sys.path,
            ],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _unpack(verdict: str, value: Any, what: str) -> Any:
    if verdict == "error":
        raise _revive(*value)
    if verdict == "bug":
        summary, trace = value
        raise CompileError(f"{what} failed: {summary}") from _InChild(trace)
    return value


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} before it answered"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"died with {signal.Signals(-code).name}{hint}"


def _tail(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return "; its last lines:\n  " + "\n  ".join(lines[-_TAIL_LINES:]) if lines else "; it printed nothing"


def _revive(kind: type[TlexportError], args: tuple[Any, ...], state: dict[str, Any]) -> TlexportError:
    """The child's error again. Built without __init__, whose parameters need not be the message."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


def _serve() -> None:
    """The child's whole life: read a task from the pipe, answer, end."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    pipe = Connection(descriptor)
    module, name, args, reports = pipe.recv()
    if reports:
        args = (*args, _reporter(pipe))
    try:
        answer: tuple[str, Any] = ("value", getattr(importlib.import_module(module), name)(*args))
    except TlexportError as error:
        answer = ("error", (type(error), error.args, error.__dict__))
    except Exception as error:  # noqa: BLE001  not swallowed: the parent raises it
        answer = ("bug", (f"{type(error).__name__}: {error}", traceback.format_exc()))
    pipe.send(answer)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # the answer is out; a library that crashes while it unloads must not matter


def _reporter(pipe: Connection) -> Report:
    """A Report that writes to the pipe; a library may call it from several threads."""
    lock = threading.Lock()

    def report(phase: str, share: float) -> None:
        with lock:
            pipe.send((_REPORT, (phase, share)))

    return report


def _die_with(parent: int) -> None:
    """Have Linux kill this process when its parent goes, however it goes."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked
        os._exit(1)
