# Hot path: `take_waiting` and what it calls, free @njit functions.
"""From the feeds' sockets to the publisher's without Python in between.

`take_waiting` receives a message straight onto the tape, advances and answers over it
(`engine.answering`), sends the signal that it makes due, records that, and hands the inference to
the shadow; then the next message. Where none waits it takes what the shadow has answered, one by
one, and then waits until a message comes, asleep (`engine.waiting`) or looking, and it may rehearse
meanwhile (`engine.warming`). It returns for the event loop's sake, and for what is rare or needs
Python: a signal that cannot be sent, that is not about a whole book or that the rules are to see; a
model on another device; an answer of the shadow that may move something; a full window of the tape;
messages that are to be conflated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
import zmq
from numba import carray, njit

from engine import latency, signals, warming
from engine.advance import EVENT_DUE, FIRED_SLOT
from engine.answering import (
    JUDGE,
    NEW_STREAM,
    SIGNALS,
    SUPPRESSED,
    TICKET,
    TRADABLE,
    place_of,
    serve,
)
from engine.config import LimitsConfig, OverloadConfig
from engine.handles import new_handles, pointer
from engine.lag import LAG, LONGEST, emptied, new_lag, received
from engine.pipeline import Pipeline
from engine.recorder import Recorder
from engine.shadow_ring import answers_wait, next_answer, no_handles, submit_by
from engine.trust import SYNCED
from engine.waiting import HAPPENED_SHIFT, NO_DESCRIPTOR, new_descriptors, wait_for
from feeds import libzmq, tape
from feeds.inner import inner
from feeds.libzmq import DONTWAIT, EAGAIN, EINTR, SNDMORE, last_error, more_follows, transfer
from feeds.monotonic import monotonic_ns
from feeds.tape import RECORD_HEADER_BYTES, put_record

MAX_TOPIC_BYTES: Final = 256
NEVER_NS: Final = 1 << 62

# Columns of `live`, int64. The first four are those of `feeds.libzmq.functions`.
PUBLISHER: Final = 4  # address of the socket that signals leave by
MAX_BYTES: Final = 5  # of a message
ROOM: Final = 6  # bytes of the tape that one message and its signal may take
OFFSET_NS: Final = 7  # from the monotonic clock to time since the epoch
DEADLINE_NS: Final = 8  # monotonic: a turn ends
LEFT: Final = 9  # messages until a turn ends
SPIN_NS: Final = 10  # above 0: wait by looking, and look so often whether the loop has work
WAIT_UNTIL_NS: Final = 11  # monotonic: how long to wait until a message comes
LOOK_NS: Final = 12  # monotonic: from when on what the shadow says ends a call where none waits
DRAIN_NS: Final = 13  # of a turn, and how many messages: what a sleep that ended begins anew
DRAIN_MESSAGES: Final = 14
CONFLATE_AFTER_NS: Final = 15  # of lag
CONFLATING: Final = 16
FEED: Final = 17  # to look at next
WARM_NS: Final = 18  # between two rehearsals; 0 is none
WARM_AT_NS: Final = 19  # monotonic: when the next is due
LOOP_AT_NS: Final = 20  # monotonic: when to look for the loop's work
# What a call leaves.
POSITION: Final = 21  # of the tape
RECORDS: Final = 22  # put on it
RECORD_AT: Final = 23  # of the last message
RECEIVED_NS: Final = 24  # of the last message
SENT: Final = 25  # signals
SENT_TRADABLE: Final = 26
ERROR: Final = 27  # libzmq's
TICKET_BEFORE: Final = 28  # inferences before the last message
SENT_SUPPRESSED: Final = 29  # and behind it: how many had each of 16 reasons
LIVE_FIELDS: Final = SENT_SUPPRESSED + 16

# Columns of `sockets`, int64.
SOCKET: Final = 0
MALFORMED: Final = 1
SOCKET_FIELDS: Final = 2

# Why a call returned.
REHEARSAL_DUE: Final = -1  # of `_take`
NOTHING_WAITS: Final = 0
TURN_ENDED: Final = 1
WINDOW_FULL: Final = 2
SIGNAL_DUE: Final = 3  # `Pipeline.finish` has it, or `Pipeline.answer` is to make it
BEHIND: Final = 4  # so far that messages are to be conflated
CAUGHT_UP: Final = 5
FAILED: Final = 6
EVENT_TAKEN: Final = 7  # an answer of the shadow, by Python; it may have moved something

# What `_receive` may give instead of a length.
_NONE: Final = -1
_BAD: Final = -2
_BROKEN: Final = -3

# Places of what is used here among the pipeline's handles.
_SHARED: Final = place_of("shared")
_FACTS: Final = place_of("facts")
_X: Final = place_of("x")
_ROUND: Final = place_of("round")
_OUT: Final = place_of("out")
# And of a rehearsal, among its own.
_PIPELINE: Final = warming.place_of("pipeline")
_LINK: Final = warming.place_of("link")
_SHADOW: Final = warming.place_of("shadow")
_TAPE: Final = warming.place_of("tape")


@inner("int64(int64[::1], int64[::1], uint8[::1], uint8[::1], int64)")
def _receive(live, socket, scrap, arena, body):  # type: ignore[no-untyped-def]
    """One message's payload into ``arena[body:]``: its length, or why there is none."""
    recv, more = live[libzmq.RECV], live[libzmq.GETSOCKOPT]
    at = socket[SOCKET]
    got = transfer(recv, at, scrap.ctypes.data, MAX_TOPIC_BYTES, DONTWAIT)
    if got < 0:
        live[ERROR] = last_error(live[libzmq.ERRNO])
        return _NONE if live[ERROR] == EAGAIN or live[ERROR] == EINTR else _BROKEN
    if more_follows(more, at) == 0:
        socket[MALFORMED] += 1
        return _BAD
    length = transfer(recv, at, arena.ctypes.data + body, live[MAX_BYTES], DONTWAIT)
    if more_follows(more, at) == 0 and length <= live[MAX_BYTES]:
        return length
    while more_follows(more, at) == 1:
        transfer(recv, at, scrap.ctypes.data, MAX_TOPIC_BYTES, DONTWAIT)
    socket[MALFORMED] += 1
    return _BAD


@inner("boolean(int64[::1], uint8[:,::1], int64[::1], uint8[:,::1], int64)")
def _send(live, topics, topic_bytes, last, slot):  # type: ignore[no-untyped-def]
    """Send an instrument's last signal; False where the socket would make us wait."""
    send, at = live[libzmq.SEND], live[PUBLISHER]
    topic = topics.ctypes.data + slot * topics.shape[1]
    if transfer(send, at, topic, topic_bytes[slot], DONTWAIT | SNDMORE) < 0:
        return False
    # Only a first frame can meet a full queue: libzmq counts whole messages.
    transfer(send, at, last.ctypes.data + slot * last.shape[1], last.shape[1], DONTWAIT)
    return True


@inner("int64(int64[::1], int64[::1], int64[::1], uint8[::1], int64, float64)")
def _take(h, live_h, shadow_h, arena, position, clip):  # type: ignore[no-untyped-def]
    """As `take_waiting`, until a rehearsal is due at the latest."""
    live = carray(pointer(live_h[0], np.int64), (live_h[1],))
    sockets = carray(pointer(live_h[5], np.int64), (live_h[6], live_h[7]))
    topics = carray(pointer(live_h[10], np.uint8), (live_h[11], live_h[12]))
    topic_bytes = carray(pointer(live_h[15], np.int64), (live_h[16],))
    last = carray(pointer(live_h[20], np.uint8), (live_h[21], live_h[22]))
    sent = carray(pointer(live_h[25], np.int64), (live_h[26],))
    latencies = carray(pointer(live_h[30], np.int64), (live_h[31],))
    lag = carray(pointer(live_h[35], np.int64), (live_h[36],))
    scrap = carray(pointer(live_h[40], np.uint8), (live_h[41],))
    descriptors = carray(pointer(live_h[45], np.int64), (live_h[46],))
    shared = carray(pointer(h[_SHARED], np.int64), (h[_SHARED + 1],))
    facts = carray(pointer(h[_FACTS], np.int64), (h[_FACTS + 1],))
    x = carray(pointer(h[_X], np.float32), (h[_X + 1], h[_X + 2]))
    round = carray(pointer(h[_ROUND], np.int64), (h[_ROUND + 1],))
    out = carray(pointer(h[_OUT], np.uint8), (h[_OUT + 1],))
    size = last.shape[1]
    offset = live[OFFSET_NS]
    live[POSITION] = position
    while True:
        if position + live[ROOM] > len(arena):
            return WINDOW_FULL
        length = np.int64(_NONE)
        for _ in range(len(sockets)):
            feed = live[FEED]
            live[FEED] = feed + 1 if feed + 1 < len(sockets) else 0
            length = _receive(live, sockets[feed], scrap, arena, position + RECORD_HEADER_BYTES)
            if length != _NONE:
                break
        if length == _NONE:
            now = monotonic_ns()
            emptied(lag, now)
            if live[CONFLATING] == 1:
                return CAUGHT_UP
            if answers_wait(shadow_h):
                start = position
                length = next_answer(shadow_h, arena, start + RECORD_HEADER_BYTES)
                if length > 0:
                    position = put_record(arena, start, tape.SHADOW, now + offset, length)
                    live[RECORDS] += 1
                    live[POSITION] = position
                    serve(h, arena, start, position, clip, size)
                    if shared[FIRED_SLOT] == EVENT_DUE:
                        return EVENT_TAKEN
                    continue
                if live[RECORDS] > 0 and now >= live[LOOK_NS]:
                    return NOTHING_WAITS
            until = live[WAIT_UNTIL_NS]
            if now >= until:
                return NOTHING_WAITS
            if live[WARM_NS] > 0:
                if now >= live[WARM_AT_NS]:
                    return REHEARSAL_DUE
                until = min(until, live[WARM_AT_NS])
            if live[SPIN_NS] == 0:
                told = wait_for(descriptors.ctypes.data, len(descriptors), until - now)
            elif now < live[LOOP_AT_NS]:
                continue
            else:
                live[LOOP_AT_NS] = now + live[SPIN_NS]
                told = wait_for(descriptors.ctypes.data, 1, 0)
            if told > 0 and descriptors[0] >> HAPPENED_SHIFT != 0:
                return NOTHING_WAITS
            live[LEFT] = live[DRAIN_MESSAGES]
            live[DEADLINE_NS] = monotonic_ns() + live[DRAIN_NS]
            continue
        if length == _BROKEN:
            return FAILED
        live[LEFT] -= 1
        if length == _BAD:
            if live[LEFT] <= 0:
                return TURN_ENDED
            continue
        now = monotonic_ns()
        start = position
        position = put_record(arena, start, tape.MARKET, now + offset, length)
        live[RECORD_AT] = start
        live[RECEIVED_NS] = now + offset
        live[RECORDS] += 1
        live[POSITION] = position
        received(lag, arena, start + RECORD_HEADER_BYTES, length, now, offset)
        live[TICKET_BEFORE] = round[TICKET]
        serve(h, arena, start, position, clip, size)
        slot = shared[FIRED_SLOT]
        if round[SIGNALS] == 0:
            if slot >= 0:
                return SIGNAL_DUE
        else:
            if round[JUDGE] != 0 or out[signals.AT_BOOK_STATE] != SYNCED:
                return SIGNAL_DUE
            for i in range(size):
                last[slot, i] = out[i]
            if not _send(live, topics, topic_bytes, last, slot):
                return SIGNAL_DUE
            sent_ns = monotonic_ns()
            sent[slot] += 1
            live[SENT] += 1
            live[SENT_TRADABLE] += round[TRADABLE]
            if round[TRADABLE] == 0:
                for bit in range(16):
                    live[SENT_SUPPRESSED + bit] += round[SUPPRESSED + bit]
            body = position + RECORD_HEADER_BYTES
            for i in range(size):
                arena[body + i] = out[i]
            position = put_record(arena, position, tape.SIGNAL, sent_ns + offset, size)
            live[RECORDS] += 1
            live[POSITION] = position
            latency.record(latencies, sent_ns - now)
            if round[TICKET] != live[TICKET_BEFORE]:
                seq = facts[signals.FACT_SIGNAL_SEQ]
                submit_by(shadow_h, round[TICKET], slot, seq, round[NEW_STREAM], x)
        if live[CONFLATING] == 0 and lag[LAG] > live[CONFLATE_AFTER_NS] > 0:
            return BEHIND
        if live[LEFT] <= 0 or now > live[DEADLINE_NS]:
            return TURN_ENDED


@inner("void(int64[::1], int64[::1], uint8[::1], float64)")
def _rehearse(live, rehearsal_h, arena, clip):  # type: ignore[no-untyped-def]
    """Take a message of the rehearsal's, in the same code as the session's."""
    handles, link, shadow = _PIPELINE, _LINK, _SHADOW
    h = carray(pointer(rehearsal_h[handles], np.int64), (rehearsal_h[handles + 1],))
    link_h = carray(pointer(rehearsal_h[link], np.int64), (rehearsal_h[link + 1],))
    shadow_h = carray(pointer(rehearsal_h[shadow], np.int64), (rehearsal_h[shadow + 1],))
    scratch = carray(pointer(rehearsal_h[_TAPE], np.uint8), (rehearsal_h[_TAPE + 1],))
    warming.cue(live, rehearsal_h)
    _take(h, link_h, shadow_h, scratch, np.int64(0), clip)
    warming.clear(live, rehearsal_h, arena, live[POSITION])
    live[WARM_AT_NS] = monotonic_ns() + live[WARM_NS]


@njit(
    "int64(int64[::1], int64[::1], int64[::1], int64[::1], uint8[::1], int64, float64)",
    cache=True,
    nogil=True,
)
def take_waiting(  # type: ignore[no-untyped-def]
    h, live_h, shadow_h, rehearsal_h, arena, position, clip
):
    """Take messages and send signals until none comes or Python has to do something.

    Parameters
    ----------
    h : ndarray of int64
        The pipeline's handles, after `Pipeline.prepare`.
    live_h : ndarray of int64
        Handles of what a `LiveLink` holds.
    shadow_h : ndarray of int64
        See `engine.shadow_ring.set_handles`.
    rehearsal_h : ndarray of int64
        See `engine.warming`; not looked at where there are no rehearsals.
    arena : ndarray of uint8
        A window of the tape.
    position : int
        Where the next record goes.
    clip : float
        Of the model's input.

    Returns
    -------
    int
        `NOTHING_WAITS` to `EVENT_TAKEN`; ``live`` has the rest.
    """
    live = carray(pointer(live_h[0], np.int64), (live_h[1],))
    live[RECORDS] = 0
    live[SENT:] = 0
    why = _take(h, live_h, shadow_h, arena, position, clip)
    while why == REHEARSAL_DUE:
        _rehearse(live, rehearsal_h, arena, clip)
        why = _take(h, live_h, shadow_h, arena, live[POSITION], clip)
    return why


class LiveLink:
    """The feeds' sockets, the pipeline and the publisher's socket, as `take_waiting` needs them.

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
        What `take_waiting` takes.
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
        self._live = np.zeros(LIVE_FIELDS, dtype=np.int64)
        functions = libzmq.functions()
        self._live[: len(functions)] = functions
        self._live[PUBLISHER] = publisher.underlying
        self._live[MAX_BYTES] = limits.max_message_bytes
        self._live[ROOM] = room
        self._live[OFFSET_NS] = offset_ns
        self._live[CONFLATE_AFTER_NS] = overload.conflate_after_ns
        self._sockets = np.zeros((len(feeds), SOCKET_FIELDS), dtype=np.int64)
        self._sockets[:, SOCKET] = [feed.underlying for feed in feeds]
        self._topics = np.zeros((n, MAX_TOPIC_BYTES), dtype=np.uint8)
        for row, topic in zip(self._topics, topics, strict=True):
            row[: len(topic)] = np.frombuffer(topic, dtype=np.uint8)
        self._topic_bytes = np.array([len(topic) for topic in topics], dtype=np.int64)
        self.last: Final = np.zeros((n, pipeline.signal_bytes), dtype=np.uint8)
        self.sent: Final = np.zeros(n, dtype=np.int64)
        self.latencies: Final = latency.new_counts()
        self._lag = new_lag(now_ns)
        self._scrap = np.zeros(MAX_TOPIC_BYTES, dtype=np.uint8)
        feed_fds = [int(feed.getsockopt(zmq.FD)) for feed in feeds]
        self._descriptors = new_descriptors(NO_DESCRIPTOR, feed_fds)
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
        self, handles: np.ndarray, every_ns: int, follow: Callable[[Pipeline], None]
    ) -> None:
        """Rehearse while waiting; see `engine.warming`.

        Parameters
        ----------
        handles : ndarray of int64
        every_ns : int
            Above 0.
        follow : callable
            Told whenever the pipeline was prepared for another model or state of the engine.
        """
        assert every_ns > 0
        self._rehearsal, self._follow = handles, follow
        self._told[WARM_NS] = every_ns

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
        look_ns: int = NEVER_NS,
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
        told[LEFT] = told[DRAIN_MESSAGES] = limits.max_drain_messages
        told[DRAIN_NS] = limits.max_drain_ns
        told[DEADLINE_NS] = now_ns + limits.max_drain_ns
        told[SPIN_NS], told[LOOP_AT_NS] = spin_ns, 0
        told[WAIT_UNTIL_NS] = now_ns + wait_ns
        told[LOOK_NS] = look_ns

    def wake_for(self, descriptor: int) -> None:
        """Let what happens at a descriptor end every sleep: the event loop's own."""
        self._descriptors[:1] = new_descriptors(descriptor, ())

    def take(self, recorder: Recorder, shadow: np.ndarray | None) -> int:
        """Take what waits: see `take_waiting`.

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
            pipeline.prepare(True, told[OFFSET_NS])
            if self._follow is not None:
                self._follow(pipeline)
        handed_to = self._no_shadow if shadow is None else shadow
        why: int = take_waiting(
            pipeline.handles, self.handles, handed_to, self._rehearsal, arena, at, pipeline.clip
        )
        if told[RECORDS]:
            recorder.advance(told[POSITION], told[RECORDS])
        if told[SENT]:
            pipeline.count(told[SENT], told[SENT_TRADABLE], told[SENT_SUPPRESSED:])
        if why in (SIGNAL_DUE, EVENT_TAKEN):
            pipeline.finish(arena)
        elif why == FAILED:
            raise zmq.ZMQError(told[ERROR])
        return why

    @property
    def record_at(self) -> int:
        """Where on the tape's window the last message stands."""
        return self._told[RECORD_AT]

    @property
    def received_ns(self) -> int:
        """When the last message was received."""
        return self._told[RECEIVED_NS]

    @property
    def ticket_before(self) -> int:
        """Inferences before the last message."""
        return self._told[TICKET_BEFORE]

    @property
    def malformed(self) -> int:
        """Messages dropped because they were not [topic, payload] or were too large."""
        return int(self._sockets[:, MALFORMED].sum())

    @property
    def conflating(self) -> bool:
        """Whether messages are conflated; what tells `take_waiting` when to begin and to end."""
        return bool(self._told[CONFLATING])

    @conflating.setter
    def conflating(self, value: bool) -> None:
        self._told[CONFLATING] = value

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
