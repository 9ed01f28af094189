"""What a long piece of work tells the person who waits; the command line decides how it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """Says how far a bar is; `doing` names what is being worked on, where that is worth a word."""

    def __call__(self, done: float, total: int, doing: str = "") -> None: ...


class Progress(Protocol):
    """Passed down to stages. `say` is one line; `bar` yields a function to call with (done, total).

    A `still` bar is drawn by that call alone, never in between: a thread that draws would be timed with what is measured.
    """

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def bar(self, label: str, *, still: bool = False) -> AbstractContextManager[Step]: ...


class Silent:
    """Says nothing: the library's default."""

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, label: str, *, still: bool = False) -> Iterator[Step]:
        yield _unseen


def printable(text: str) -> str:
    """The text with all that a terminal would obey, or an encoder refuse, written out: a bundle's words are anybody's."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _unseen(done: float, total: int, doing: str = "") -> None:
    pass


@contextmanager
def byte_bar(progress: Progress, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes; what it yields is called with the number of bytes just moved. It stays at rest if `total` is 0."""
    done = 0
    with progress.bar(label) as step:

        def advance(moved: int) -> None:
            nonlocal done
            done += moved
            if total:
                step(min(done, total), total, f"{done / 1e6:.1f} MB")

        yield advance
