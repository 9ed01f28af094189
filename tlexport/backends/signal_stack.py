"""The stack that this thread's signals are handled on, kept as it is while a library does its own."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class _Stack(ctypes.Structure):
    """stack_t of sigaltstack(2) on Linux."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put back at the end what sigaltstack(2) had at the start.

    On CPUs with wide registers each compiled model of OpenVINO's installs an alternate stack, and puts back the one before it when
    it goes. Where models do not go in the opposite order they came in, that is one whose memory was freed, and the next signal that
    Python handles (Ctrl-C, SIGTERM) ends the process with SIGSEGV. A model whose stack is not installed leaves it alone.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
