"""``octick bench backends``: every backend that runs here, on the same models, in the same rounds.

Latency at batch 1, throughput, size, power where a counter is, and how many of some thousand
answers were not the reference's bits. With rivals: what ONNX Runtime and OpenVINO do with the same
graphs, timed in turn with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx

from benchmarks.agreement import Agreement, hold_against, write_script
from benchmarks.contest import Lane, Timing, time_in_turn
from benchmarks.power import Power, counter_of
from benchmarks.provenance import provenance
from benchmarks.rivals import Rival, open_rivals
from engine.backends.compiled.isa import DEVICE, ISAS
from engine.backends.hard_inputs import hard_inputs, input_steps
from engine.backends.interface import Backend, BackendInfo
from engine.backends.onnx_providers import PROVIDERS
from engine.backends.registry import backend_names, default_device, open_backend
from engine.bundle import Bundle, load_bundle
from engine.jitter import Jitter, measure_jitter
from feeds.errors import InputError

JITTER_S: Final = 1.0
TIMED_ROWS: Final = 256
RIVAL: Final = "rival"
# Others are tried on their default device alone.
DEVICES: Final = {
    "compiled": tuple(f"{DEVICE}:{isa.name}" for isa in ISAS),
    "onnx": tuple(PROVIDERS),
}
LEFT_OUT: Final = frozenset({"split"})  # its device names a layer of one model


class BackendBench(msgspec.Struct, frozen=True, kw_only=True):
    """One backend on one device with one model; a rival's ``backend`` begins with "rival".

    Attributes
    ----------
    backend, device, model : str
    numerics : str
        What it calls itself, "exact-int8" or "tolerance"; of a rival "int8" or "float32"; empty
        where it did not open.
    precision, isa, library : str
    reason : str
        Why it did not open; empty where it did.
    p50_us, p99_us, per_s : float or None
        See `benchmarks.contest.Timing`.
    vectors, disagreements, mask_disagreements : int
        See `benchmarks.agreement.Agreement`.
    size_bytes : int
        Of the model file, value check included; a rival's without.
    power : Power
    ratio : float or None
        Its p50 over that of the fastest rival; below 1 it is faster.
    empty_us : float
        p50 of a call that does nothing, in the same rounds: it is in every figure above.
    rounds : int
    jitter : Jitter
        Gaps of a loop that only reads the clock, on the same machine right after.
    machine, versions, commit, date
    """

    backend: str
    device: str
    model: str
    numerics: str = ""
    precision: str = "int8"
    isa: str = ""
    library: str = ""
    reason: str = ""
    p50_us: float | None = None
    p99_us: float | None = None
    per_s: float | None = None
    vectors: int = 0
    disagreements: int = 0
    mask_disagreements: int = 0
    size_bytes: int = 0
    power: Power = Power("")
    ratio: float | None = None
    empty_us: float = 0.0
    rounds: int
    jitter: Jitter
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str

    @property
    def ok(self) -> bool:
        """Whether it keeps what it calls itself."""
        exact = self.numerics == "exact-int8"
        return not (exact and (self.disagreements or self.mask_disagreements))


@dataclass
class _Entry:
    """A contestant: what is said of it, and its lanes."""

    facts: dict[str, Any]
    lane_of: Callable[[int], Lane] | None = None
    backend: Backend | None = None
    agreement: Agreement = field(default_factory=lambda: Agreement(0, 0, 0))
    timing: Timing | None = None


def candidates(only: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Backends and devices to try.

    Parameters
    ----------
    only : iterable of str
        "NAME" or "NAME/DEVICE"; all that are registered where it is empty.

    Raises
    ------
    InputError
        If no backend has such a name.
    """
    known = backend_names()
    found = []
    for text in only or [name for name in known if name not in LEFT_OUT]:
        name, slash, device = text.partition("/")
        if name not in known:
            raise InputError(
                "unknown backend",
                where="--backend",
                expected="one of " + ", ".join(known) + ", or NAME/DEVICE",
                found=repr(text),
            )
        devices = (device,) if slash else DEVICES.get(name, (default_device(name),))
        found += [(name, device) for device in devices]
    return found


def backend_lane(backend: Backend, stream: int) -> Lane:
    """A stream of a backend, its two arrays always the same."""
    info = backend.info()
    x = np.zeros(info.input_shape, dtype=np.float32)
    out = np.zeros(info.output_shape, dtype=np.float32)
    return Lane(
        x, out, (partial(backend.infer, stream, x, out),), partial(backend.reset, stream), True
    )


def bench_backends(
    bundles: Sequence[Path],
    rounds: int,
    vectors: int,
    *,
    only: Sequence[str] = (),
    rivals: bool = False,
    progress: Callable[[str, float], Any] = lambda stage, share: None,
) -> list[BackendBench]:
    """Measure backends on bundles.

    Parameters
    ----------
    bundles : sequence of Path
    rounds : int
        Of timing.
    vectors : int
        Answers to hold against the reference.
    only : sequence of str
        See `candidates`.
    rivals : bool
        Time other libraries in the same rounds.
    progress : callable
        Takes the stage and its share done.

    Raises
    ------
    InputError
        If a bundle cannot be read, or a backend is named that is none.
    """
    tried = candidates(only)
    measured = []
    for path in bundles:
        bundle = load_bundle(path)
        measured.append(_contest(bundle, tried, rounds, vectors, rivals, progress))
    jitter = measure_jitter(JITTER_S)
    said = {"rounds": rounds, "jitter": jitter, **provenance()}
    return [_row(entry, entries, said) for entries in measured for entry in entries]


def _contest(
    bundle: Bundle,
    tried: Sequence[tuple[str, str]],
    rounds: int,
    vectors: int,
    rivals: bool,
    progress: Callable[[str, float], Any],
) -> list[_Entry]:
    """One model: open, hold against the reference, time in turn, close."""
    script = write_script(
        bundle,
        vectors,
        progress=lambda share: progress(f"{bundle.name}: the reference answers", share),
    )
    entries = []
    for number, (name, device) in enumerate(tried):
        progress(f"{bundle.name}: opening {name} {device}", number / len(tried))
        entries.append(_opened(bundle, name, device))
    if rivals:
        progress(f"{bundle.name}: opening rivals", 0.0)
        entries += _rivals(bundle)
    for number, entry in enumerate(entries):
        progress(f"{bundle.name}: against the reference", number / len(entries))
        if entry.lane_of is not None and entry.facts["precision"] == "int8":
            # The graph is the same for all: where it is exact, only its bits agree.
            exact = bundle.numerics == "exact-int8"
            entry.agreement = hold_against(script, entry.lane_of, exact=exact)
    racing = [entry for entry in entries if entry.lane_of is not None]
    lanes = [entry.lane_of(0) for entry in racing if entry.lane_of is not None]
    *timings, empty = time_in_turn(
        [*lanes, empty_lane(bundle)],
        timed_rows(bundle),
        rounds,
        counters=[*(counter_of(entry.facts["device"]) for entry in racing), None],
        progress=lambda share: progress(f"{bundle.name}: timing in turn", share),
    )
    for entry, timing in zip(racing, timings, strict=True):
        entry.timing = timing
        entry.facts["empty_us"] = empty.p50_us
    for entry in entries:
        if entry.backend is not None:
            entry.backend.close()
        entry.lane_of = entry.backend = None
    return entries


def empty_lane(bundle: Bundle) -> Lane:
    """A call that does nothing: what timing one costs."""

    def nothing() -> None:
        pass

    x = np.zeros((1, bundle.n_features), dtype=np.float32)
    return Lane(x, np.zeros(bundle.n_outputs, dtype=np.float32), (nothing,), nothing)


def timed_rows(bundle: Bundle) -> np.ndarray:
    """Inputs that a bundle's contestants take in turn, float32 of shape (rows, features)."""
    model = onnx.load_model_from_string(bundle.model_bytes("int8"))
    steps = input_steps(model, bundle.input_name, bundle.clip)
    drawn = hard_inputs(np.random.default_rng(1), (1, bundle.n_features), bundle.clip, steps)
    return np.concatenate([next(drawn) for _ in range(TIMED_ROWS)])


def _opened(bundle: Bundle, name: str, device: str) -> _Entry:
    facts: dict[str, Any] = {"backend": name, "device": device, "model": bundle.name}
    try:
        backend = open_backend(name, bundle, device)
    except InputError as error:
        return _Entry({**facts, "reason": str(error)})
    info: BackendInfo = backend.info()
    size = len(bundle.model_bytes(info.precision))
    for key in ("numerics", "precision", "isa", "library"):
        facts[key] = getattr(info, key)
    return _Entry({**facts, "size_bytes": size}, partial(backend_lane, backend), backend)


def _rivals(bundle: Bundle) -> list[_Entry]:
    found, refused = open_rivals(bundle)
    entries = [_Entry(_rival_facts(bundle, rival), rival.lane_of) for rival in found]
    for name, reason in refused.items():
        facts = {"backend": f"{RIVAL} {name}", "device": "cpu", "model": bundle.name}
        entries.append(_Entry({**facts, "reason": reason}))
    return entries


def _rival_facts(bundle: Bundle, rival: Rival) -> dict[str, Any]:
    return {
        "backend": f"{RIVAL} {rival.name}",
        "device": "cpu",
        "model": bundle.name,
        "numerics": "int8" if rival.precision == "int8" else "float32",
        "precision": rival.precision,
        "library": rival.library,
        "size_bytes": rival.size_bytes,
    }


def _row(entry: _Entry, entries: Sequence[_Entry], said: dict[str, Any]) -> BackendBench:
    best = min(
        (
            other.timing.p50_us
            for other in entries
            if other.timing is not None and other.facts["backend"].startswith(RIVAL)
        ),
        default=None,
    )
    row = BackendBench(**entry.facts, **said, **msgspec.structs.asdict(entry.agreement))
    timing = entry.timing
    if timing is None:
        return row
    return msgspec.structs.replace(
        row,
        p50_us=timing.p50_us,
        p99_us=timing.p99_us,
        per_s=timing.per_s,
        power=timing.power,
        ratio=None if best is None else round(timing.p50_us / best, 3),
    )


def show(rows: Sequence[BackendBench]) -> None:
    """A table for each model, what did not open, and what it was measured on."""
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    assert rows, "every model has a row for each backend"
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        ratio = any(row.ratio is not None for row in mine)
        table = Table(title=f"{model}, {mine[0].rounds} rounds in turn")
        for name in ("backend", "device", "numerics", "isa", "p50, us", "p99, us", "a second"):
            table.add_column(name)
        if ratio:
            table.add_column("of best rival")
        for name in ("kB", "power", "differ"):
            table.add_column(name)
        for row in mine:
            if not row.reason:
                table.add_row(*_cells(row, ratio))
        console.print(table)
    # A device that is not here is refused for every model alike.
    refused = dict.fromkeys(f"{r.backend} {r.device}: {r.reason}" for r in rows if r.reason)
    for text in refused:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    first, jitter = rows[0], rows[0].jitter
    console.print(
        f"an empty call: {max(row.empty_us for row in rows):g} us; "
        f"host jitter: p99 {jitter.p99_ns / 1e3:g} us, max {jitter.max_ns / 1e3:g} us, "
        f"preempted {jitter.preempted} times in {jitter.seconds:g} s"
    )
    on = ", ".join(str(value) for value in first.machine.values())
    with_ = ", ".join(f"{name} {text}" for name, text in first.versions.items())
    console.print(f"{on}; {with_}; {first.commit}; {first.date}", markup=False)


def _cells(row: BackendBench, ratio: bool) -> list[str]:
    used = row.power
    power = (
        used.counter if used.watts is None else f"{used.watts:g} W, {used.uj_per_inference:g} uJ"
    )
    wrong = f"{row.disagreements} of {row.vectors:,}" if row.vectors else "-"
    if row.mask_disagreements:
        wrong += f", masks {row.mask_disagreements}"
    cells = [
        row.backend,
        row.device,
        row.numerics,
        row.isa,
        f"{row.p50_us:.2f}",
        f"{row.p99_us:.2f}",
        f"{row.per_s:,.0f}",
    ]
    cells += ["-" if row.ratio is None else f"{row.ratio:.3f}"] if ratio else []
    return [*cells, f"{row.size_bytes / 1e3:.1f}", power, wrong]
