"""Puts a simulator or a tape on ZeroMQ: at recorded, scaled or maximal speed, with snapshots.

One thread does everything: it sends, sleeps until the next message is due, answers snapshot
requests and sends heartbeats in between. The schedule is absolute on the monotonic clock, so
being late once shifts nothing: what is overdue is sent at once.
"""

from __future__ import annotations

import os
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Final

import msgspec
import numpy as np
import zmq

from feeds import codec, outgoing, wire
from feeds.departures import Batch, Departures
from feeds.errors import InputError
from feeds.faults import Fault, FaultInjector
from feeds.outlet import SEND_HWM, TOPIC_FLAGS, Outlet
from feeds.simulator import Simulator
from feeds.snapshots import SnapshotService
from feeds.tape_reader import TapeReader

HEARTBEAT_NS: Final = 1_000_000_000
PROGRESS_NS: Final = 250_000_000
SPIN_NS: Final = 50_000  # what a sleep may overshoot; `precise` spins so long
POLL_FROM_NS: Final = 3_000_000  # shorter waits sleep, longer ones wait on the sockets
TURN_MESSAGES: Final = 256  # sends between two looks at the clock
TURN_NS: Final = 2_000_000  # between two looks at the requests
IDLE_FOLD_ROWS: Final = 4_096
CHUNK_BYTES: Final = 1 << 18
MAX_SPEED: Final = 0.0


class Totals(msgspec.Struct):
    """What a publisher did; ``rate`` is in messages a second."""

    messages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    heartbeats: int = 0
    snapshots_served: int = 0
    snapshots_rejected: int = 0
    refused: int = 0
    loops: int = 0
    late_max_ms: float = 0.0
    interrupted: bool = False
    faults: dict[str, int] = {}
    endpoint: str = ""
    snapshots: str = ""


class Publisher:
    """Publishes one source. Bound on construction, so that `endpoint` is known before `run`.

    Parameters
    ----------
    source : Simulator or TapeReader or path-like
    bind_to : str
        Endpoint of the feed; ``tcp://127.0.0.1:*`` takes a free port.
    snapshots : str, optional
        Endpoint of the snapshot service; none without.
    speed : float
        1 is as recorded, 2 twice as fast, `MAX_SPEED` (0) without waiting.
    messages : int, optional
        Stop after so many messages of the source.
    seconds : float, optional
        Stop after so many seconds of the source's own time.
    epoch : int, optional
        What the source's epoch becomes; by default the start time in ns.
    keep_epoch : bool
        Leave epochs as they are instead.
    loop : bool
        Start a tape over at its end; seqs and times go on.
    lossless : bool, optional
        Wait for slow subscribers instead of dropping; by default at maximal speed only.
    stamp : bool
        Write the wall clock into each message's source time when it is sent.
    precise : bool
        Spin through the last 50 µs before a message is due.
    faults : sequence of Fault
    fault_seed : int
    send_hwm : int
        Messages that may wait for one subscriber.
    on_progress : callable, optional
        Given the `Totals` so far, a few times a second.

    Raises
    ------
    InputError
        If an endpoint is taken, or the source is no tape.
    """

    def __init__(
        self,
        source: Simulator | TapeReader | str | os.PathLike[str],
        bind_to: str = "tcp://127.0.0.1:5555",
        snapshots: str | None = "tcp://127.0.0.1:5556",
        *,
        speed: float = 1.0,
        messages: int | None = None,
        seconds: float | None = None,
        epoch: int | None = None,
        keep_epoch: bool = False,
        loop: bool = False,
        lossless: bool | None = None,
        stamp: bool = False,
        precise: bool = False,
        faults: Sequence[Fault] = (),
        fault_seed: int = 1,
        send_hwm: int = SEND_HWM,
        on_progress: Callable[[Totals], None] | None = None,
    ) -> None:
        if isinstance(source, str | os.PathLike):
            source = TapeReader(source, chunk_bytes=CHUNK_BYTES)
        if not speed >= 0.0:
            raise InputError("out of range", where="speed", expected="0 or more", found=str(speed))
        self._departures = Departures(
            source,
            messages=messages,
            seconds=seconds,
            epoch=epoch,
            keep_epoch=keep_epoch,
            loop=loop,
        )
        self.instruments = self._departures.instruments
        self._topics = [codec.topic("l2", x.venue, x.symbol) for x in self.instruments]
        self._speed = speed
        self._messages = messages
        self._seconds = seconds
        self._stamp = stamp
        self._precise = precise
        self._faults = FaultInjector(faults, fault_seed) if faults else None
        self._on_progress = on_progress
        self._published = 0
        self._start_ns = 0
        self._heartbeat_due_ns = 0
        self._progress_due_ns = 0
        self._turn_due_ns = 0
        self.totals = Totals()

        self._outlet = Outlet(
            bind_to,
            snapshots,
            lossless=(speed == MAX_SPEED) if lossless is None else lossless,
            send_hwm=send_hwm,
        )
        self.endpoint = self.totals.endpoint = self._outlet.endpoint
        self.snapshot_endpoint = self.totals.snapshots = self._outlet.snapshot_endpoint
        self._service = SnapshotService(
            self._outlet.router, self.instruments, self._departures.book, self._numbers_sent
        )
        if snapshots:
            self._outlet.service = self._service

    def _numbers_sent(self, slot: int) -> tuple[int, int, int]:
        epoch, seq, exchange_ns = self._departures.numbers(slot)
        if self._faults is not None:
            epoch, seq = self._faults.numbers(self._topics[slot], epoch, seq)
        return epoch, seq, exchange_ns

    # Sending.

    def _send(self, topic: bytes, payload: bytes | memoryview) -> None:
        if self._outlet.send(topic, payload):
            self.totals.messages += 1
            self.totals.bytes += len(payload)

    def _send_definitions(self) -> None:
        for slot, meta in enumerate(self.instruments):
            epoch, seq, exchange_ns = self._numbers_sent(slot)
            if epoch < 0:
                continue
            self._send(
                self._topics[slot],
                codec.encode_instrument(
                    meta.source_id,
                    meta.instrument_id,
                    epoch,
                    seq,
                    meta.venue,
                    meta.symbol,
                    Decimal(meta.tick),
                    Decimal(meta.lot),
                    exchange_ns,
                    exchange_ns,
                ),
            )

    def _send_heartbeats(self) -> None:
        for slot, meta in enumerate(self.instruments):
            topic = self._topics[slot]
            if self._faults is not None and self._faults.stalled(topic):
                continue
            epoch, seq, exchange_ns = self._numbers_sent(slot)
            if epoch < 0:
                continue
            key = (meta.source_id, meta.instrument_id, epoch, seq)
            self._send(topic, codec.encode_heartbeat(*key, exchange_ns, exchange_ns))
            self.totals.heartbeats += 1

    # Between sends.

    def _turn(self, now_ns: int) -> None:
        self._turn_due_ns = now_ns + TURN_NS
        self._outlet.serve()
        if now_ns >= self._heartbeat_due_ns:
            self._heartbeat_due_ns = now_ns + HEARTBEAT_NS
            self._send_heartbeats()
        if self._on_progress is not None and now_ns >= self._progress_due_ns:
            self._progress_due_ns = now_ns + PROGRESS_NS
            self._count(now_ns)
            self._on_progress(self.totals)

    def _wait(self, due_ns: int) -> None:
        while not self._outlet.stopped.is_set():
            now_ns = time.monotonic_ns()
            left_ns = due_ns - now_ns
            if left_ns <= 0:
                return
            if left_ns > POLL_FROM_NS:
                self._turn(now_ns)
                if self._departures.books.pending_rows > IDLE_FOLD_ROWS:
                    self._departures.books.fold()
                    continue
                # Poll rounds up to the millisecond clock: leave the rest to a sleep.
                self._outlet.poll(left_ns // 1_000_000 - 2)
            elif not self._precise:
                time.sleep(left_ns * 1e-9)
            elif left_ns > SPIN_NS:
                time.sleep((left_ns - SPIN_NS) * 1e-9)

    def wait_subscribers(self, count: int) -> None:
        """Serve until some instrument has so many subscribers."""
        self._outlet.wait_subscribers(self._topics, count)

    # The run.

    def run(self) -> Totals:
        """Publish until the source ends, a limit is reached, `stop` is called, or Ctrl-C.

        Raises
        ------
        InputError
            At damage in a tape; what stands before it was sent.
        """
        self._start_ns = time.monotonic_ns()
        try:
            self._heartbeat_due_ns = self._start_ns + HEARTBEAT_NS
            first_ns: int | None = None
            for batch in self._departures.batches():
                if first_ns is None:
                    first_ns = int(batch.places[0, outgoing.RECV_NS])
                    self._send_definitions()
                    self._start_ns = time.monotonic_ns()
                if not self._send_batch(batch, first_ns):
                    break
            if self._faults is not None:
                for topic, payload in self._faults.flush():
                    self._send(topic, payload)
            self._send_heartbeats()  # so that a loss at the end shows
        except KeyboardInterrupt:
            self.totals.interrupted = True
        finally:
            self._count(time.monotonic_ns())
            self.close()
        return self.totals

    def _send_batch(self, batch: Batch, first_ns: int) -> bool:
        """Send one batch when its messages are due; False when the run is over."""
        places = batch.places
        count = len(places)
        recv_ns = places[:, outgoing.RECV_NS] - first_ns
        whole = True
        if self._seconds is not None:
            late = np.flatnonzero(recv_ns >= round(self._seconds * 1e9))
            if len(late):
                count, whole = int(late[0]), False
        if self._messages is not None:
            left = self._messages - self._published
            if left <= count:
                count, whole = left, False
        due: list[int] = []
        if self._speed != MAX_SPEED:
            order = np.maximum.accumulate(recv_ns[:count])
            due = (self._start_ns + order / self._speed).astype(np.int64).tolist()
        messages = list(
            zip(
                places[:count, outgoing.OFFSET].tolist(),
                places[:count, outgoing.LENGTH].tolist(),
                places[:count, outgoing.SLOT].tolist(),
                strict=True,
            )
        )
        at = 0
        while at < count and not self._outlet.stopped.is_set():
            stop = min(at + TURN_MESSAGES, count)
            now_ns = time.monotonic_ns()
            if due:
                if due[at] > now_ns:
                    self._wait(due[at])
                    now_ns = time.monotonic_ns()
                    if self._outlet.stopped.is_set():
                        break
                self._note_late(now_ns - due[at])
                stop = bisect_right(due, max(now_ns, due[at]), at, stop)
            if now_ns >= self._turn_due_ns:
                self._turn(now_ns)
            self._send_messages(batch.view, messages[at:stop])
            self._departures.sent = at = stop
        return whole and at == count and not self._outlet.stopped.is_set()

    def _send_messages(self, view: memoryview, messages: list[tuple[int, int, int]]) -> None:
        """Send what is due, without a look at the clock."""
        topics, faults, totals = self._topics, self._faults, self.totals
        self._published += len(messages)
        if self._stamp:
            now_ns = time.time_ns()
            for at, _, _ in messages:
                struct.pack_into("<q", view, at + wire.AT_SOURCE_TIME, now_ns)
        if faults is not None:
            for at, length, slot in messages:
                for topic, payload in faults.push(topics[slot], bytes(view[at : at + length])):
                    self._send(topic, payload)
            return
        send = self._outlet.feed.send
        for at, length, slot in messages:
            while True:
                try:
                    send(topics[slot], TOPIC_FLAGS)
                    break
                except zmq.Again:  # only where lossless: a subscriber is slow
                    if not self._outlet.wait_for_room():
                        return
            send(view[at : at + length], 0)
            totals.messages += 1
            totals.bytes += length

    def _note_late(self, late_ns: int) -> None:
        if late_ns * 1e-6 > self.totals.late_max_ms:
            self.totals.late_max_ms = round(late_ns * 1e-6, 3)

    def _count(self, now_ns: int) -> None:
        totals = self.totals
        totals.seconds = (now_ns - self._start_ns) * 1e-9
        totals.rate = totals.messages / totals.seconds if totals.seconds > 0 else 0.0
        totals.refused = self._departures.refused
        totals.loops = self._departures.loops
        totals.snapshots_served = self._service.served
        totals.snapshots_rejected = self._service.rejected
        if self._faults is not None:
            totals.faults = dict(self._faults.counts)

    def stop(self) -> None:
        """End `run` soon; safe from another thread or a signal handler."""
        self._outlet.stopped.set()

    def close(self) -> None:
        """Release the sockets; what was sent still goes out, for a bounded time."""
        self._outlet.close()
