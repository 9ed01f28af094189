from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tlexport.backends.isolation import Report, call
from tlexport.errors import BackendCrash, CompileError, NotInstalledError, TlexportError


def product(a: int, b: int) -> int:
    print("noise on standard output")
    return a * b


def large(n: int) -> np.ndarray:
    return np.arange(n)


def segfault() -> None:
    print("the last words", file=sys.stderr, flush=True)
    ctypes.string_at(0)


def hang(marker: Path) -> None:
    marker.write_text(str(os.getpid()))
    time.sleep(600)


def refuse() -> None:
    raise CompileError("the graph is refused")


def lack() -> None:
    raise NotInstalledError("backend 'x'", "extra")


def bug() -> None:
    {}["missing"]


def leave() -> None:
    os._exit(7)


def modules() -> list[str]:
    return sorted(sys.modules)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_value_comes_back_and_nothing_is_printed(capfd) -> None:
    assert call(product, 6, 7, timeout=60, what="multiplying") == 42
    assert capfd.readouterr() == ("", "")


def test_a_large_value_comes_back() -> None:
    assert call(large, 3_000_000, timeout=60, what="counting").sum() == 3_000_000 * 2_999_999 // 2


def test_a_segfault_is_named_with_the_last_words() -> None:
    with pytest.raises(BackendCrash, match=r"crashing died with SIGSEGV(.|\n)*the last words"):
        call(segfault, timeout=60, what="crashing")


def test_a_hang_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(BackendCrash, match="hanging gave no answer within 3 s"):
        call(hang, tmp_path / "pid", timeout=3, what="hanging")
    assert time.monotonic() - start < 30
    assert not alive(int((tmp_path / "pid").read_text()))


def test_an_exit_without_answer_is_a_crash() -> None:
    with pytest.raises(BackendCrash, match="ended with exit code 7"):
        call(leave, timeout=60, what="leaving")


def test_our_errors_pass_through() -> None:
    with pytest.raises(CompileError, match=r"^the graph is refused$") as caught:
        call(refuse, timeout=60, what="refusing")
    assert not isinstance(caught.value, BackendCrash)
    with pytest.raises(NotInstalledError, match="pip install") as missing:
        call(lack, timeout=60, what="lacking")
    assert missing.value.extra == "extra" and missing.value.exit_code == 5


def test_other_errors_keep_the_childs_traceback() -> None:
    with pytest.raises(TlexportError, match="looking failed: KeyError: 'missing'") as caught:
        call(bug, timeout=60, what="looking")
    assert "in bug" in str(caught.value.__cause__)


def test_the_child_loads_no_torch() -> None:
    loaded = call(modules, timeout=60, what="listing")
    assert "tlexport.errors" in loaded and "torch" not in loaded and "onnx" not in loaded


# A job that a shell starts in the background has SIGINT ignored, and hands that down: the parent takes it back.
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
sys.path[:] = {path!r}
from test_isolation import hang
from tlexport.backends.isolation import call
call(hang, Path({marker!r}), timeout=600, what="hanging")
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_its_parent(tmp_path: Path, sent: signal.Signals) -> None:
    marker = tmp_path / "pid"
    code = PARENT.format(path=[str(Path(__file__).parent), *sys.path], marker=str(marker))
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: marker.exists() and marker.read_text().isdigit())
        child = int(marker.read_text())
        assert alive(child)
        parent.send_signal(sent)
        parent.wait(20)
        assert wait_for(lambda: not alive(child))
    finally:
        parent.kill()
        parent.wait()


def test_a_child_that_starts_after_its_parent_is_gone_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tlexport.backends.isolation import _die_with; _die_with(1 << 22); print('lived')",
        ],
        capture_output=True,
        check=False,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 1 and done.stdout == ""


def test_calls_from_several_threads_do_not_mix() -> None:
    found: dict[int, int] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: call(product, n, n, timeout=60, what="x")}))
        for n in (2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {2: 4, 3: 9}


def count(steps: int, report: Report) -> int:
    for step in range(steps):
        report(f"step {step}", step / steps)
    return steps


def crash_midway(report: Report) -> None:
    report("halfway", 0.5)
    segfault()


def stop_midway(marker: Path, report: Report) -> None:
    report("timing kernels", 0.25)
    hang(marker)


def never_end(report: Report) -> None:
    while True:
        report("again", 0.5)


def report_from_threads(report: Report) -> None:
    threads = [
        threading.Thread(target=lambda n=n: [report(f"{n}" * 5000, n) for _ in range(50)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_reports_arrive_in_order_and_before_the_answer() -> None:
    heard: list[tuple[str, float]] = []
    made = call(count, 2000, timeout=60, what="counting", progress=lambda *report: heard.append(report))
    assert made == 2000 and heard == [(f"step {step}", step / 2000) for step in range(2000)]


def test_reports_of_several_threads_do_not_mix() -> None:
    heard: list[tuple[str, float]] = []
    call(report_from_threads, timeout=60, what="x", progress=lambda *report: heard.append(report))
    assert len(heard) == 200 and all(phase == f"{share:g}" * 5000 for phase, share in heard)


def test_without_a_listener_the_function_is_called_as_it_is() -> None:
    with pytest.raises(CompileError, match="missing 1 required positional argument: 'report'"):
        call(count, 3, timeout=60, what="counting")


def test_a_crash_after_reports_is_a_crash() -> None:
    heard: list[str] = []
    with pytest.raises(BackendCrash, match=r"died with SIGSEGV(.|\n)*the last words"):
        call(crash_midway, timeout=60, what="crashing", progress=lambda phase, share: heard.append(phase))
    assert heard == ["halfway"]


def test_a_hang_after_reports_is_ended_and_names_the_phase_and_the_limit(tmp_path: Path) -> None:
    words = r"within 3 s \(compile\.timeout\) and was stopped at 'timing kernels'"
    with pytest.raises(BackendCrash, match=words):
        call(
            stop_midway,
            tmp_path / "pid",
            timeout=3,
            what="hanging",
            limit="compile.timeout",
            progress=lambda phase, share: None,
        )
    assert not alive(int((tmp_path / "pid").read_text()))


def test_reports_without_end_do_not_extend_the_time() -> None:
    with pytest.raises(BackendCrash, match="within 2 s and was stopped at 'again'"):
        call(never_end, timeout=2, what="reporting", progress=lambda phase, share: None)


def test_a_listener_that_fails_ends_the_child(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        call(stop_midway, tmp_path / "pid", timeout=60, what="x", progress=lambda phase, share: 1 / 0)
    assert not (tmp_path / "pid").exists() or not alive(int((tmp_path / "pid").read_text() or 0))
