"""The market that figures are measured on: the recording where it is, else a simulated one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.provenance import RECORDING, VENUE, recorded

SIMULATED_MESSAGES: Final = 200_000
SIMULATED_SEED: Final = 1


@contextmanager
def source_tape(given: Path | None) -> Iterator[tuple[Path, str]]:
    """A given tape, or the default one for as long as it is needed; and what it holds."""
    if given is not None:
        yield given, "given"
        return
    with tempfile.TemporaryDirectory(prefix="octick-bench-") as folder:
        yield default_tape(Path(folder))


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
