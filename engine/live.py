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

from typing import Final

import numpy as np
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
from engine.handles import place, pointer
from engine.lag import LAG, emptied, received
from engine.shadow_ring import answers_wait, next_answer, submit_by
from engine.trust import SYNCED
from engine.waiting import HAPPENED_SHIFT, set_alarm, wait_for
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
ALARM: Final = 20  # descriptor of what ends a sleep then
LOOP_AT_NS: Final = 21  # monotonic: when to look for the loop's work
# What a call leaves.
POSITION: Final = 22  # of the tape
RECORDS: Final = 23  # put on it
RECORD_AT: Final = 24  # of the last message
RECEIVED_NS: Final = 25  # of the last message
SENT: Final = 26  # signals
SENT_TRADABLE: Final = 27
ERROR: Final = 28  # libzmq's
TICKET_BEFORE: Final = 29  # inferences before the last message
SENT_SUPPRESSED: Final = 30  # and behind it: how many had each of 16 reasons
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
_PIPELINE: Final = place(warming.ARRAYS, "pipeline")
_LINK: Final = place(warming.ARRAYS, "link")
_SHADOW: Final = place(warming.ARRAYS, "shadow")
_TAPE: Final = place(warming.ARRAYS, "tape")


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
            if now >= live[WARM_AT_NS] and live[WARM_NS] > 0:
                return REHEARSAL_DUE
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
    r = rehearsal_h
    h = carray(pointer(r[_PIPELINE], np.int64), (r[_PIPELINE + 1],))
    link_h = carray(pointer(r[_LINK], np.int64), (r[_LINK + 1],))
    shadow_h = carray(pointer(r[_SHADOW], np.int64), (r[_SHADOW + 1],))
    scratch = carray(pointer(r[_TAPE], np.uint8), (r[_TAPE + 1],))
    began = monotonic_ns()
    warming.cue(live, rehearsal_h)
    _take(h, link_h, shadow_h, scratch, np.int64(0), clip)
    warming.clear(live, rehearsal_h, arena, live[POSITION])
    ended = monotonic_ns()
    live[WARM_AT_NS] = ended + max(live[WARM_NS], warming.REST * (ended - began))
    if live[SPIN_NS] == 0:
        set_alarm(live[ALARM], live[WARM_AT_NS])


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
