"""What can go wrong, and the exit code a script sees.

TlexportError             1   anything not named below
├── RecipeError           2   the recipe or the command line asks for something that does not exist
├── DataError             3   the data cannot be read, split or trusted
│   └── LeakageError      3   a group or an image stands on both sides of a split
├── WeightsError          4   pretrained weights are missing, unsafe or do not fit
├── NotInstalledError     5   an optional extra is needed
│   └── NoCompilerError   5   a C++ compiler is needed
├── RunError              6   the run directory lacks a stage, is busy or was changed by hand
├── StorageError          7   the disk is full or the directory is not writable
├── ExportError           8   the graph cannot be made, or does not agree with the reference
├── CompileError          9   a backend refused the graph or the target
│   ├── ReceiptError      9   the engine's real precisions are not what was asked
│   └── BackendCrash      9   the compiler or runtime died or hung in its own process
├── GateError             10  measured, and over the limit the recipe states
│   ├── LatencyGateError  13  too slow: over a limit, or slower than the baseline
│   └── UndecidedError    14  too few samples, or too noisy a machine, to tell
├── BundleError           11  the bundle is incomplete, altered or has no passing verdict
│   └── PreflightError    11  the bundle may not be trusted, or cannot run here: every reason with its kind
├── TrainingError         12  fine-tuning diverged or cannot be judged
└── ServerError           15  a server cannot be reached, or does not speak the protocol
    └── ListenError       15  an address cannot be listened on

Exit code 130 is an interrupt (Ctrl-C), 143 a termination request: the run resumes with the same command.
Each message says what happened, what was available and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlexport.results import Refusal

__all__ = [
    "BackendCrash",
    "BundleError",
    "CompileError",
    "DataError",
    "ExportError",
    "GateError",
    "LatencyGateError",
    "LeakageError",
    "ListenError",
    "NoCompilerError",
    "NotInstalledError",
    "PreflightError",
    "ReceiptError",
    "RecipeError",
    "RunError",
    "ServerError",
    "StorageError",
    "TlexportError",
    "TrainingError",
    "UndecidedError",
    "WeightsError",
]


class TlexportError(Exception):
    """Base of every error the tool raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class RecipeError(TlexportError):
    exit_code = 2


class DataError(TlexportError):
    exit_code = 3


class LeakageError(DataError):
    pass


class WeightsError(TlexportError):
    exit_code = 4


class NotInstalledError(TlexportError):
    """An optional part is missing. `extra` is the name to install with pip."""

    exit_code = 5

    def __init__(self, what: str, extra: str, available: str = "") -> None:
        have = f" ({available})" if available else ""
        super().__init__(f"{what} is not installed; pip install 'tlexport[{extra}]'{have}")
        self.extra = extra


class NoCompilerError(NotInstalledError):
    """`what` compiles C++ and this machine has no compiler; pip brings none."""

    ADVICE = "install g++ (apt install g++, dnf install gcc-c++) or name another compiler in the variable CXX"

    def __init__(self, what: str) -> None:
        TlexportError.__init__(self, f"{what} needs a C++ compiler and found none; {self.ADVICE}")
        self.extra = ""


class RunError(TlexportError):
    exit_code = 6


class StorageError(TlexportError):
    exit_code = 7


class ExportError(TlexportError):
    exit_code = 8


class CompileError(TlexportError):
    exit_code = 9


class ReceiptError(CompileError):
    pass


class BackendCrash(CompileError):
    pass


class GateError(TlexportError):
    exit_code = 10


class LatencyGateError(GateError):
    exit_code = 13


class UndecidedError(GateError):
    exit_code = 14


class BundleError(TlexportError):
    exit_code = 11


class PreflightError(BundleError):
    """A bundle is not loaded. `refusals` are all the reasons, those against trust before those against this machine."""

    def __init__(self, bundle: object, refusals: tuple[Refusal, ...]) -> None:
        self.refusals = refusals
        what = "may not be trusted" if self.untrusted else "cannot run here"
        shown = "; ".join(refusal.reason for refusal in refusals[:5])
        more = f" and {len(refusals) - 5} more" if len(refusals) > 5 else ""
        super().__init__(f"{bundle} {what}: {shown}{more}")

    @property
    def untrusted(self) -> bool:
        """Whether any reason is about what the bundle is, and not about this machine."""
        return any(refusal.untrusted for refusal in self.refusals)


class TrainingError(TlexportError):
    exit_code = 12


class ServerError(TlexportError):
    """`timed_out`: it was reached, and did not answer within the client's own limit."""

    exit_code = 15

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class ListenError(ServerError):
    pass
