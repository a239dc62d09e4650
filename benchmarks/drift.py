"""``octick bench drift``: how soon a planted shift of the inputs is found, and what in none.

A day of the simulated market runs through the pipeline; the shadow's drift monitor sees one
inference of `SHARE`, by the reference bundle. At several times of the day copies of it go on with
shifted inputs.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.provenance import REFERENCE, commit, versions
from engine.backends.registry import open_backend
from engine.bundle import Bundle, load_bundle
from engine.config import BookConfig, Config, InstrumentConfig, LimitsConfig
from engine.drift import DriftAlert, DriftConfig, DriftMonitor
from engine.feature_specs import NAMES
from engine.pipeline import Pipeline
from engine.saturation import SaturationProbe
from engine.signals import AT_EXCHANGE_TIME
from feeds.simulator import Simulator
from models.dataset import MAX_PENDING_BYTES, Normalisation

INSTRUMENTS: Final = 4
MAX_LEVELS: Final = 512
SEED: Final = 11
SHARE: Final = 16  # of the inferences one is repeated by the shadow
SHIFTS_SD: Final = (0.25, 0.5, 1.0)
ONSETS: Final = (0.25, 0.5, 0.75)  # of the day
HORIZON: Final = 0.25  # of the day, for which a shift lasts
BLOCK_ROWS: Final = 4_096
PROBE_EVERY: Final = 16
MAX_SHOWN: Final = 24  # names of features
NS_A_MINUTE: Final = 60_000_000_000
_INT64: Final = struct.Struct("<q")
AFTER_LEARNING: Final = "in the day"
FROM_START: Final = "from the start"


class DriftBench(msgspec.Struct, frozen=True):
    """What was found, how soon.

    Attributes
    ----------
    hours : float
        Of event time.
    messages, inferences, rows : int
        Of the market; of the engine; seen by the monitor.
    false_alarms : list of str
        In the day without a shift.
    table : list of dict
        For each shift, time of its beginning and subject: ``cases``, ``detected`` (share of
        them), and delays in rows of the monitor and in minutes of event time. The median counts
        what was not found as never (None where that is the median); the worst is of those found.
    missed : dict of str to list of str
        By shift: features that were not found every time, in the day.
    state : dict of str to float
        The monitor's figures at the end of the day without a shift.
    """

    hours: float
    seed: int
    share: int
    bundle: str
    config: DriftConfig
    messages: int
    inferences: int
    rows: int
    false_alarms: list[str]
    table: list[dict[str, Any]]
    missed: dict[str, list[str]]
    state: dict[str, float]
    versions: dict[str, str]
    commit: str


class _Market:
    """The model inputs of every `SHARE`-th inference of a simulated day."""

    def __init__(self, bundle: Bundle, hours: float, seed: int) -> None:
        self.simulator = Simulator(seed=seed, n_instruments=INSTRUMENTS)
        self.inferences = 0
        self._hours = hours
        self._normalisation = Normalisation(bundle.mean, bundle.inv_scale, bundle.clip)
        config = Config(
            instruments=tuple(
                InstrumentConfig(item.venue, item.symbol) for item in self.simulator.instruments
            ),
            book=BookConfig(max_levels=MAX_LEVELS),
            limits=LimitsConfig(max_pending_bytes=MAX_PENDING_BYTES),
        )
        self._pipeline = Pipeline(config, None, None)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Event times in ns since the start, and inputs float32 of shape (n, features)."""
        pipeline, start_ns = self._pipeline, self.simulator.start_ns
        vectors = np.empty((BLOCK_ROWS, len(NAMES)))
        times = np.empty(BLOCK_ROWS, dtype=np.int64)
        n = 0
        for buf, at, stop, _ in self.simulator.chunks(seconds=self._hours * 3_600):
            while True:
                at = pipeline.advance(buf, at, stop)
                if not pipeline.fired:
                    break
                if not pipeline.tradable_before_inference:
                    continue
                self.inferences += 1
                if self.inferences % SHARE:
                    continue
                vectors[n] = pipeline.vector
                times[n] = _INT64.unpack_from(pipeline.answer(), AT_EXCHANGE_TIME)[0] - start_ns
                n += 1
                if n == BLOCK_ROWS:
                    yield times, self._normalisation.apply(vectors)
                    n = 0
        yield times[:n], self._normalisation.apply(vectors[:n])


class _Twins:
    """Both models and the saturation probe, as the shadow runs them; without state."""

    def __init__(self, bundle: Bundle) -> None:
        assert not bundle.state("int8"), "a model with state has to see every row"
        assert not bundle.state("fp32"), "a model with state has to see every row"
        self._sessions = [
            open_backend("onnx", bundle, "cpu", precision=name) for name in ("int8", "fp32")
        ]
        # The same arrays every time: the backend binds what it has not seen.
        self._x = np.zeros((1, bundle.n_features), dtype=np.float32)
        self._scores = np.zeros((2, bundle.n_outputs), dtype=np.float32)
        self._outs = (self._scores[0], self._scores[1])
        self._probe = SaturationProbe(bundle)
        self.layers = self._probe.names

    def observe(self, monitor: DriftMonitor, x: np.ndarray, number: int) -> list[DriftAlert]:
        """Show a monitor one input, float32 of shape (features,)."""
        self._x[0] = x
        for session, out in zip(self._sessions, self._outs, strict=True):
            session.infer(0, self._x, out)
        divergence = float(np.abs(self._scores[0] - self._scores[1]).max())
        saturated = None if number % PROBE_EVERY else self._probe.shares(0, self._x)
        return monitor.observe(x, divergence, saturated)


class _Shifted:
    """A monitor that goes on with shifted inputs, and when it first told of what."""

    def __init__(
        self,
        monitor: DriftMonitor,
        shift: float,
        varies: np.ndarray,
        begins_ns: int,
        ends_ns: int,
    ) -> None:
        self.monitor = copy.deepcopy(monitor)
        self.shift = shift
        self.by = (shift * varies).astype(np.float32)
        self.begins_ns = begins_ns
        self.ends_ns = ends_ns
        self.rows = 0
        self.first: dict[str, tuple[int, int]] = {}  # subject or kind → rows, ns

    def note(self, alerts: list[DriftAlert], time_ns: int) -> None:
        """Remember the delay of alerts."""
        delay = (self.rows, time_ns - self.begins_ns)
        for alert in alerts:
            for name in ("any", alert.kind, f"{alert.kind}: {alert.subject}"):
                self.first.setdefault(name, delay)


def bench_drift(
    hours: float = 24.0,
    seed: int = SEED,
    config: DriftConfig | None = None,
    *,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> DriftBench:
    """Run a day with and without planted shifts.

    A shift is added to the model's normalised input, which is then clipped as the engine clips
    it. Every feature is shifted at once; since the monitor judges each feature by itself, the
    same run says when each would have been found alone. A feature that never varied in training
    has no standard deviation to be shifted by, and stays.

    Parameters
    ----------
    hours : float
        Of event time.
    seed : int
        Of the market.
    config : DriftConfig, optional
        By default the daemon's, but for a shadow that repeats one inference of `SHARE`.
    progress : callable
        Told the stage and its share done.

    Raises
    ------
    InputError
        If the reference bundle cannot be read.
    """
    config = config or DriftConfig(every_rows=1)
    bundle = load_bundle(REFERENCE)
    with np.load(bundle.path / "calibration.npz", allow_pickle=False) as file:
        reference = {name: file[name] for name in file.files}
    varies = reference["lowest"] < reference["greatest"]
    twins = _Twins(bundle)
    market = _Market(bundle, hours, seed)
    monitor = DriftMonitor(config, NAMES, reference, twins.layers)
    day_ns = round(hours * 60 * NS_A_MINUTE)
    due = [round(share * day_ns) for share in (0.0, *ONSETS)]
    running: list[_Shifted] = []
    done: list[_Shifted] = []
    false_alarms: list[str] = []
    rows = 0
    for times, x in market.blocks():
        for time_ns, row in zip(times.tolist(), x, strict=True):
            while due and time_ns >= due[0]:
                ends_ns = due[0] + round(HORIZON * day_ns)
                running += [_Shifted(monitor, sd, varies, due[0], ends_ns) for sd in SHIFTS_SD]
                due.pop(0)
            alerts = twins.observe(monitor, row, rows)
            false_alarms += [f"{time_ns / NS_A_MINUTE:.1f} min: {alert}" for alert in alerts]
            for case in running:
                shifted = np.clip(row + case.by, -bundle.clip, bundle.clip)
                case.rows += 1
                case.note(twins.observe(case.monitor, shifted, rows), time_ns)
            rows += 1
        if len(times):
            ended = [case for case in running if times[-1] >= case.ends_ns]
            done += ended
            running = [case for case in running if case not in ended]
            progress("simulating a day", min(1.0, float(times[-1]) / day_ns))
    done += running
    table, missed = _table(done, [NAMES[i] for i in np.flatnonzero(varies).tolist()])
    return DriftBench(
        hours=hours,
        seed=seed,
        share=SHARE,
        bundle=f"{bundle.model_hash:016x}",
        config=config,
        messages=market.simulator.messages,
        inferences=market.inferences,
        rows=rows,
        false_alarms=false_alarms,
        table=table,
        missed=missed,
        state=monitor.state(),
        versions=versions(),
        commit=commit(),
    )


def _table(
    cases: list[_Shifted], features: list[str]
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    table, missed = [], {}
    subjects = {
        "every feature shifted: any alert": ("any",),
        "every feature shifted: divergence": ("divergence",),
        "every feature shifted: saturation": ("saturation",),
        "one feature shifted: that feature": tuple(f"input: {name}" for name in features),
    }
    for begins in (AFTER_LEARNING, FROM_START):
        for shift in SHIFTS_SD:
            some = [
                case
                for case in cases
                if case.shift == shift and (case.begins_ns == 0) == (begins == FROM_START)
            ]
            for what, names in subjects.items():
                delays = [case.first.get(name) for case in some for name in names]
                found = [delay for delay in delays if delay is not None]
                table.append(
                    {
                        "shift_sd": shift,
                        "begins": begins,
                        "what": what,
                        "cases": len(delays),
                        "detected": round(len(found) / max(len(delays), 1), 4),
                        **_delays(found, len(delays)),
                    }
                )
            if begins == AFTER_LEARNING:
                missed[f"{shift}"] = [
                    f"{name} ({count} of {len(some)})"
                    for name in features
                    if (count := sum(f"input: {name}" not in case.first for case in some))
                ]
    return table, missed


def _delays(found: list[tuple[int, int]], cases: int) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for i, (unit, scale, digits) in enumerate((("rows", 1, None), ("minutes", NS_A_MINUTE, 1))):
        ordered = sorted(delay[i] for delay in found)
        middle = (cases - 1) // 2
        for name, at in (("median", middle), ("worst", len(ordered) - 1)):
            known = 0 <= at < len(ordered)
            figures[f"{unit}_{name}"] = round(ordered[at] / scale, digits) if known else None
    return figures


def show(result: DriftBench) -> None:
    """The table, and what was told without reason."""
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    columns = list(result.table[0])
    table = Table(*columns, title=f"{result.hours:g} hours of the simulated market")
    for row in result.table:
        shown = ["-" if row[name] is None else str(row[name]) for name in columns]
        table.add_row(*shown)
    console.print(table)
    console.print(
        f"no shift: {len(result.false_alarms)} alerts in {result.hours:g} hours,"
        f" {result.inferences:,} inferences, {result.rows:,} of them seen by the monitor"
    )
    for line in result.false_alarms:
        console.print(f"  {line}")
    for shift, names in result.missed.items():
        shown = names if len(names) <= MAX_SHOWN else [f"{len(names)} features; see --json"]
        console.print(f"{shift} sd, alone not found every time: {', '.join(shown) or 'none'}")
