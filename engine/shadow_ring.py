# Hot path: `submit`, `push_request` and `next_answer`, free @njit functions.
"""Two rings in shared memory between the engine and its shadow: requests out, answers back.

Each ring has one writer and one reader and no lock: the writer fills a row and then moves the
head, the reader empties it and then moves the tail, with a fence between. A full ring refuses, so
neither side ever waits for the other.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from engine.handles import FIELDS, pointer, set_handle
from engine.trust_events import AT_FLAGS, AT_GROUPS, AT_SEQ, AT_TICKET
from engine.waiting import wait_for
from feeds.inner import inner
from feeds.monotonic import monotonic_ns
from feeds.rawbytes import store_i64, store_u32
from feeds.wire import GROUP_HEADER_BYTES

# Columns of `header`, int64, each counter in a cache line of its own.
REQUEST_HEAD: Final = 0
REQUEST_TAIL: Final = 8
ANSWER_HEAD: Final = 16
ANSWER_TAIL: Final = 24
ALIVE_NS: Final = 32  # monotonic time at which the shadow last looked
READY: Final = 33  # 1 = its models are open
STOP: Final = 34
STATS: Final = 40  # float64 from here on, `STAT_NAMES`
HEADER: Final = 80
STAT_NAMES: Final = (
    "divergence_p50",
    "divergence_p99",
    "divergence_max",
    "drift",
    "drift_alerts",
    "drift_alarms",
)
MAX_OUTPUT_STATS: Final = 10  # outputs whose own p50 and p99 follow

# Columns of a row's `meta`, int64.
TICKET: Final = 0
SLOT: Final = 1
SIGNAL_SEQ: Final = 2
FLAGS: Final = 3
META: Final = 4

# Flags of a request.
FRESH: Final = 1  # the stream starts anew with it
GAP: Final = 2  # a request of this stream before it was dropped
RELOAD: Final = 4  # no inference: open the bundle that `text` names
# Flags of an answer, beside `engine.trust_events.SETTLING`.
ALERT: Final = 256  # no inference: the payload is text

# Columns of the engine's own `gate` to the ring, int64.
EVERY: Final = 0  # inferences of which one is handed over; 0 = none
OPEN: Final = 1  # 1 = the shadow is up and has no other bundle to open first
STARTING: Final = 2  # 1 = it was not up yet: what it does not see is not missed
MISSED: Final = 3
GATE: Final = 4
HANDLES: Final = 8  # of `set_handles`

TEXT_BYTES: Final = 1_024
MIN_PAYLOAD_BYTES: Final = 256
_ROW_BYTES: Final = 8 * META


@intrinsic
def _fence(typingctx: Any) -> Any:
    """What was written before is seen before what is written after."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen


@njit(
    "boolean(int64[::1], int64[:,::1], float32[:,::1], int64, int64, int64, int64, float32[:,::1])",
    cache=True,
)
def push_request(header, meta, xs, ticket, slot, seq, flags, x):  # type: ignore[no-untyped-def]
    """Hand over one input, float32 of shape (1, n_features); False where the ring is full."""
    rows = len(meta)
    if header[REQUEST_HEAD] - header[REQUEST_TAIL] >= rows:
        return False
    at = header[REQUEST_HEAD] % rows
    meta[at, TICKET] = ticket
    meta[at, SLOT] = slot
    meta[at, SIGNAL_SEQ] = seq
    meta[at, FLAGS] = flags
    for i in range(xs.shape[1]):
        xs[at, i] = x[0, i]
    _fence()
    header[REQUEST_HEAD] += 1
    return True


@njit(
    "void(int64[::1], int64[::1], int64[::1], int64[:,::1], float32[:,::1], int64, int64, int64,"
    " int64, float32[:,::1])",
    cache=True,
)
def submit(gate, behind, header, meta, xs, ticket, slot, seq, fresh, x):  # type: ignore[no-untyped-def]
    """Hand over an inference, if it is one of the declared share.

    Parameters
    ----------
    gate : ndarray of int64, shape (GATE,)
    behind : ndarray of int64, shape (instruments,)
        1 = an inference of this instrument was dropped since the last one handed over.
    header, meta, xs : ndarray
        The ring's header, requests and inputs.
    ticket, slot, seq, fresh : int
        Inference, instrument, signal, and 1 where its stream starts anew.
    x : ndarray of float32, shape (1, n_features)
    """
    if gate[EVERY] == 0 or ticket % gate[EVERY] != 0:
        return
    if gate[OPEN] == 0:
        behind[slot] = 1
        if gate[STARTING] == 0:
            gate[MISSED] += 1
        return
    flags = FRESH if fresh != 0 else GAP if behind[slot] != 0 else 0
    if push_request(header, meta, xs, ticket, slot, seq, flags, x):
        behind[slot] = 0
    else:
        behind[slot] = 1
        gate[MISSED] += 1


@njit("boolean(int64[::1], int64[:,::1], float32[:,::1], int64[::1], float32[:,::1])", cache=True)
def pop_request(header, meta, xs, out, x):  # type: ignore[no-untyped-def]
    """Take the oldest request into ``out`` (`META`) and ``x``; False where there is none."""
    tail = header[REQUEST_TAIL]
    if header[REQUEST_HEAD] == tail:
        return False
    _fence()
    at = tail % len(meta)
    for i in range(META):
        out[i] = meta[at, i]
    for i in range(xs.shape[1]):
        x[0, i] = xs[at, i]
    _fence()
    header[REQUEST_TAIL] = tail + 1
    return True


@njit("int64(int64[::1], int64, int64, int64)", cache=True, nogil=True)
def gather(header, many, look_ns, most_ns):  # type: ignore[no-untyped-def]
    """Wait until ``many`` requests wait, or the oldest has for ``most_ns``, or none came so long.

    Parameters
    ----------
    header : ndarray of int64
    many : int
    look_ns, most_ns : int
        Between two looks at the ring, and in all; at least one look's time where none waits.

    Returns
    -------
    int
        How many wait; 0 also where the engine says `STOP`.
    """
    begun = monotonic_ns()
    since = np.int64(0)
    while True:
        now = monotonic_ns()
        header[ALIVE_NS] = now
        waiting = header[REQUEST_HEAD] - header[REQUEST_TAIL]
        if header[STOP] != 0:
            return 0
        if waiting > 0 and since == 0:
            since = now
        if waiting >= many or (waiting > 0 and now - since >= most_ns):
            return waiting
        if waiting == 0 and now - begun >= max(most_ns, look_ns):
            return 0
        wait_for(0, 0, look_ns)
        _fence()


@njit(
    "boolean(int64[::1], int64[:,::1], uint8[:,::1], int64[::1], uint8[::1])",
    cache=True,
)
def push_answer(header, meta, payloads, row, payload):  # type: ignore[no-untyped-def]
    """Give one answer back; False where the ring is full."""
    rows = len(meta)
    if header[ANSWER_HEAD] - header[ANSWER_TAIL] >= rows:
        return False
    at = header[ANSWER_HEAD] % rows
    for i in range(META):
        meta[at, i] = row[i]
    for i in range(payloads.shape[1]):
        payloads[at, i] = payload[i] if i < len(payload) else 0
    _fence()
    header[ANSWER_HEAD] += 1
    return True


@njit(
    "boolean(int64[::1], int64[:,::1], uint8[:,::1], int64[::1], uint8[::1])",
    cache=True,
)
def pop_answer(header, meta, payloads, row, payload):  # type: ignore[no-untyped-def]
    """Take the oldest answer into ``row`` and ``payload``; False where there is none."""
    tail = header[ANSWER_TAIL]
    if header[ANSWER_HEAD] == tail:
        return False
    _fence()
    at = tail % len(meta)
    for i in range(META):
        row[i] = meta[at, i]
    for i in range(payloads.shape[1]):
        payload[i] = payloads[at, i]
    _fence()
    header[ANSWER_TAIL] = tail + 1
    return True


class ShadowRing:
    """The mapped memory and its arrays.

    Parameters
    ----------
    fd : int
        An open file; see `make`.
    rows, n_features, n_outputs : int
        The same on both sides.

    Attributes
    ----------
    header, stats : ndarray
    output_stats : ndarray of float64, shape (MAX_OUTPUT_STATS, 2)
        p50 and p99 of each output's own divergence.
    requests, inputs, answers, payloads : ndarray
        Rows of both rings.
    """

    def __init__(self, fd: int, rows: int, n_features: int, n_outputs: int) -> None:
        payload = max(MIN_PAYLOAD_BYTES, 8 * n_outputs)
        self._map = mmap.mmap(fd, _size(rows, n_features, payload))
        at = 0

        def take(shape: tuple[int, ...], dtype: type) -> np.ndarray:
            nonlocal at
            count = int(np.prod(shape))
            array: np.ndarray = np.frombuffer(self._map, dtype, count, at).reshape(shape)
            at += array.nbytes
            return array

        self.header = take((HEADER,), np.int64)
        after = STATS + len(STAT_NAMES)
        self.stats = self.header[STATS:after].view(np.float64)
        by_output = self.header[after : after + 2 * MAX_OUTPUT_STATS].view(np.float64)
        self.output_stats = by_output.reshape(MAX_OUTPUT_STATS, 2)
        self._text = take((TEXT_BYTES,), np.uint8)
        self.requests = take((rows, META), np.int64)
        self.answers = take((rows, META), np.int64)
        self.inputs = take((rows, n_features), np.float32)
        self.payloads = take((rows, payload), np.uint8)

    @classmethod
    def make(cls, rows: int, n_features: int, n_outputs: int) -> tuple[ShadowRing, int]:
        """A new ring, and the descriptor that the other side opens it by."""
        fd = os.memfd_create("octick-shadow")
        payload = max(MIN_PAYLOAD_BYTES, 8 * n_outputs)
        os.ftruncate(fd, _size(rows, n_features, payload))
        return cls(fd, rows, n_features, n_outputs), fd

    @property
    def text(self) -> str:
        """What a `RELOAD` names."""
        return bytes(self._text).rstrip(b"\0").decode()

    @text.setter
    def text(self, value: str) -> None:
        data = value.encode()
        assert len(data) < TEXT_BYTES, "a path too long for the shadow"
        self._text[:] = 0
        self._text[: len(data)] = np.frombuffer(data, dtype=np.uint8)

    @property
    def waiting(self) -> int:
        """Requests not taken yet."""
        return int(self.header[REQUEST_HEAD] - self.header[REQUEST_TAIL])


def no_handles() -> np.ndarray:
    """Handles of a ring that is not there: nothing is handed over."""
    return np.zeros(FIELDS * HANDLES, dtype=np.int64)


def set_handles(
    handles: np.ndarray,
    gate: np.ndarray,
    behind: np.ndarray,
    area: ShadowRing,
    templates: np.ndarray,
) -> None:
    """Let handles stand for a gate, what is behind, a ring, and what its answers become.

    Parameters
    ----------
    handles : ndarray of int64
        From `no_handles`.
    gate : ndarray of int64, shape (GATE,)
    behind : ndarray of int64, shape (instruments,)
    area : ShadowRing
    templates : ndarray of uint8, shape (instruments, message bytes)
        A ShadowAnswer of each instrument, see `engine.trust_events`.
    """
    ring = (area.header, area.requests, area.inputs, area.answers, area.payloads)
    arrays = (gate, behind, *ring, templates)
    assert len(arrays) == HANDLES
    for i, array in enumerate(arrays):
        set_handle(handles, i, array)


@inner("void(int64[::1], int64, int64, int64, int64, float32[:,::1])")
def submit_by(h, ticket, slot, seq, fresh, x):  # type: ignore[no-untyped-def]
    """`submit` through the handles of `set_handles`; nothing where they are blank."""
    if h[0] == 0:
        return
    submit(
        carray(pointer(h[0], np.int64), (h[1],)),
        carray(pointer(h[5], np.int64), (h[6],)),
        carray(pointer(h[10], np.int64), (h[11],)),
        carray(pointer(h[15], np.int64), (h[16], h[17])),
        carray(pointer(h[20], np.float32), (h[21], h[22])),
        ticket,
        slot,
        seq,
        fresh,
        x,
    )


@inner("boolean(int64[::1])")
def answers_wait(h):  # type: ignore[no-untyped-def]
    """Whether an answer waits in the ring behind handles; none does where they are blank."""
    if h[0] == 0:
        return False
    header = carray(pointer(h[10], np.int64), (h[11],))
    return header[ANSWER_HEAD] != header[ANSWER_TAIL]


@inner("int64(int64[::1], uint8[::1], int64)")
def next_answer(h, out, at):  # type: ignore[no-untyped-def]
    """Take the oldest answer as a ShadowAnswer into ``out[at:]``.

    Returns
    -------
    int
        Its length; 0 where the oldest is no answer to an inference, and is still there.
    """
    header = carray(pointer(h[10], np.int64), (h[11],))
    answers = carray(pointer(h[25], np.int64), (h[26], h[27]))
    payloads = carray(pointer(h[30], np.uint8), (h[31], h[32]))
    templates = carray(pointer(h[35], np.uint8), (h[36], h[37]))
    tail = header[ANSWER_TAIL]
    _fence()
    row = answers[tail % len(answers)]
    if row[FLAGS] & ALERT:
        return 0
    template, payload = templates[row[SLOT]], payloads[tail % len(answers)]
    length = len(template)
    for i in range(AT_GROUPS + GROUP_HEADER_BYTES):
        out[at + i] = template[i]
    store_i64(out, at + AT_TICKET, row[TICKET])
    store_i64(out, at + AT_SEQ, row[SIGNAL_SEQ])
    store_u32(out, at + AT_FLAGS, row[FLAGS])
    scores = (length - AT_GROUPS) // 2 - GROUP_HEADER_BYTES  # bytes of one model's
    first = at + AT_GROUPS + GROUP_HEADER_BYTES
    second = first + scores + GROUP_HEADER_BYTES
    for i in range(GROUP_HEADER_BYTES):
        out[first + scores + i] = template[AT_GROUPS + i]
    for i in range(scores):
        out[first + i] = payload[i]
        out[second + i] = payload[scores + i]
    _fence()
    header[ANSWER_TAIL] = tail + 1
    return length


def _size(rows: int, n_features: int, payload: int) -> int:
    return 8 * HEADER + TEXT_BYTES + rows * (2 * _ROW_BYTES + 4 * n_features + payload)
