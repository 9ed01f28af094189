"""Fixtures shared by all tests: real data and weights that stand beside the checkout where there are any."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pipeline import RTX, SMALL, Built, Ended

if TYPE_CHECKING:
    from tlexport.run import Run

# A job that a shell starts in the background has SIGINT ignored and hands that down; the tests interrupt for real.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(os.environ.get("TLEXPORT_SHARED", Path(__file__).parents[2] / "shared"))


def _beside(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs real data in {name}/ of a folder named by TLEXPORT_SHARED")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _beside("data")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    return _beside("weights")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    import torch

    import tlexport
    from tlexport.progress import Silent
    from tlexport.stages import bench, compile, export, package, quantize, report, verify

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("built")
    targets = ("cpu", "sm89") if RTX else ("cpu",)
    run = tlexport.finetune(
        "digits-quickstart", out=folder / "run", overrides=[*SMALL, f"targets=[{', '.join(targets)}]"]
    )
    before = {}

    def snapshot(stage: str) -> None:
        before[stage] = Path(shutil.copytree(run.path, folder / f"before-{stage}" / "run"))

    for stage in (export, quantize, compile, verify, bench):
        snapshot(stage.__name__.rpartition(".")[2])
        stage.run(run, run.recipe, Silent())
    report.run(run, run.recipe, Silent())
    snapshot("package")
    package.run(run, run.recipe, Silent(), out=folder / "bundle")
    return Built(run.path, folder / "bundle", before, targets)


@pytest.fixture
def run_copy(built: Built, tmp_path: Path) -> Run:
    """A finished run to change at will."""
    from tlexport.run import Run

    return Run(shutil.copytree(built.run, tmp_path / "run"))


@pytest.fixture
def bundle_copy(built: Built, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.bundle, tmp_path / "bundle"))


@pytest.fixture
def tlx(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ended]]:
    """Run a command line in this process, through the same `main` as the console script."""
    from tlexport.cli import Output, main

    def call(*arguments: object) -> Ended:
        for flag in ("as_json", "quiet", "debug"):
            setattr(Output, flag, False)
        monkeypatch.setattr(sys, "argv", ["tlexport", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return Ended(int(stop.value.code or 0), out, err)

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)
