"""The one pipeline that daemon, replay and training run.

    record → check → sequence → book → features → trigger → infer → value check → encode

All state lives in arrays made here, once. `Pipeline.advance` runs native code over tape records
up to the next signal that is due; `Pipeline.answer` infers and encodes it; `Pipeline.serve` does
both, as often as it can, without Python in between. Trust events on the
tape (`engine.trust_events`) are taken on the way, between two signals. Nothing here reads a clock
of its own, and a slot is an instrument's place in (venue, symbol) order, so the order in which a
config names its instruments changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from engine import advance as kernel
from engine import answering, controls, features, signals, trust
from engine.backends.interface import Backend
from engine.backends.native_call import NATIVE_FIELDS, NativeModel
from engine.book import FLOW_FIELDS, new_books, side_levels
from engine.bundle import Bundle
from engine.config import Config, config_hash
from engine.handles import new_handles, set_handle
from engine.hashes import code_hash
from engine.model_input import RUN, SEEN_ROWS, new_norm, set_norm
from engine.serving import Loaded
from engine.trust import REASONS
from engine.trust_events import ARM, CONFLATION, Control, decode_event
from engine.trust_keeper import Load, TrustKeeper
from feeds import codec, sync, wire
from feeds.errors import InputError

SERVED_BYTES: Final = 1 << 16  # of signals in one call of `Pipeline.serve`
_NOTHING: Final = memoryview(b"")
_STATES: Final = answering.handle_of("states")
_SYNC_COUNTERS: Final = {
    "gaps": sync.GAPS,
    "lost": sync.LOST,
    "late": sync.LATE,
    "duplicates": sync.DUPLICATES,
    "old_epoch": sync.OLD_EPOCH,
    "resets": sync.RESETS,
    "snapshots": sync.SNAPSHOTS,
    "covered": sync.COVERED,
    "overflows": sync.OVERFLOWS,
}
_SHARED_COUNTERS: Final = {
    "messages": kernel.MESSAGES,
    "book_levels": kernel.LEVELS,
    "trades": kernel.TRADES,
    "timers": kernel.TIMERS,
    "rejected": kernel.REJECTED,
    "unknown_instrument": kernel.UNKNOWN,
    "dropped_levels": kernel.DROPPED_LEVELS,
    "feature_vectors": kernel.COMPUTED,
}


class Pipeline:
    """The engine's state and its transition.

    Parameters
    ----------
    config : Config
        Its instruments, trigger, book, trust and limits.
    bundle : Bundle or None
        The model's normalisation; None computes raw features and never infers.
    backend : Backend or None
        What infers; given exactly when ``bundle`` is. The pipeline closes it.
    load : callable, optional
        Gives the model that a swap on the tape names; without it only those given to `offer`.
    follow_trust_events : bool
        False passes over commands and shadow answers, as they belong to another run.
    engine_epoch : int
        Names this run of the engine in its signals, outside the digest.
    compute_always : bool
        Measure only: a whole feature vector after every message, and no signals.

    Attributes
    ----------
    fired : bool
        Whether the last `advance` stopped because a signal is due.
    top, depth : ndarray of int64
        The best levels of each book and how many there are; see `engine.book`.
    vector : ndarray of float64, shape (N_FEATURES,)
        Raw features of the last signal that was tradable before inference.
    trust : TrustKeeper
        Who answers, and why.
    served : memoryview
        Signals of the last `serve`, ``signal_bytes`` each; valid until the next one.
    ticket : int
        Inferences so far.
    fresh : bool
        Whether the model's stream started anew with the last inference.
    late_ns : int
        What the last inference took where that was over its budget, else 0.
    guards, scores : ndarray
        State of the controls; see `engine.controls`.
    seen : ndarray
        What the model's inputs were before; see `engine.model_input`.
    arrays : tuple of ndarray
        `engine.answering.ARRAYS`.
    handles : ndarray of int64
        Of these.
    clip : float
        Of the model's input.
    prepared : bool
        Whether what `prepare` last told the kernels still holds: nothing has moved since.
    """

    def __init__(
        self,
        config: Config,
        bundle: Bundle | None,
        backend: Backend | None,
        *,
        load: Load | None = None,
        follow_trust_events: bool = True,
        engine_epoch: int = 0,
        compute_always: bool = False,
    ) -> None:
        assert (bundle is None) == (backend is None)
        if not config.instruments:
            raise InputError(
                "no instrument to follow",
                where="config key 'instrument'",
                fix="add an [[instrument]] with venue and symbol",
            )
        names = sorted({(item.venue, item.symbol) for item in config.instruments})
        n, width = len(names), features.N_FEATURES
        self.names: Final = names
        self.fired = False
        self.inference_failures = 0
        self.signals = 0
        self.tradable = 0
        self.suppressed: Final = dict.fromkeys((name for _, name in REASONS), 0)
        keys = b"".join(
            codec.ascii_field(venue, 16, "config key 'instrument.venue'")
            + codec.ascii_field(symbol, 32, "config key 'instrument.symbol'")
            for venue, symbol in names
        )
        self._keys: Final = np.frombuffer(keys, dtype=np.uint8).reshape(n, 48).copy()
        self._ids: Final = np.full((n, 2), -1, dtype=np.int64)
        self.sync: Final = np.zeros((n, sync.ROW_FIELDS), dtype=np.int64)
        self.sync[:, sync.WANT_SNAPSHOT] = 1
        self._held: Final = np.zeros((n, config.limits.max_pending_bytes), dtype=np.uint8)
        self._window, self._far, self.top, self.depth = new_books(n, config.book.max_levels)
        self._flow: Final = np.zeros(FLOW_FIELDS, dtype=np.int64)
        self._fi: Final = np.zeros((n, features.STATE_I), dtype=np.int64)
        self._ff: Final = np.zeros((n, features.STATE_F), dtype=np.float64)
        for slot in range(n):
            features.reset(self._fi[slot], self._ff[slot])
        self._track: Final = np.zeros((n, kernel.TRACK_FIELDS), dtype=np.int64)
        self._shared: Final = np.zeros(kernel.SHARED_FIELDS, dtype=np.int64)
        self._shared[kernel.RELEASE_SLOT] = n
        self._params: Final = np.zeros(kernel.PARAM_FIELDS, dtype=np.int64)
        self._params[kernel.TRIGGER] = kernel.TRIGGERS[config.trigger.kind]
        self._params[kernel.EVERY_EVENTS] = config.trigger.every_events
        self._params[kernel.EVERY_NS] = config.trigger.every_ns
        self._params[kernel.STALE_AFTER_NS] = config.trust.stale_after_ns
        self._params[kernel.COMPUTE_ALWAYS] = compute_always
        self._facts: Final = np.zeros(signals.FACT_FIELDS, dtype=np.int64)
        self.vector: Final = np.zeros(width, dtype=np.float64)
        self._norm: Final = new_norm(width, bundle)
        self.clip = float("inf") if bundle is None else bundle.clip
        self.seen: Final = np.zeros((n, SEEN_ROWS, width), dtype=np.float32)
        self.x: Final = np.zeros((1, width), dtype=np.float32)
        self._x_bytes: Final = self.x.reshape(-1).view(np.uint8)
        n_outputs = 0 if bundle is None else len(bundle.classes)
        self._outputs: Final = np.zeros(n_outputs, dtype=np.float32)
        self.guards, self.scores = controls.new_guards(n, n_outputs)
        self._limits_i, self._limits_f = controls.limits(config.controls, config.failover)
        self.ticket = self.late_ns = 0
        self.fresh = False
        self._budget_ns = config.failover.inference_budget_ns
        self._follow = follow_trust_events
        loaded = None
        backend_name = "none"
        if bundle is not None and backend is not None:
            loaded = Loaded(bundle, backend)
            info = backend.info()
            backend_name = f"{info.name}-{info.device}"[:16]
        self.trust: Final = TrustKeeper(
            config, names, loaded, load=load, take_over=self._take_over, n_outputs=n_outputs
        )
        templates = [
            signals.signal_template(
                venue,
                symbol,
                n_outputs,
                model_hash=0 if bundle is None else bundle.model_hash,
                config_hash=config_hash(config),
                feature_hash=features.SCHEMA_HASH,
                code_hash=code_hash(),
                engine_epoch=engine_epoch,
                backend=backend_name,
            )
            for venue, symbol in names
        ]
        table = np.array(templates)
        self._messages: Final = list(table)
        self._views: Final = [message.data for message in self._messages]
        self.signal_bytes: Final = table.shape[1]
        # What the kernels take, in their order: the books and features, the model's input, and
        # what a signal is made of.
        self._state: Final = (
            self._keys,
            self._ids,
            self.sync,
            self._held,
            self._window,
            self._far,
            self.top,
            self.depth,
            self._flow,
            self._fi,
            self._ff,
            self._track,
            self._shared,
            self._params,
            self._facts,
            self.vector,
            self._norm,
        )
        self._input: Final = (self.seen, self.x, self._x_bytes)
        self._native: Final = np.zeros(NATIVE_FIELDS, dtype=np.int64)
        self._native_of: NativeModel | None = None
        self._round: Final = np.zeros(answering.ROUND_FIELDS, dtype=np.int64)
        self._round[answering.BUDGET_NS] = self._budget_ns
        self._told: Final = self._round.data  # a number of it is read three times as fast
        self._out: Final = np.zeros(max(SERVED_BYTES, self.signal_bytes), dtype=np.uint8)
        self._out_view: Final = self._out.data
        self._round[answering.FOLLOW] = follow_trust_events
        recent, tally = self.trust.recent, self.trust.failover.tally
        self.arrays: Final = (
            *(*self._state, *self._input, table, self._outputs, self.guards, self.scores),
            *(self._limits_i, self._limits_f, recent.about, recent.vectors, recent.outputs),
            *(self._native, np.zeros(0, dtype=np.int64), self._round, self._out),
            *(tally.numbers, tally.diverged.marks, tally.disagreed.marks),
        )
        assert len(self.arrays) == len(answering.ARRAYS)
        self.handles: Final = new_handles(self.arrays)
        self.served: memoryview = _NOTHING
        self.prepared = False

    def advance(self, buf: np.ndarray, at: int, stop: int) -> int:
        """Consume whole tape records of ``buf[at:stop]``; see `engine.advance.advance`.

        Returns
        -------
        int
            Where to go on. `fired` says whether a signal is due; call `answer` then, before the
            next `advance`.

        Raises
        ------
        InputError
            For a trust event that cannot be read, or a swap to a model that cannot be had.
        """
        self.prepared = False
        at = self._advance(buf, at, stop)
        while self._shared[kernel.FIRED_SLOT] == kernel.EVENT_DUE:
            if self._follow:
                self._take_event(buf)
            at = self._advance(buf, at, stop)
        self.fired = self._shared[kernel.FIRED_SLOT] >= 0
        return at

    def _advance(self, buf: np.ndarray, at: int, stop: int) -> int:
        after: int = kernel.advance(buf, at, stop, *self._state, self.clip, *self._input)
        return after

    def serve(
        self,
        buf: np.ndarray,
        at: int,
        stop: int,
        clock: Callable[[], int] | None = None,
        offset_ns: int = 0,
    ) -> int:
        """Consume whole tape records of ``buf[at:stop]`` and answer what they make due.

        The same as `advance` and `answer` in turn; where a kernel can run the model, in one call.

        Parameters
        ----------
        clock : callable, optional
            As `answer` takes it. With one, at most one signal is answered.
        offset_ns : int
            From the monotonic clock to what ``clock`` tells.

        Returns
        -------
        int
            Where to go on. `served` then holds the signals, one behind the other; there may be
            none.
        """
        self.prepare(clock is not None, offset_ns)
        self.prepared = False  # for `answering.serve` alone
        room = SERVED_BYTES if clock is None else self.signal_bytes
        at = answering.serve(self.handles, buf, at, stop, self.clip, room)
        self.finish(buf)
        if self.fired:
            before = bytes(self.served)
            answer = self.answer(clock)
            self.served = memoryview(before + answer) if before else answer
        return at

    def prepare(self, live: bool, offset_ns: int = 0) -> None:
        """Tell the kernels who answers from here on, before `answering.serve` runs.

        Parameters
        ----------
        live : bool
            Emission and inferences are timed by the clock.
        offset_ns : int
            From the monotonic clock to time since the epoch.
        """
        self.prepared = live
        keeper, told = self.trust, self._told
        serving = keeper.serving
        native = None if serving is None or keeper.late else serving.native_model()
        self.run_natively(native)
        failover = keeper.failover
        told[answering.TICKET] = self.ticket
        told[answering.BLOCKED] = trust.REASON_HALTED if failover.mode == trust.MODE_HALTED else 0
        told[answering.PRECISION] = keeper.precision
        told[answering.NUMERICS] = keeper.numerics
        told[answering.SHADOW] = failover.shadow
        told[answering.MODE] = failover.serving
        told[answering.LIVE] = live
        told[answering.OFFSET_NS] = offset_ns

    def run_natively(self, native: NativeModel | None) -> None:
        """Let kernels run a model by themselves; None leaves every inference to Python."""
        self._told[answering.NATIVE] = native is not None
        if native is not None and native is not self._native_of:
            self._native_of = native
            addresses = (self.x.ctypes.data, self._outputs.ctypes.data)
            self._native[:] = (native.step, *addresses, *native[1:4])
            set_handle(self.handles, _STATES, native.states)

    def finish(self, buf: np.ndarray) -> None:
        """Take over what `answering.serve` did, and do what it left: `served`, rules, events.

        `fired` afterwards says whether a signal is due that only `answer` can answer.

        Parameters
        ----------
        buf : ndarray of uint8
            What it ran over.
        """
        self.prepared = False
        keeper, told = self.trust, self._told
        due = self._shared[kernel.FIRED_SLOT]
        n = told[answering.SIGNALS]
        self.fired = bool(due >= 0) and told[answering.NATIVE] == 0
        self.served = _NOTHING if n == 0 else self._out_view[: n * self.signal_bytes]
        if n > 0:
            self.count(n, told[answering.TRADABLE], told[answering.SUPPRESSED :])
            self.fresh = bool(told[answering.NEW_STREAM])
            self.late_ns = told[answering.LATE_NS]
        judged = told[answering.JUDGE]
        if judged:
            facts = self._facts
            at_ns, check = int(facts[signals.FACT_RECEIVED]), int(facts[signals.FACT_VALUE_CHECK])
            keeper.judge(self.slot, self.ticket, at_ns, judged, check, self.late_ns)
        elif due == kernel.EVENT_DUE and self._follow:
            self._take_event(buf)

    def count(self, n: int, tradable: int, suppressed: Sequence[int]) -> None:
        """Count signals that a kernel answered, and how many had each reason, by its bit."""
        self.ticket = self._told[answering.TICKET]
        self.signals += n
        self.tradable += tradable
        if tradable < n:
            for bit, name in REASONS:
                self.suppressed[name] += suppressed[bit.bit_length() - 1]

    @property
    def releasing(self) -> bool:
        """Whether signals that conflation held back may be due, whatever comes next."""
        return bool(self._shared[kernel.RELEASE_SLOT] < len(self.names))

    @property
    def slot(self) -> int:
        """Slot of the instrument whose signal is due, an index into `names`."""
        return int(self._shared[kernel.FIRED_SLOT])

    @property
    def signal_seq(self) -> int:
        """Of the signal that is due, or was answered last."""
        return int(self._facts[signals.FACT_SIGNAL_SEQ])

    def answer(self, clock: Callable[[], int] | None = None) -> memoryview:
        """Infer and encode the signal that is due.

        Parameters
        ----------
        clock : callable, optional
            Tells the time in ns, for the time of emission and an inference's budget. Without one
            they are the time of receipt, and what the tape says was late.

        Returns
        -------
        memoryview
            The SBE Signal, valid until this instrument's next one.
        """
        assert self.fired, "no signal is due"
        slot = self.slot
        facts, keeper, told = self._facts, self.trust, self._told
        serving, failover = keeper.serving, keeper.failover
        mask = blocked = self.late_ns = 0
        inferred = False
        emitted_ns = int(facts[signals.FACT_RECEIVED])
        if serving is None:
            self._outputs.fill(0.0)
        elif facts[signals.FACT_REASONS] == 0:
            inferred = True
            self.ticket += 1
            fresh = self.fresh = bool(self._track[slot, kernel.STREAM_RESET])
            if fresh:
                self.take_stream_reset(slot)
            if clock is not None:
                emitted_ns = clock()
            try:
                mask = serving.infer(slot, self.ticket, self.x, self._outputs, fresh)
            except RuntimeError:
                # The signal says so; the book and the next inference go on.
                self.inference_failures += 1
                facts[signals.FACT_REASONS] = trust.REASON_INFERENCE_FAILED
            # Late by the clock, or by what the tape says of it.
            if clock is None:
                if keeper.late:
                    self.late_ns = keeper.told_late(slot, self.signal_seq)
            elif 0 < self._budget_ns < (took_ns := clock() - emitted_ns):
                self.late_ns = took_ns
            if self.late_ns:
                blocked = trust.REASON_LATE
            told[answering.TICKET] = self.ticket
            told[answering.MODE] = failover.serving
            told[answering.NEW_STREAM] = fresh
        if failover.mode == trust.MODE_HALTED:
            blocked |= trust.REASON_HALTED
        if clock is not None:
            emitted_ns = clock()
        told[answering.PRECISION] = keeper.precision
        told[answering.NUMERICS] = keeper.numerics
        told[answering.SHADOW] = failover.shadow
        reasons = answering.complete(self.handles, inferred, mask, blocked, emitted_ns)
        self.signals += 1
        if reasons == 0:
            self.tradable += 1
        else:
            for bit, name in REASONS:
                if reasons & bit:
                    self.suppressed[name] += 1
            value_check = int(facts[signals.FACT_VALUE_CHECK])
            at_ns = int(facts[signals.FACT_RECEIVED])
            keeper.judge(slot, self.ticket, at_ns, reasons, value_check, self.late_ns)
        return self._views[slot]

    def _take_event(self, buf: np.ndarray) -> None:
        start, length, at_ns = self._shared[kernel.EVENT_AT : kernel.EVENT_TIME + 1].tolist()
        event = decode_event(bytes(buf[start : start + length]))
        if isinstance(event, Control) and event.command == ARM:
            controls.rearm(self.guards)
        elif isinstance(event, Control) and event.command == CONFLATION:
            self._params[kernel.CONFLATE_NS] = event.value
            if event.value == 0:
                self._shared[kernel.RELEASE_SLOT] = 0
                self._shared[kernel.RELEASE_TIME] = at_ns
        self.trust.take(event, at_ns)

    def _take_over(self, bundle: Bundle) -> None:
        """Another model answers from here on."""
        assert len(bundle.classes) == len(self._outputs), "a model of other outputs"
        set_norm(self._norm, bundle)
        self.clip = bundle.clip
        self.seen[:, RUN] = 0.0
        for message in self._messages:
            signals.set_model_hash(message, bundle.model_hash)

    def close(self) -> None:
        """Give every model back."""
        self.trust.close()

    def take_stream_reset(self, slot: int) -> bool:
        """Whether the model's state of an instrument starts anew; asking clears it."""
        due = bool(self._track[slot, kernel.STREAM_RESET])
        self._track[slot, kernel.STREAM_RESET] = 0
        return due

    @property
    def tradable_before_inference(self) -> bool:
        """Whether nothing speaks against the signal that is due, so that `vector` is its own."""
        return self.fired and self._facts[signals.FACT_REASONS] == 0

    def wanted_snapshots(self) -> list[int]:
        """Slots whose book needs a snapshot."""
        return np.flatnonzero(self.sync[:, sync.WANT_SNAPSHOT]).tolist()

    def synced(self) -> int:
        """How many instruments have a whole book."""
        return int(np.count_nonzero(self.sync[:, sync.STATE] == sync.SYNCED))

    def book(self, slot: int, side: int) -> np.ndarray:
        """All levels of a side, best first: int64 of shape (levels, 2), price and quantity."""
        levels: np.ndarray = side_levels(self._window[slot], self._far[slot], side)
        return levels

    def last_error(self) -> str:
        """What was wrong with the last malformed message."""
        return wire.ERRORS[self._shared[kernel.LAST_ERROR]]

    @property
    def counters(self) -> dict[str, int]:
        """Everything counted so far."""
        totals = {name: int(self._shared[column]) for name, column in _SHARED_COUNTERS.items()}
        totals |= {name: int(self.sync[:, column].sum()) for name, column in _SYNC_COUNTERS.items()}
        totals |= {
            "signals": self.signals,
            "tradable": self.tradable,
            "inference_failures": self.inference_failures,
        }
        return totals
