"""The signal stack stays the process's own, whatever a library does with it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

from tlexport.backends import signal_stack

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sigaltstack is looked at on Linux"
)


class Stack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def current() -> tuple[int | None, int, int]:
    held = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(held)) == 0
    return held.sp, held.flags, held.size


def test_what_was_installed_meanwhile_is_taken_back() -> None:
    memory = ctypes.create_string_buffer(1 << 16)
    planted = Stack(ctypes.addressof(memory), 0, len(memory))
    before = current()
    with signal_stack.kept():
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(planted), None) == 0
        assert current()[0] == ctypes.addressof(memory) != before[0]
    assert current() == before
    with pytest.raises(ValueError, match="planted"), signal_stack.kept():
        ctypes.CDLL(None).sigaltstack(ctypes.byref(planted), None)
        raise ValueError("planted")
    assert current() == before


def test_a_signal_after_models_of_openvino_have_gone_is_handled(tmp_path: Path) -> None:
    """On the CPUs where OpenVINO installs stacks of its own; elsewhere nothing was ever wrong."""
    pytest.importorskip("openvino")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "g.onnx",
    )
    code = (
        "import os, signal\nfrom contextlib import ExitStack\nfrom pathlib import Path\nfrom tlexport.backends import ov\n"
        "first, second = ExitStack(), ExitStack()\n"
        "a = first.enter_context(ov.runner(Path('g.onnx'), threads=1))\n"
        "b = second.enter_context(ov.runner(Path('g.onnx'), threads=1))\n"
        "first.close(); del a\nsecond.close(); del b\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    signal.pause()\nexcept KeyboardInterrupt:\n    print('handled')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr
