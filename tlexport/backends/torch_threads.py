"""torch has one pool of threads for the whole process, so that runners side by side each claim it before they compute."""

from __future__ import annotations

from collections.abc import Callable


def claim(threads: int) -> Callable[[], None]:
    """A call that gives torch `threads` threads if it has another number: asking takes a tenth of a microsecond."""
    import torch

    found, change = torch.get_num_threads, torch.set_num_threads

    def give() -> None:
        if found() != threads:
            change(threads)

    return give
