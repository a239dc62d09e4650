# Hot path: `Daemon._drain`; the rest is plain asyncio.
"""The daemon: market data in over ZeroMQ, signals out, everything recorded.

What arrives goes onto the tape first; the pipeline then advances over the very bytes that a
replay will read. The clock is read here and nowhere deeper: its readings become receive times on
the tape, timer events on the tape, or telemetry.
"""

from __future__ import annotations

import asyncio
import gc
import signal as os_signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import zmq

from engine import backlog, cores, latency, live, state
from engine.account import Account, Totals
from engine.backends.registry import open_backend
from engine.bundle import Bundle, load_bundle
from engine.config import Config, config_hash, semantic
from engine.features import SCHEMA_HASH
from engine.feed import FeedConnection
from engine.handshake import Handshake, Notice
from engine.hashes import code_hash
from engine.live_link import LiveLink
from engine.oversight import Oversight
from engine.pipeline import Pipeline
from engine.publisher import SignalPublisher
from engine.recorder import Recorder, insert_record, open_recorder
from engine.rehearsal import Rehearsal
from engine.signals import AT_BOOK_STATE
from engine.start_up import StartUp
from engine.trust import BOOK_STATES, MODE_FP32, SYNCED
from engine.trust_events import CONFLATION, INFERENCE_LATE, Control
from engine.turns import Reader, Turns
from engine.waiting import loop_descriptor
from engine.wakefulness import Wakefulness
from feeds import codec, tape, wire
from feeds.errors import InputError

STATE_EVERY_NS: Final = 1_000_000_000
SWITCH_S: Final = 0.000_1


class Daemon:
    """One engine process.

    Parameters
    ----------
    config : Config
        With feeds, a model bundle and an endpoint to publish on.
    notice : callable
        Takes one line for the operator.

    Attributes
    ----------
    pipeline : Pipeline
    ready : bool
        All instruments are defined, the tape is open, events are being taken.
    """

    def __init__(self, config: Config, notice: Notice) -> None:
        self.start_up: Final = StartUp()
        self.config = config
        self.ready = False
        self._notice = notice
        self._stop = False
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self.epoch: Final = self.now_ns()
        self.bundle: Bundle = load_bundle(config.model.bundle)
        self.start_up.mark("bundle")
        backend = open_backend(
            config.model.backend,
            self.bundle,
            config.model.device,
            threads=config.model.threads,
            precision=config.model.precision,
        )
        self.start_up.mark("backend")
        self.pipeline = Pipeline(config, self.bundle, backend, engine_epoch=self.epoch)
        loaded = self.pipeline.trust.loaded
        assert loaded is not None
        loaded.backend(MODE_FP32)  # warm before it is needed
        self.start_up.mark("pipeline, fp32")
        names = self.pipeline.names
        self._topics = [codec.topic("signal", *name) for name in names]
        self._alert_topics = [codec.topic("alert", *name) for name in names]
        self._context: zmq.Context[Any] = zmq.Context()
        self._feeds: list[FeedConnection] = []
        self._recorder: Recorder | None = None
        self._rehearsal: Rehearsal | None = None
        self._wakefulness = Wakefulness(config.loop.cpu_dma_latency_us)
        self._requested_ns = [0] * len(names)
        self._alert_seq = self._rejected_told = self._next_state_ns = 0
        signal_bytes = tape.RECORD_HEADER_BYTES + self.pipeline.signal_bytes + 8
        self._room = config.limits.max_message_bytes + signal_bytes * (len(names) + 1)
        self._room += 2 * tape.RECORD_HEADER_BYTES + wire.HEADER_BYTES + wire.CONTROL_BLOCK
        try:
            self._wakefulness.hold()
            topics = [*self._topics, *self._alert_topics, state.STATE_TOPIC, state.ALERT_TOPIC]
            self.publisher = SignalPublisher(
                config.publish.endpoint,
                topics,
                send_hwm=config.limits.send_hwm,
                context=self._context,
            )
            for feed in config.feeds:
                self._feeds.append(FeedConnection(self._context, feed, config.limits, names))
            self._link = LiveLink(
                self.pipeline,
                [feed.sub for feed in self._feeds],
                self.publisher.socket,
                self._topics,
                config.limits,
                config.overload,
                room=self._room,
                now_ns=time.monotonic_ns(),
                offset_ns=self._offset_ns,
            )
            self.publisher.lend(self._topics, self._link.last, self._link.sent)
            self.account = Account(config, self.pipeline, self._link, self.epoch)
            self.oversight = Oversight(
                config,
                self.pipeline,
                self._context,
                now_ns=self.now_ns,
                take=self._take_now,
                tell=self._alert,
                values=self.state_values,
                notice=notice,
            )
            self.account.shadow = self.oversight.shadow
            self._wait_ns = min(config.loop.wait_ns, self.oversight.patience_ns)
            if config.overload.conflate_after_ns:
                # What comes after a sleep may seem to have waited for as long.
                self._wait_ns = min(self._wait_ns, config.overload.conflate_after_ns // 2)
        except InputError:
            self.close()
            raise
        self.start_up.mark("sockets")

    def now_ns(self) -> int:
        """Wall time that never steps back within this process."""
        return time.monotonic_ns() + self._offset_ns

    def stop(self) -> None:
        """Finish what is in hand and return from `run`."""
        self._stop = True

    def connect(self) -> None:
        """Wait until every instrument is defined by a feed; then open the tape.

        Raises
        ------
        InputError
            If a feed does not know an instrument, or the tape cannot be made.
        """
        names = self.pipeline.names
        handshake = Handshake(self._feeds, names, self.config.limits, self.now_ns, self._notice)
        while not self._stop and not handshake.complete:
            handshake.poll()
            self.publisher.serve_joins()
        self.start_up.mark("handshake")
        meta = tape.TapeMeta(
            created_ns=self.epoch,
            source="octick run",
            instruments=[
                handshake.definitions[name] for name in names if name in handshake.definitions
            ],
            engine_epoch=self.epoch,
            config=semantic(self.config),
            hashes={
                "model": f"{self.bundle.model_hash:016x}",
                "config": f"{config_hash(self.config):016x}",
                "features": f"{SCHEMA_HASH:016x}",
                "code": f"{code_hash():016x}",
            },
        )
        self._warm_up()
        self.start_up.mark("warm-up")
        backlog.keep_memory()
        backlog.make_room(self._context)
        self.start_up.mark("backlog")
        self._recorder = open_recorder(self.config.tape.path, meta, self._room)
        self.oversight.tape_path = str(getattr(self._recorder, "path", ""))
        for recv_ns, payload in handshake.early:
            self._take(tape.MARKET, recv_ns, payload)
        self.start_up.mark("tape")
        self.account.compilations.watch()
        self.ready = True

    def _warm_up(self) -> None:
        """Run every native function of the hot path once; go on with that where it is wanted."""
        loaded = self.pipeline.trust.loaded
        assert loaded is not None
        rehearsal = Rehearsal(
            self.config, self.bundle, loaded.backend(loaded.mode), self._context, self._offset_ns
        )
        rehearsal.in_python()
        every_ns = self.config.loop.warm_every_ns
        if every_ns:
            self._rehearsal = rehearsal
            self._link.rehearse(rehearsal.handles, every_ns, rehearsal.alarm, rehearsal.follow)
        else:
            rehearsal.close()

    # The hot path.

    def _drain(self, may_wait: bool) -> bool:
        """Take what comes at the feeds, within a turn's budget or until the loop has its turn.

        Returns
        -------
        bool
            Whether it waited, and nothing waits now.
        """
        link, recorder, oversight = self._link, self._recorder, self.oversight
        shadow, loop = oversight.shadow, self.config.loop
        assert recorder is not None
        link.begin(
            time.monotonic_ns(),
            self.config.limits,
            spin_ns=loop.spin_ns if loop.busy_poll else 0,
            wait_ns=self._wait_ns if may_wait else 0,
            look_ns=oversight.look_ns,
        )
        while True:
            why = link.take(recorder, None if shadow is None else shadow.handles)
            if why == live.NOTHING_WAITS:
                oversight.look()
                recorder.touch_ahead()
                return may_wait
            if why == live.TURN_ENDED:
                recorder.touch_ahead()
                return False
            if why == live.SIGNAL_DUE:
                self._send_due()
            elif why == live.EVENT_TAKEN:
                self._tell_moved()
            elif why != live.WINDOW_FULL:
                self._conflate(why == live.BEHIND)

    def _send_due(self) -> None:
        """Do for the signal of a message just taken what a kernel does not."""
        pipeline, link, recorder = self.pipeline, self._link, self._recorder
        assert recorder is not None
        if pipeline.fired:
            pipeline.served = pipeline.answer(self.now_ns)
        self._send(link.record_at, link.received_ns, link.ticket_before)

    def _step(self, arena: Any, at: int, end: int, recv_ns: int) -> None:
        """Advance over one record and send every signal that it makes due."""
        pipeline = self.pipeline
        start = at
        while at < end or pipeline.releasing:
            before = pipeline.ticket
            at = pipeline.serve(arena, at, end, self.now_ns, self._offset_ns)
            if pipeline.served:
                inserted = self._send(start, recv_ns, before)
                at, end = at + inserted, end + inserted

    def _send(self, start: int, recv_ns: int, ticket_before: int) -> int:
        """Send and record the signal just answered; returns by how many bytes records moved."""
        pipeline, recorder, message = self.pipeline, self._recorder, self.pipeline.served
        assert recorder is not None
        slot, inserted = pipeline.slot, 0
        self.publisher.publish(self._topics[slot], message)
        sent_ns = self.now_ns()
        if pipeline.late_ns:
            inserted = self._record_late(start, slot, recv_ns)
        recorder.append(tape.SIGNAL, sent_ns, message)
        latency.record(self._link.latencies, sent_ns - recv_ns)
        if pipeline.ticket != ticket_before:
            self.oversight.submit(slot, pipeline.signal_seq, pipeline.fresh)
        book_state = message[AT_BOOK_STATE]
        if book_state != SYNCED:
            self._report(slot, book_state)
        if pipeline.trust.moves:
            self._tell_moves()
        return inserted

    def _conflate(self, begins: bool) -> None:
        """Begin or end conflation: an event, so that a replay does the same at the same place."""
        link = self._link
        link.conflating = begins
        self.account.conflations += begins
        every_ns = self.config.overload.conflate_every_ns if begins else 0
        text = f"{link.lag_ns / 1e9:.3f} s behind" if begins else "no message waits any more"
        event = Control(CONFLATION, self.now_ns(), "engine", text, every_ns)
        self._take_now(tape.CONTROL, event.encode())

    def _record_late(self, at: int, slot: int, recv_ns: int) -> int:
        """Put what only the clock knew before the record that it is about, as a replay needs it."""
        pipeline, recorder = self.pipeline, self._recorder
        assert recorder is not None
        venue, symbol = pipeline.names[slot]
        event = Control(
            INFERENCE_LATE,
            self.now_ns(),
            "clock",
            value=pipeline.late_ns,
            signal_seq=pipeline.signal_seq,
            venue=venue,
            symbol=symbol,
        )
        self._notice(f"inference late: {pipeline.late_ns / 1e9:.3f} s, {venue} {symbol}")
        return insert_record(recorder, at, tape.CONTROL, recv_ns, event.encode())

    def _take_now(self, kind: int, payload: bytes) -> None:
        """An event from beside the hot path: on the tape, taken, and what it moved told."""
        if self._recorder is None:
            return  # before the tape is open, or after it was closed
        self._take(kind, self.now_ns(), payload)
        self._tell_moved()

    def _take(self, kind: int, recv_ns: int, payload: bytes) -> None:
        """Record one event that did not come through `_drain`, and advance over it."""
        recorder = self._recorder
        assert recorder is not None
        recorder.room(self._room)
        recorder.append(kind, recv_ns, payload)
        length = tape.RECORD_HEADER_BYTES + tape.padded(len(payload))
        arena, end = recorder.room(0)
        self._step(arena, end - length, end, recv_ns)

    # Beside it.

    def _tell_moved(self) -> None:
        """Tell what an event has moved; cheap where it is nothing."""
        trust = self.pipeline.trust
        if trust.moves or trust.notes or trust.retired:
            self._tell_moves()

    def _tell_moves(self) -> None:
        self.oversight.report()
        self._publish_state()

    def _report(self, slot: int, book_state: int) -> None:
        severity = state.INFO if book_state == 0 else state.WARNING
        self._alert(slot, severity, f"book {BOOK_STATES[book_state]}")
        self._request_snapshots()

    def _alert(self, slot: int, severity: int, text: str) -> None:
        """Publish an alert about an instrument, or the engine where ``slot`` is below 0."""
        self._alert_seq += 1
        venue, symbol = self.pipeline.names[slot] if slot >= 0 else ("", "")
        self.publisher.publish(
            self._alert_topics[slot] if slot >= 0 else state.ALERT_TOPIC,
            state.encode_alert(
                self.epoch, self._alert_seq, self.now_ns(), venue, symbol, severity, text
            ),
        )

    def _request_snapshots(self) -> None:
        now = self.now_ns()
        for slot in self.pipeline.wanted_snapshots():
            if now - self._requested_ns[slot] > self.config.limits.snapshot_timeout_ns:
                self._requested_ns[slot] = now
                for feed in self._feeds:
                    feed.request_snapshot(*self.pipeline.names[slot])

    def _take_answers(self) -> None:
        for feed in self._feeds:
            for payload in feed.answers():
                if codec.template_id(payload) != wire.REJECT:
                    self._take(tape.MARKET, self.now_ns(), payload)

    def _tick(self) -> None:
        """Timer: one event on the tape, snapshots asked for again, state published."""
        now = self.now_ns()
        self._take(tape.TIMER, now, codec.encode_timer(now))
        self._request_snapshots()
        self.oversight.on_timer(now)
        if now >= self._next_state_ns:
            self._next_state_ns = now + STATE_EVERY_NS
            self._publish_state()
            rejected = self.pipeline.counters["rejected"]
            if rejected > self._rejected_told:
                self._rejected_told = rejected
                self._notice(f"{rejected} malformed messages, last: {self.pipeline.last_error()}")
            gc.collect(1)

    def _publish_state(self) -> None:
        self.account.state_seq += 1
        values = self.state_values()
        self.publisher.publish(state.STATE_TOPIC, state.encode_state(values))
        self.account.close_lag()

    def _malformed(self) -> int:
        return self._link.malformed + sum(feed.malformed for feed in self._feeds)

    def state_values(self) -> dict[str, Any]:
        """The fields of EngineState as they are now."""
        return self.account.state_values(self.now_ns(), self._malformed())

    async def run(self, seconds: float = 0.0) -> Totals:
        """Take events until `stop`, a signal, or ``seconds`` have passed (0: no limit)."""
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()
        for number in (os_signal.SIGINT, os_signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        loop.add_signal_handler(os_signal.SIGUSR1, self.oversight.halt, "signal", "SIGUSR1")
        cores.be_prompt()
        cores.refuse_huge_pages()
        if self.config.loop.core >= 0:
            cores.keep_to(self.config.loop.core, self.config.loop.io_core)
        gc.collect()
        gc.freeze()
        gc.disable()
        self.account.gc_pauses.watch()
        # A thread that opens a candidate gives the interpreter back this soon.
        sys.setswitchinterval(SWITCH_S)

        def slow_poll() -> None:
            self._take_answers()
            self.publisher.serve_joins()
            if self._stop:
                stopped.set()

        self._link.wake_for(loop_descriptor(loop))
        turns = Turns(
            loop,
            self._drain,
            on_slow_poll=slow_poll,
            on_timer=self._tick,
            timer_s=self.config.limits.timer_ns / 1e9,
        )
        readers: list[Reader] = [(self.publisher.fd, self.publisher.serve_joins)]
        readers += [(feed.dealer_fd, self._take_answers) for feed in self._feeds if feed.dealer]
        turns.start(readers)
        await self.oversight.start(loop)
        try:
            await turns.run(stopped, seconds)
        finally:
            await self.oversight.stop(loop)
            turns.stop()
            self.account.gc_pauses.close()
            gc.enable()
            gc.unfreeze()
            cores.let_go()
        self._publish_state()
        return self.totals()

    def totals(self) -> Totals:
        """What the session did so far."""
        values = self.state_values()
        rehearsals = 0 if self._rehearsal is None else self._rehearsal.rehearsals
        return self.account.totals(
            values, self._recorder, self.publisher.drops, rehearsals, self.start_up
        )

    def close(self) -> None:
        """Close the tape and every socket, let cores halt. Closing twice is fine."""
        self._wakefulness.close()
        if hasattr(self, "account"):
            self.account.close()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        for feed in self._feeds:
            feed.close()
        self._feeds = []
        if self._rehearsal is not None:
            self._rehearsal.close()
        if hasattr(self, "publisher"):
            self.publisher.close()
        if hasattr(self, "oversight"):
            self.oversight.close()
        self.pipeline.close()
        self._context.term()


def run_daemon(
    config: Config, notice: Notice, *, seconds: float = 0.0, on_ready: Callable[[Daemon], None]
) -> Totals:
    """Run a daemon to its end: connect, take events, close; what was recorded is kept.

    Returns
    -------
    Totals
    """
    daemon = Daemon(config, notice)
    try:
        daemon.connect()
        on_ready(daemon)
        if config.loop.uvloop:
            import uvloop

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(daemon.run(seconds))
        return asyncio.run(daemon.run(seconds))
    except KeyboardInterrupt:
        return daemon.totals()
    finally:
        daemon.close()
