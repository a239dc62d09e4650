"""The market that figures are measured on: the recording where it is, else a simulated one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.provenance import RECORDING, VENUE, recorded

SIMULATED_MESSAGES: Final = 200_000
SIMULATED_SEED: Final = 1


def default_tape(folder: Path) -> tuple[Path, str]:
    """Make a tape in a folder; returns it and what it holds."""
    recording = recorded(RECORDING)
    if recording is not None:
        from feeds.venues.convert import convert

        target = folder / "recording.tape"
        convert(recording, VENUE, out=target)
        return target, recording.name
    from feeds.simulator import Simulator

    target = folder / "simulated.tape"
    Simulator(seed=SIMULATED_SEED, n_instruments=1).write_tape(target, SIMULATED_MESSAGES)
    return target, f"simulator seed={SIMULATED_SEED}"
