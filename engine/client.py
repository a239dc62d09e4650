"""The client library: signals as objects, with what was lost on the way.

`SignalClient` subscribes to a daemon's endpoint and is a plain and an asynchronous iterator. On
joining it gets the last value of each topic at once. Every signal says how many of its instrument
this client lost before it, and the client never hands out the same signal twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, get_args

import zmq
from zmq.utils.monitor import recv_monitor_message

from engine.conflicts import CONFLICT_MEMORY, MAX_EPOCHS, Conflicts, Heard
from engine.messages import Alert, EngineState, Message, Signal, decode
from feeds.endpoint import check_endpoint
from feeds.errors import InputError

DEFAULT_RECEIVE_HWM: Final = 100_000
MAX_MESSAGE_BYTES: Final = 1 << 20
MAX_TRACKED: Final = 65_536  # instruments whose sequence is followed
YIELD_EVERY: Final = 64  # messages an async iteration hands out before other tasks may run
SAFETY_POLL_S: Final = 0.25  # the socket's descriptor is edge-triggered
HEARTBEAT_MS: Final = 2_000
HEARTBEAT_TIMEOUT_MS: Final = 6_000


class SignalClient:
    """Subscribes to an engine; iterate over it, plainly or with ``async for``.

    Not for use from several threads. Malformed messages are counted and skipped, they never end
    an iteration; `close` does.

    Parameters
    ----------
    endpoint : str
        Where the engine publishes, for example ``tcp://127.0.0.1:5557``.
    topics : sequence of str
        Topic prefixes: ``signal.`` for every signal, ``signal.sim.ALPHA`` for one instrument,
        ``state.`` for `EngineState`, ``alert.`` for `Alert`.
    receive_hwm : int
        Messages queued here before ZeroMQ drops; what it drops is counted in `lost`.
    conflicts : str
        What is done where two engines publish one instrument. "mark": the signals of both are
        handed out, marked with ``conflict`` and ``conflict_why``. "refuse": of each instrument
        only those of the engine that was heard first are, until it has been silent for
        `CONFLICT_MEMORY` signals of the other; the other's are dropped and counted in `refused`.
        A restarted engine is followed either way, also as another version: at once where it has
        the same hashes or the connection was lost in between, else after that many signals.
    context : zmq.Context, optional
        Context to use; one of its own by default.

    Attributes
    ----------
    received : int
        Messages handed out.
    lost : int
        Signals that were published while this client was subscribed and never arrived, by
        ``signal_seq``. After a restart of the engine this includes the signals of the new run
        that were published before the client was connected again.
    duplicates : int
        Messages dropped because they were here before (last values sent again).
    malformed : int
        Messages that could not be decoded.
    restarts : int
        How often an instrument went over to a newer engine epoch.
    conflicts : int
        How often an instrument's engine was heard again after another one: two engines publish
        the same instrument. Signals are marked with ``conflict`` while this lasts.
    refused : int
        Signals of another engine that were dropped, with ``conflicts="refuse"``.
    untracked : int
        Messages beyond `MAX_TRACKED` instruments, handed out without loss detection.

    Raises
    ------
    InputError
        If the endpoint is none that ZeroMQ can connect to.

    Examples
    --------
    >>> with SignalClient("tcp://127.0.0.1:5557") as client:  # doctest: +SKIP
    ...     for signal in client:
    ...         if signal.tradable and not signal.lost_before:
    ...             print(signal.symbol, signal.predicted_class, signal.outputs)
    """

    def __init__(
        self,
        endpoint: str,
        topics: Sequence[str] = ("signal.",),
        *,
        receive_hwm: int = DEFAULT_RECEIVE_HWM,
        conflicts: Conflicts = "mark",
        context: zmq.Context[Any] | None = None,
    ) -> None:
        check_endpoint(endpoint, key="endpoint", where="client")
        assert not isinstance(topics, str), "topics is a sequence of prefixes"
        assert conflicts in get_args(Conflicts), f"conflicts is one of {get_args(Conflicts)}"
        if not topics:
            raise InputError("no topic to subscribe to", where=endpoint, expected='"signal."')
        self.endpoint, self.topics = endpoint, tuple(topics)
        self.received = self.lost = self.duplicates = self.malformed = 0
        self.restarts = self.conflicts = self.refused = self.untracked = 0
        self._refuse = conflicts == "refuse"
        self._sequences: dict[tuple[str, str, str], Heard] = {}
        self._connected = False
        self._breaks = 0  # lost connections
        self._own_context = context is None
        self._context = zmq.Context() if context is None else context
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, receive_hwm)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # A peer that died without closing its connection is noticed and connected to again.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        for topic in self.topics:
            self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise InputError(
                "cannot connect", where=endpoint, found=str(error), fix="check the endpoint"
            ) from None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._socket.closed)

    @property
    def connected(self) -> bool:
        """Whether a publisher is at the other end now (``tcp`` and ``ipc``)."""
        self._watch()
        return self._connected and not self.closed

    def _watch(self) -> None:
        while not self.closed and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._breaks += not self._connected

    def losses(self) -> dict[tuple[str, str], int]:
        """Signals lost of each (venue, symbol) seen so far."""
        return {
            (venue, symbol): sequence.lost
            for (kind, venue, symbol), sequence in self._sequences.items()
            if kind == Signal.kind
        }

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None after ``timeout_s`` seconds; None waits for ever."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.closed:
            message = self.receive_now()
            if message is not None:
                return message
            if deadline is None:
                self._socket.poll()
                continue
            left_ms = int((deadline - time.monotonic()) * 1_000)
            if left_ms <= 0 and not self._socket.poll(0):
                return None
            self._socket.poll(max(left_ms, 0))
        return None

    def receive_now(self) -> Message | None:
        """The next message that is here already, or None."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            message = decode(frames[1]) if len(frames) == 2 else None
            if message is None:
                self.malformed += 1
                continue
            if self._follow(message):
                self.received += 1
                return message

    def _follow(self, message: Message) -> bool:
        """Hold a message against what came before; False for one that is not handed out."""
        hashes = None
        if isinstance(message, Signal):
            key, seq = (message.kind, message.venue, message.symbol), message.signal_seq
            hashes = (
                message.model_hash,
                message.config_hash,
                message.feature_hash,
                message.code_hash,
            )
        elif isinstance(message, Alert):
            key, seq = (message.kind, message.venue, message.symbol), message.seq
        else:
            key, seq = (message.kind, "", ""), message.seq
        sequence = self._sequences.get(key)
        if sequence is None:
            if len(self._sequences) >= MAX_TRACKED:
                self.untracked += 1
                return True
            sequence = self._sequences[key] = Heard()
        epoch = message.engine_epoch
        if self._refuse and hashes is not None:
            if epoch != sequence.epoch:
                self._watch()
            judged = sequence.judge_refusing(epoch, seq, hashes, self._breaks)
        else:
            judged = sequence.judge(epoch, seq, hashes)
        if judged.verdict != "taken":
            self.duplicates += judged.verdict == "duplicate"
            self.refused += judged.verdict == "refused"
            return False
        self.restarts += judged.restarted
        self.conflicts += judged.noticed
        if isinstance(message, Signal):
            self.lost += judged.lost
            message.lost_before, message.restarted = judged.lost, judged.restarted
            message.conflict, message.conflict_why = judged.why != "", judged.why
        return True

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        message = self.receive()
        if message is None:
            raise StopIteration
        return message

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        message = await self.receive_async()
        if message is None:
            raise StopAsyncIteration
        return message

    async def receive_async(self, timeout_s: float | None = None) -> Message | None:
        """As `receive`, on the running event loop; being cancelled loses no message."""
        if self.received % YIELD_EVERY == YIELD_EVERY - 1:
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while not self.closed:
            message = self.receive_now()
            if message is not None:
                return message
            wait_s = SAFETY_POLL_S
            if deadline is not None:
                wait_s = min(wait_s, deadline - loop.time())
                if wait_s <= 0:
                    return None
            await self._readable(loop, wait_s)
        return None

    async def _readable(self, loop: asyncio.AbstractEventLoop, wait_s: float) -> None:
        ready = asyncio.Event()
        fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(fd, ready.set)
        try:
            await asyncio.wait_for(ready.wait(), wait_s)
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(fd)

    def close(self) -> None:
        """Leave, and end iterations. Closing twice is fine."""
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        if self._own_context:
            self._context.term()

    def __enter__(self) -> SignalClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


__all__ = [
    "CONFLICT_MEMORY",
    "MAX_EPOCHS",
    "Alert",
    "EngineState",
    "Signal",
    "SignalClient",
]
