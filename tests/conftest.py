"""Fixtures shared by all tests: real data and weights that stand beside the checkout where there are any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
