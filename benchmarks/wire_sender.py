# Hot path: `send_due`, a free @njit function.
"""Sends a tape's messages by a schedule, and says how late each was.

Everything is made ready before the first message is due: the tape's messages lie in memory as a
publisher numbers them, a further pass over the tape adds the same three steps to each, and the book
of what was sent is folded when somebody asks. So in a schedule nothing happens but waiting and
`zmq_send`, both in native code.
"""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any, Final, NamedTuple

import numpy as np
import zmq
from numba import njit

from benchmarks.sleep import sleep_until
from feeds import codec, libzmq, outgoing, wire
from feeds.departures import Departures
from feeds.errors import InputError
from feeds.libzmq import SNDMORE, last_error, transfer
from feeds.monotonic import monotonic_ns
from feeds.rawbytes import load_i64, store_i64
from feeds.snapshots import BookFold
from feeds.tape import InstrumentMeta
from feeds.tape_reader import TapeReader

TURN_NS: Final = 100_000_000  # that Python waits for a call at most, but for one send
NOT_DUE_NS: Final = 0  # when what is on no schedule should leave
# A sleep ends later than it should, on a virtual machine by 13 to 25 µs, depending on how deep the
# core slept. So sleeps are ended that much before a message is due, and only what is left is spun:
# with as many busy processes as cores, a longer spin takes the core from those that are measured.
# Shorter waits than that are spun whole: a sleep would cost the core as much (12 µs, for the timer
# and two switches) and end late. The lead follows the upper quartile of what sleeps took, by steps
# whose sizes are as the odds (Robbins and Monro, "A Stochastic Approximation Method", 1951): one
# long interruption hardly moves it.
FIRST_LEAD_NS: Final = 15_000
MAX_LEAD_NS: Final = 50_000
LONGER_NS: Final = 300
SHORTER_NS: Final = 100

# Columns of `state`, int64. The first four are those of `feeds.libzmq.functions`.
SOCKET: Final = 4
NEXT: Final = 5  # row of `places`
PASS: Final = 6  # over the tape, from 0
EPOCH_STEP: Final = 7  # of one pass; the next two as well
SEQ_STEP: Final = 8
TIME_STEP_NS: Final = 9
LEAD_NS: Final = 10
ERROR: Final = 11  # libzmq's
STATE_FIELDS: Final = 12

# Columns of `Market.places`.
OFFSET: Final = 0
LENGTH: Final = 1
ROWS: Final = 2  # of `Market.changes`, up to and with this message
PLACE_COLUMNS: Final = 3

SETTLE_S: Final = 0.1

_FAILED: Final = -1


@njit(
    "int64(int64[::1], uint8[::1], int64[:,::1], uint8[::1], int64[::1], int64[::1], int64,"
    " boolean)",
    cache=True,
    nogil=True,
)
def send_due(state, messages, places, topic, due, late, done, stamp_due):  # type: ignore[no-untyped-def]
    """Send messages when they are due, for at most `TURN_NS`.

    Parameters
    ----------
    state : ndarray of int64, shape (STATE_FIELDS,)
    messages : ndarray of uint8
        Of the tape; each is made what it is on this pass as it leaves.
    places : ndarray of int64, shape (n, PLACE_COLUMNS)
        Where they are.
    topic : ndarray of uint8
    due : ndarray of int64, shape (m,)
        When each should leave, ns of the monotonic clock, rising.
    late : ndarray of int64, shape (m,)
        Out: how much later each had left, ns.
    done : int
        How many of ``due`` have left.
    stamp_due : bool
        Each says when it should have left; else when it left.

    Returns
    -------
    int
        How many have left, or -1 if libzmq failed.
    """
    now = monotonic_ns()
    end = now + TURN_NS
    while done < len(due):
        moment = due[done]
        while now < moment:
            if now > end:
                return done
            wake = min(moment - state[LEAD_NS], end)
            if wake > now:
                interrupted = sleep_until(wake)
                now = monotonic_ns()
                if interrupted != 0:
                    return done
                if now - wake > state[LEAD_NS]:
                    state[LEAD_NS] = min(state[LEAD_NS] + LONGER_NS, MAX_LEAD_NS)
                else:
                    state[LEAD_NS] = max(state[LEAD_NS] - SHORTER_NS, 0)
            else:
                now = monotonic_ns()
        if now > end:
            return done
        if state[NEXT] == len(places):
            state[NEXT] = 0
            state[PASS] += 1
        row = state[NEXT]
        at = places[row, OFFSET]
        if state[PASS] > 0:
            for field, step in (
                (wire.AT_EPOCH, EPOCH_STEP),
                (wire.AT_SEQ, SEQ_STEP),
                (wire.AT_EXCHANGE_TIME, TIME_STEP_NS),
            ):
                store_i64(messages, at + field, load_i64(messages, at + field) + state[step])
        store_i64(messages, at + wire.AT_SOURCE_TIME, moment if stamp_due else now)
        send, socket = state[libzmq.SEND], state[SOCKET]
        sent = transfer(send, socket, topic.ctypes.data, len(topic), SNDMORE)
        if sent >= 0:
            sent = transfer(send, socket, messages.ctypes.data + at, places[row, LENGTH], 0)
        if sent < 0:
            state[ERROR] = last_error(state[libzmq.ERRNO])
            return _FAILED
        state[NEXT] = row + 1
        now = monotonic_ns()
        late[done] = now - moment
        done += 1
    return done


class Market(NamedTuple):
    """One pass over a tape of one instrument, as a publisher numbers it; use `load_market`.

    Only messages that change a book or are a trade: others make no signal due.

    Attributes
    ----------
    meta : InstrumentMeta
    messages : ndarray of uint8
    places : ndarray of int64, shape (n, PLACE_COLUMNS)
        Where they are.
    changes : ndarray of int64
        What they do to the book, see `feeds.outgoing`.
    before : tuple of int
        Epoch, seq and exchange time before the first message.
    steps : ndarray of int64, shape (3,)
        What every further pass adds to epoch, seq and exchange time.
    """

    meta: InstrumentMeta
    messages: np.ndarray
    places: np.ndarray
    changes: np.ndarray
    before: tuple[int, int, int]
    steps: np.ndarray


def load_market(tape: str) -> Market:
    """Take a tape's messages into memory.

    Raises
    ------
    InputError
        If there are none, or of several instruments.
    """
    departures = Departures(TapeReader(tape), loop=True)
    if len(departures.instruments) != 1:
        raise InputError("a tape of several instruments", where=tape, expected="one of one")
    before = departures.numbers(0)
    messages, places, changes = [], [], []
    n_bytes = n_rows = n_kept = 0
    for batch in departures.batches():
        buf = np.asarray(batch.view)
        kept = _kept(buf, batch.places)
        if departures.loops == 0:
            stop = int((batch.places[:, outgoing.OFFSET] + batch.places[:, outgoing.LENGTH]).max())
            own = kept[:, [outgoing.OFFSET, outgoing.LENGTH, outgoing.ROWS]]
            places.append(own + np.array([n_bytes, 0, n_rows]))
            messages.append(buf[:stop].copy())
            changes.append(batch.changes.copy())
            n_bytes += stop
            n_rows += len(batch.changes)
            n_kept += len(kept)
        elif len(kept) or not n_kept:
            break
    if not n_kept:
        raise InputError("a tape without market messages", where=tape)
    whole, rows = np.concatenate(messages), np.ascontiguousarray(np.concatenate(places))
    # Each pass is numbered as the one before it, moved on by the same steps.
    steps = _numbers(buf, int(kept[0, outgoing.OFFSET])) - _numbers(whole, int(rows[0, OFFSET]))
    meta = departures.instruments[0]
    return Market(meta, whole, rows, np.concatenate(changes), before, steps)


def _numbers(buf: np.ndarray, at: int) -> np.ndarray:
    """Epoch, seq and exchange time of a message."""
    found: np.ndarray = buf[at + wire.AT_EPOCH : at + wire.AT_SOURCE_TIME].view("<i8").copy()
    return found


def _kept(buf: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Places of the messages that change a book or are a trade."""
    at = places[:, outgoing.OFFSET] + 2
    template = buf[at].astype(np.int64) | buf[at + 1].astype(np.int64) << 8
    found: np.ndarray = places[~np.isin(template, (wire.INSTRUMENT, wire.HEARTBEAT))]
    return found


class Sender:
    """Publishes a market, endlessly, on one socket.

    Parameters
    ----------
    market : Market
    socket : zmq.Socket
        A bound PUB, this thread's own.
    """

    def __init__(self, market: Market, socket: zmq.Socket[Any]) -> None:
        self._market = market
        self._socket = socket
        self._messages = market.messages.copy()
        topic = codec.topic("l2", market.meta.venue, market.meta.symbol)
        self._topic = np.frombuffer(topic, dtype=np.uint8).copy()
        self._state = np.zeros(STATE_FIELDS, dtype=np.int64)
        functions = libzmq.functions()
        self._state[: len(functions)] = functions
        self._state[SOCKET] = socket.underlying
        self._state[[EPOCH_STEP, SEQ_STEP, TIME_STEP_NS]] = market.steps
        self._state[LEAD_NS] = FIRST_LEAD_NS

    def define(self) -> None:
        """Say which instrument there is; for before the first message."""
        meta, (epoch, seq, at_ns) = self._market.meta, self._market.before
        key = (meta.source_id, meta.instrument_id, max(epoch, 0), seq)
        names = (meta.venue, meta.symbol, Decimal(meta.tick), Decimal(meta.lot))
        message = codec.encode_instrument(*key, *names, at_ns, NOT_DUE_NS)
        self._socket.send_multipart([self._topic.tobytes(), message])

    def sides(self) -> list[list[tuple[int, int]]]:
        """The book as of the last message sent: bids and asks, best first."""
        sent = int(self._state[NEXT])
        rows = int(self._market.places[sent - 1, ROWS]) if sent else 0
        book = BookFold(1).book(0, self._market.changes[:rows])
        return [book.bids, book.asks]

    def send(self, schedule_ns: np.ndarray, stamp_due: bool) -> np.ndarray:
        """Send a message at each time of a schedule, ns from now on; returns how late each was.

        Raises
        ------
        zmq.ZMQError
            If the socket fails.
        """
        late = np.full(len(schedule_ns), 0, dtype=np.int64)  # written once: no page is missing
        due, done = schedule_ns.astype(np.int64), 0
        due += time.monotonic_ns()
        while done < len(due):
            done = send_due(
                *(self._state, self._messages, self._market.places, self._topic),
                *(due, late, done, stamp_due),
            )
            if done == _FAILED:
                raise zmq.ZMQError(int(self._state[ERROR]))
        # Whoever still carries the last messages needs the core that what follows would take.
        time.sleep(SETTLE_S)
        return late
