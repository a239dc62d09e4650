"""Where tests find recorded market data: OCTICK_DATA, else ``shared/data`` by the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of recorded market data, or a skip that says how to name it."""
    folder = Path(os.environ.get("OCTICK_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no recorded market data in {folder}; set OCTICK_DATA to where it is")
    return folder


@pytest.fixture(scope="session")
def reference_bundle() -> Path:
    """Folder of the shipped reference model."""
    return ROOT / "models" / "reference"
