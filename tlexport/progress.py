"""What a long piece of work tells the person who waits; the command line decides how it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Step = Callable[[int, int], None]  # (done, total)


class Progress(Protocol):
    """Passed down to stages. `say` is one line; `bar` yields a function to call with (done, total)."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def bar(self, label: str) -> AbstractContextManager[Step]: ...


class Silent:
    """Says nothing: the library's default."""

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, label: str) -> Iterator[Step]:
        yield lambda done, total: None
