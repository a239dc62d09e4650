"""The feeds' sockets, the pipeline and the publisher's socket, as `engine.live` needs them.

A kernel has only addresses; what stands here keeps alive what they are of, tells the kernel what a
turn may do, and takes over what one left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
import zmq

from engine import latency, live
from engine.config import LimitsConfig, OverloadConfig
from engine.handles import new_handles
from engine.lag import LAG, LONGEST, new_lag
from engine.pipeline import Pipeline
from engine.recorder import Recorder
from engine.shadow_ring import no_handles
from engine.waiting import NO_DESCRIPTOR, new_descriptors
from feeds import libzmq


class LiveLink:
    """What `live.take_waiting` works on, of one session.

    Parameters
    ----------
    pipeline : Pipeline
    feeds : list of zmq.Socket
        SUB sockets; this thread's own.
    publisher : zmq.Socket
    topics : list of bytes
        Of each instrument's signals.
    limits : LimitsConfig
    overload : OverloadConfig
    room : int
        Bytes of the tape that one message and what follows from it may take.
    now_ns, offset_ns : int
        Monotonic time, and from there to time since the UNIX epoch.

    Attributes
    ----------
    handles : ndarray of int64
        What `live.take_waiting` takes.
    latencies : ndarray
        From receipt to sent, see `engine.latency`.
    last : ndarray of uint8, shape (instruments, signal bytes)
        The last signal sent of each instrument.
    sent : ndarray of int64, shape (instruments,)
        How many were.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        feeds: list[zmq.Socket[bytes]],
        publisher: zmq.Socket[bytes],
        topics: list[bytes],
        limits: LimitsConfig,
        overload: OverloadConfig,
        *,
        room: int,
        now_ns: int,
        offset_ns: int,
    ) -> None:
        n = len(topics)
        self._pipeline = pipeline
        self._kept_open = (feeds, publisher)  # the kernel has only their addresses
        self._live = np.zeros(live.LIVE_FIELDS, dtype=np.int64)
        functions = libzmq.functions()
        self._live[: len(functions)] = functions
        self._live[live.PUBLISHER] = publisher.underlying
        self._live[live.MAX_BYTES] = limits.max_message_bytes
        self._live[live.ROOM] = room
        self._live[live.OFFSET_NS] = offset_ns
        self._live[live.CONFLATE_AFTER_NS] = overload.conflate_after_ns
        self._sockets = np.zeros((len(feeds), live.SOCKET_FIELDS), dtype=np.int64)
        self._sockets[:, live.SOCKET] = [feed.underlying for feed in feeds]
        self._topics = np.zeros((n, live.MAX_TOPIC_BYTES), dtype=np.uint8)
        for row, topic in zip(self._topics, topics, strict=True):
            row[: len(topic)] = np.frombuffer(topic, dtype=np.uint8)
        self._topic_bytes = np.array([len(topic) for topic in topics], dtype=np.int64)
        self.last: Final = np.zeros((n, pipeline.signal_bytes), dtype=np.uint8)
        self.sent: Final = np.zeros(n, dtype=np.int64)
        self.latencies: Final = latency.new_counts()
        self._lag = new_lag(now_ns)
        self._scrap = np.zeros(live.MAX_TOPIC_BYTES, dtype=np.uint8)
        feed_fds = [int(feed.getsockopt(zmq.FD)) for feed in feeds]
        self._descriptors = new_descriptors(NO_DESCRIPTOR, [*feed_fds, NO_DESCRIPTOR])
        self.handles: Final = new_handles(
            [
                *(self._live, self._sockets, self._topics, self._topic_bytes),
                *(self.last, self.sent, self.latencies, self._lag, self._scrap, self._descriptors),
            ]
        )
        self._room = room
        self._told: Final = self._live.data  # a number of it is read three times as fast
        self._no_shadow: Final = no_handles()
        self._rehearsal = np.zeros(0, dtype=np.int64)
        self._follow: Callable[[Pipeline], None] | None = None

    def rehearse(
        self, handles: np.ndarray, every_ns: int, alarm: int, follow: Callable[[Pipeline], None]
    ) -> None:
        """Rehearse while waiting; see `engine.warming`.

        Parameters
        ----------
        handles : ndarray of int64
        every_ns : int
            Above 0.
        alarm : int
            See `engine.waiting.new_alarm`; to be closed after the last `take`.
        follow : callable
            Told whenever the pipeline was prepared for another model or state of the engine.
        """
        assert every_ns > 0
        self._rehearsal, self._follow = handles, follow
        self._told[live.WARM_NS], self._told[live.ALARM] = every_ns, alarm
        self._descriptors[-1:] = new_descriptors(alarm, ())

    def for_one_message(self) -> np.ndarray:
        """Let a turn end behind its first message; what is to be kept so for the next."""
        self.begin(0, msgspec.structs.replace(LimitsConfig(), max_drain_messages=1))
        return self._live

    def begin(
        self,
        now_ns: int,
        limits: LimitsConfig,
        *,
        spin_ns: int = 0,
        wait_ns: int = 0,
        look_ns: int = live.NEVER_NS,
    ) -> None:
        """Begin a turn.

        Parameters
        ----------
        now_ns : int
            Monotonic time.
        limits : LimitsConfig
            A turn's budget, which a wait that a message ended begins anew.
        spin_ns : int
            Above 0: wait by looking for messages, and look so often whether the loop has something
            to do; else asleep.
        wait_ns : int
            Until when after ``now_ns`` to wait for a message where none does.
        look_ns : int
            Monotonic time from which on the turn ends behind a message where no other waits, and
            the shadow has answered.
        """
        told = self._told
        told[live.LEFT] = told[live.DRAIN_MESSAGES] = limits.max_drain_messages
        told[live.DRAIN_NS] = limits.max_drain_ns
        told[live.DEADLINE_NS] = now_ns + limits.max_drain_ns
        told[live.SPIN_NS], told[live.LOOP_AT_NS] = spin_ns, 0
        told[live.WAIT_UNTIL_NS] = now_ns + wait_ns
        told[live.LOOK_NS] = look_ns

    def wake_for(self, descriptor: int) -> None:
        """Let what happens at a descriptor end every sleep: the event loop's own."""
        self._descriptors[:1] = new_descriptors(descriptor, ())

    def take(self, recorder: Recorder, shadow: np.ndarray | None) -> int:
        """Take what waits: see `live.take_waiting`.

        Parameters
        ----------
        recorder : Recorder
            What messages and signals go onto.
        shadow : ndarray of int64 or None
            A shadow's handles.

        Raises
        ------
        zmq.ZMQError
            If a socket fails.
        """
        pipeline, told = self._pipeline, self._told
        arena, at = recorder.room(self._room)
        if not pipeline.prepared:
            pipeline.prepare(True, told[live.OFFSET_NS])
            if self._follow is not None:
                self._follow(pipeline)
        handed_to = self._no_shadow if shadow is None else shadow
        why: int = live.take_waiting(
            pipeline.handles, self.handles, handed_to, self._rehearsal, arena, at, pipeline.clip
        )
        if told[live.RECORDS]:
            recorder.advance(told[live.POSITION], told[live.RECORDS])
        if told[live.SENT]:
            pipeline.count(told[live.SENT], told[live.SENT_TRADABLE], told[live.SENT_SUPPRESSED :])
        if why in (live.SIGNAL_DUE, live.EVENT_TAKEN):
            pipeline.finish(arena)
        elif why == live.FAILED:
            raise zmq.ZMQError(told[live.ERROR])
        return why

    @property
    def record_at(self) -> int:
        """Where on the tape's window the last message stands."""
        return self._told[live.RECORD_AT]

    @property
    def received_ns(self) -> int:
        """When the last message was received."""
        return self._told[live.RECEIVED_NS]

    @property
    def ticket_before(self) -> int:
        """Inferences before the last message."""
        return self._told[live.TICKET_BEFORE]

    @property
    def malformed(self) -> int:
        """Messages dropped because they were not [topic, payload] or were too large."""
        return int(self._sockets[:, live.MALFORMED].sum())

    @property
    def conflating(self) -> bool:
        """Whether messages are conflated; what tells the kernel when to begin and to end."""
        return bool(self._told[live.CONFLATING])

    @conflating.setter
    def conflating(self, value: bool) -> None:
        self._told[live.CONFLATING] = value

    @property
    def lag_ns(self) -> int:
        """How far behind the last message was; see `engine.lag`."""
        return int(self._lag[LAG])

    @property
    def longest_lag_ns(self) -> int:
        """The longest lag since `forget_lag`."""
        return int(self._lag[LONGEST])

    def forget_lag(self) -> None:
        """Let `longest_lag_ns` begin anew."""
        self._lag[LONGEST] = self._lag[LAG]
