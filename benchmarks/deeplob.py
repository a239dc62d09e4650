"""``octick bench deeplob``: networks that others trained, quantised on recorded data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.provenance import VENUE, provenance, recorded
from feeds.errors import InputError

RECORDING: Final = Path("binance/usdm_btcusdt_20240808.gz")
WEIGHTS: Final = (Path("models/deeplob_btc_h10.npz"), Path("models/deeplob_btc_h50.npz"))


class DeepLobBench(msgspec.Struct, frozen=True):
    """A row for each network and setting; see `models.foreign.deeplob.measure_deeplob`."""

    rows: list[dict[str, Any]]
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_deeplob(*, progress: Callable[[str], Any] = lambda _: None) -> DeepLobBench:
    """Measure both networks under every setting.

    Raises
    ------
    InputError
        If the recording or the weights are not there.
    """
    from feeds.tape_reader import TapeReader
    from feeds.venues.convert import convert
    from models.dataset import collect
    from models.foreign.deeplob import CHOSEN, SETTINGS, measure_deeplob

    files = [recorded(path) for path in (RECORDING, *WEIGHTS)]
    raw, *weights = files
    if raw is None or None in weights:
        raise InputError(
            "the recording or the weights are not there",
            where="OCTICK_DATA",
            expected=", ".join(str(path) for path in (RECORDING, *WEIGHTS)),
        )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        tape = Path(folder) / "recording.tape"
        progress("converting the recording")
        convert(raw, VENUE, out=tape)
        reader = TapeReader(tape)
        rows = collect(reader.chunks(), reader.meta.instruments)
    for path in weights:
        assert path is not None
        progress(f"measuring {path.name}")
        measured = measure_deeplob(path, rows, settings=(CHOSEN, *SETTINGS))
        for item in measured["settings"]:
            found.append(
                {
                    "network": path.stem,
                    "windows": measured["windows"],
                    "observer": item["observer"],
                    "kept": ",".join(item["exclude"]),
                    "agreement": item["agreement"],
                    "size_ratio": item["size_ratio"],
                    "int8_nodes": item["int8_nodes"],
                    "p50_us_int8": item["int8_us"][0],
                    "p50_us_fp32": measured["fp32_us"][0],
                }
            )
    return DeepLobBench(found, **provenance())
