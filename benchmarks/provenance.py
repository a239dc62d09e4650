"""What every figure is quoted with: machine, versions, commit; and what it is measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
REFERENCE: Final = ROOT / "models" / "reference"
RECORDING: Final = Path("binance") / "usdm_btcusdt_20240808.gz"
VENUE: Final = "binance-usdm"
PACKAGES: Final = ("numba", "numpy", "onnxruntime", "llvmlite")


def recorded(path: Path) -> Path | None:
    """A recording below ``OCTICK_DATA`` (``shared/data`` by the checkout), if any."""
    data = Path(os.environ.get("OCTICK_DATA", ROOT.parent / "shared" / "data"))
    return data / path if (data / path).is_file() else None


def machine() -> dict[str, str | int]:
    """What was measured on."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": name,
        "cores": os.cpu_count() or 0,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions(further: Sequence[str] = ()) -> dict[str, str]:
    """Versions of the packages that decide the speed, and of ``further`` ones."""
    found = {}
    for name in (*PACKAGES, *further):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """Commit of the checkout, with ``-dirty`` where it has changes; "" outside one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def provenance(further: Sequence[str] = ()) -> dict[str, Any]:
    """What a result says of itself: machine, versions, commit and date.

    Parameters
    ----------
    further : sequence of str
        Packages whose versions count here, beside those that always do.
    """
    return {
        "machine": machine(),
        "versions": versions(further),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
