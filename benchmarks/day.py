"""``octick bench day``: a simulated day and more of event time that crosses a recalibration.

The built-in market runs at its own rate through the pipeline as fast as it goes; timers come every
``timer_ns`` as the daemon makes them, a share of the inferences goes to the shadow's models and the
drift monitor, whose answers are events. The market's last quarter of an hour before the
recalibration is recorded; after 24 hours of event time a process of its own makes a candidate from
that tape, the candidate is judged, opened, and takes over between two ticks. Then the whole day is
run once more from its events alone, and has to give the same signals.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from benchmarks.memory import rss_mb
from benchmarks.provenance import REFERENCE, ROOT, commit, machine
from engine.backends.registry import open_backend
from engine.book import ASK, BID
from engine.bundle import load_bundle
from engine.candidate import judge
from engine.config import Config, default_config
from engine.digest import Digest
from engine.drift import DriftConfig
from engine.pipeline import Pipeline
from engine.shadow_models import Models
from engine.shadow_ring import FRESH
from engine.shadow_worker import alert_text
from engine.trust_events import DRIFT, RECALIBRATION, SHADOW_UP, SWAP, Control, ShadowAnswer
from feeds import codec, sync, tape, wire
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape_writer import TapeWriter
from replay.opening import load_swapped

SEED: Final = 24
HOUR_NS: Final = 3_600_000_000_000
RECALIBRATE_AFTER_NS: Final = 24 * HOUR_NS
RECORDED_NS: Final = HOUR_NS // 4  # before the recalibration
RECALIBRATION_ROWS: Final = 50_000
STRETCH_BYTES: Final = 1 << 15  # about a second of the market: events come between two


class DayBench(msgspec.Struct, frozen=True):
    """What happened.

    Attributes
    ----------
    ok : bool
        One recalibration, swapped in or the same model again; both digests are equal; nothing was
        called stale, impossible or demoted.
    event_hours, seconds : float
        Simulated, and what it took.
    messages, signals, tradable : int
    suppressed : dict of str to int
    shadow_answers, disagreements : int
    drift_alerts : list of str
        Nothing changes within this market, but a model that was trained on several instruments is
        told that one of them alone is distributed otherwise (KS). ``octick bench drift`` counts
        the false ones.
    moves : int
        Between INT8, FP32 and HALTED.
    recalibration : str
        "swapped" or "the same model".
    recalibration_s : float
    digest, digest_again : str
        Of all signals, and of all signals of the second run.
    rss_growth_mb : float
        After the first hour.
    """

    ok: bool
    event_hours: float
    seconds: float
    messages: int
    signals: int
    tradable: int
    suppressed: dict[str, int]
    shadow_answers: int
    disagreements: int
    drift_alerts: list[str]
    moves: int
    recalibration: str
    recalibration_s: float
    agreement_serving: float | None
    agreement_candidate: float | None
    digest: str
    digest_again: str
    rss_growth_mb: float
    machine: dict[str, str | int]
    commit: str


class _Event(NamedTuple):
    kind: int
    now_ns: int
    payload: bytes


class _Outcome(NamedTuple):
    said: str = ""
    seconds: float = 0.0
    agreement_serving: float | None = None
    agreement_candidate: float | None = None


class _Engine:
    """A pipeline and the digest of its signals; takes records and events."""

    def __init__(self, config: Config, model: Path) -> None:
        bundle = load_bundle(model)
        self.pipeline = Pipeline(
            config,
            bundle,
            open_backend("onnx", bundle),
            load=lambda model_hash, folder: load_swapped(config, model, model_hash, folder),
        )
        self.digest = Digest()
        self._scratch = np.zeros(1 << 12, dtype=np.uint8)

    def take(self, buf: np.ndarray, at: int, stop: int) -> None:
        """Advance over whole records."""
        pipeline = self.pipeline
        while at < stop:
            before = pipeline.ticket
            at = pipeline.advance(buf, at, stop)
            if pipeline.fired:
                self.digest.update(pipeline.answer())
                if pipeline.ticket != before:
                    self.inferred()

    def inferred(self) -> None:
        """After each inference."""

    def event(self, event: _Event) -> None:
        """Take one event."""
        buf, body = self._scratch, tape.RECORD_HEADER_BYTES
        buf[body : body + len(event.payload)] = np.frombuffer(event.payload, dtype=np.uint8)
        self.take(buf, 0, tape.put_record(buf, 0, event.kind, event.now_ns, len(event.payload)))


class _Watched(_Engine):
    """An engine whose shadow answers, as events to be taken after the records at hand."""

    def __init__(self, config: Config, model: Path, every: int, start_ns: int) -> None:
        super().__init__(config, model)
        self._drift = DriftConfig(every_rows=1)
        self._every = every
        self._start_ns = start_ns
        self.models = Models(load_bundle(model), self._drift)
        self.alerts: list[str] = []
        self.events: list[_Event] = []
        self.now_ns = start_ns

    def inferred(self) -> None:
        pipeline, models = self.pipeline, self.models
        if pipeline.ticket % self._every:
            return
        flags = FRESH if pipeline.fresh else 0
        flags, alerts = models.answer(pipeline.slot, flags, pipeline.x)
        fp32, int8 = models.scores.copy()
        answer = ShadowAnswer(
            pipeline.ticket,
            pipeline.signal_seq,
            *pipeline.names[pipeline.slot],
            flags,
            fp32,
            int8,
        )
        self.events.append(_Event(tape.SHADOW, self.now_ns, answer.encode()))
        for alert in alerts:
            text = alert_text(alert)
            self.alerts.append(f"{(self.now_ns - self._start_ns) / HOUR_NS:.2f} h: {text}")
            event = Control(DRIFT, self.now_ns, "drift monitor", text, value=alert.rows)
            self.events.append(_Event(tape.CONTROL, self.now_ns, event.encode()))

    def swapped(self, folder: Path) -> None:
        """Let the shadow answer with another bundle."""
        self.models = Models(load_bundle(folder), self._drift)


def bench_day(
    hours: float,
    *,
    model: Path = REFERENCE,
    rate_hz: float = 250.0,
    every: int = 16,
    recalibrate_after_ns: int = RECALIBRATE_AFTER_NS,
    progress: Callable[[str], Any] = lambda _: None,
) -> DayBench:
    """Run it.

    Parameters
    ----------
    hours : float
        Of event time; more than the recalibration waits for.
    every : int
        Every so many-th inference goes to the shadow.

    Raises
    ------
    InputError
        If the session ends before its recalibration.
    """
    if hours * HOUR_NS <= recalibrate_after_ns:
        raise InputError(
            "the day ends before its recalibration",
            where="--hours",
            expected=f"more than {recalibrate_after_ns / HOUR_NS:g}",
            found=f"{hours:g}",
        )
    market = {"seed": SEED, "n_instruments": 1, "rate_hz": rate_hz}
    simulator = Simulator(**market)  # type: ignore[arg-type]
    config = default_config((item.venue, item.symbol) for item in simulator.instruments)
    start_ns = simulator.start_ns
    engine = _Watched(config, model, every, start_ns)
    log: list[list[_Event]] = []  # events after each stretch of the market
    with tempfile.TemporaryDirectory(prefix="octick-day-") as name:
        folder = Path(name)
        recording: TapeWriter | None = None
        outcome = _Outcome()
        settled_mb = 0.0
        started = time.monotonic()
        engine.events.append(_Event(tape.CONTROL, start_ns, Control(SHADOW_UP, start_ns).encode()))
        for buf, at, stop, timers in _stretches(simulator, hours, config):
            engine.now_ns = now_ns = _time(buf, at)
            for event in timers:
                engine.event(event)
            if recording is None and now_ns >= start_ns + recalibrate_after_ns - RECORDED_NS:
                recording = TapeWriter(folder / "session.tape", simulator.meta)
                _record_book(recording, engine.pipeline, simulator, now_ns)
            if recording is not None and not outcome.said:
                arena, position = recording.room(stop - at)
                arena[position : position + stop - at] = buf[at:stop]
                recording.advance(position + stop - at)
            engine.take(buf, at, stop)
            if not outcome.said and now_ns >= start_ns + recalibrate_after_ns:
                assert recording is not None
                progress("recalibrating")
                outcome = _recalibrate(engine, model, recording.path, folder / "candidate")
            happened, engine.events = engine.events, []
            for event in happened:
                engine.event(event)
            log.append(happened)
            hour = (now_ns - start_ns) / HOUR_NS
            settled_mb = settled_mb or (rss_mb() if hour >= 1.0 else 0.0)
            progress(f"{hour:.1f} of {hours:g} h of event time")
        seconds = time.monotonic() - started
        grown_mb = rss_mb() - settled_mb if settled_mb else 0.0
        if recording is not None:
            recording.close()
        again = _Engine(config, model)
        events = iter(log)
        for buf, at, stop, timers in _stretches(Simulator(**market), hours, config):  # type: ignore[arg-type]
            for event in timers:
                again.event(event)
            again.take(buf, at, stop)
            for event in next(events):
                again.event(event)
            progress(f"again: {(_time(buf, at) - start_ns) / HOUR_NS:.1f} of {hours:g} h")
    pipeline = engine.pipeline
    counters, suppressed = pipeline.counters, dict(pipeline.suppressed)
    digest, digest_again = engine.digest.hexdigest(), again.digest.hexdigest()
    moves = pipeline.trust.failover.transitions
    return DayBench(
        ok=bool(outcome.said)
        and digest == digest_again
        and moves == suppressed["STALE"] == suppressed["VALUE_CHECK"] == 0,
        event_hours=hours,
        seconds=round(seconds, 1),
        messages=counters["messages"],
        signals=counters["signals"],
        tradable=counters["tradable"],
        suppressed={name: count for name, count in suppressed.items() if count},
        shadow_answers=pipeline.trust.shadow_answers,
        disagreements=pipeline.trust.disagreements,
        drift_alerts=engine.alerts,
        moves=moves,
        recalibration=outcome.said,
        recalibration_s=outcome.seconds,
        agreement_serving=outcome.agreement_serving,
        agreement_candidate=outcome.agreement_candidate,
        digest=digest,
        digest_again=digest_again,
        rss_growth_mb=round(grown_mb, 1),
        machine=machine(),
        commit=commit(),
    )


def _time(buf: np.ndarray, at: int) -> int:
    return int.from_bytes(buf[at + 8 : at + 16].tobytes(), "little")


def _stretches(simulator: Simulator, hours: float, config: Config) -> Any:
    """The market in stretches, each with the timers that are due before it."""
    timer_ns = config.limits.timer_ns
    next_ns = simulator.start_ns + timer_ns
    for buf, at, stop, _ in simulator.chunks(seconds=hours * 3600, chunk_bytes=STRETCH_BYTES):
        timers = []
        while next_ns <= _time(buf, at):
            timers.append(_Event(tape.TIMER, next_ns, codec.encode_timer(next_ns)))
            next_ns += timer_ns
        yield buf, at, stop, timers


def _record_book(
    recording: TapeWriter, pipeline: Pipeline, simulator: Simulator, now_ns: int
) -> None:
    """Begin a tape in the middle of a session as a late joiner's would: with the book."""
    item = simulator.instruments[0]
    epoch, seq = (int(pipeline.sync[0, column]) for column in (sync.EPOCH, sync.LAST_SEQ))
    ids = (item.source_id, item.instrument_id, epoch, seq)
    unit = (Decimal(item.tick), Decimal(item.lot))
    definition = codec.encode_instrument(*ids, item.venue, item.symbol, *unit)
    book = codec.encode_book(
        wire.SNAPSHOT,
        *ids,
        now_ns,
        now_ns,
        pipeline.book(0, BID).tolist(),
        pipeline.book(0, ASK).tolist(),
        wire.FLAG_ANSWER,
    )
    for payload in (definition, book):
        recording.append(tape.MARKET, now_ns, payload)


def _recalibrate(engine: _Watched, model: Path, recorded: Path, out: Path) -> _Outcome:
    """Make a candidate as the daemon would, judge it, and let it take over."""
    started = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "octick", "model", "recalibrate", str(model)),
            *("--tape", str(recorded), "--out", str(out), "--rows", str(RECALIBRATION_ROWS)),
            "--json",
        ],
        capture_output=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode:
        raise InputError(
            "the recalibration refused its candidate",
            where="bench day",
            found=(done.stdout + done.stderr).decode()[-300:],
        )
    now_ns = engine.now_ns
    note = Control(RECALIBRATION, now_ns, "schedule", "done")
    engine.events.append(_Event(tape.CONTROL, now_ns, note.encode()))
    vectors, slots = engine.pipeline.trust.recent.kept()
    verdict = judge(model, out, inputs=vectors, streams=slots)
    said = "the same model"
    if verdict.model_hash != verdict.serving_hash:
        if not verdict.ok:
            raise InputError("the candidate is refused", where="bench day", found=str(verdict))
        said = "swapped"
        model_hash = int(verdict.model_hash, 16)
        swap = Control(SWAP, now_ns, "schedule", str(out), model_hash=model_hash)
        engine.events.append(_Event(tape.CONTROL, now_ns, swap.encode()))
        engine.swapped(out)
    return _Outcome(
        said,
        round(time.monotonic() - started, 1),
        verdict.agreement_serving,
        verdict.agreement_candidate,
    )
