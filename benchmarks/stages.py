# A kernel that runs the engine's own kernels between two readings of the clock.
"""Where a tick's time goes: decode, sync, book, features, check, infer, encode, send, record.

The kernel does for each message of a tape what `engine.live.take_waiting` does, with the same
functions in the same order, and reads the clock after each. A reading waits for the instructions
before it, so stages do not overlap here as they do in the engine: together they come out longer
than the whole. The cost of a reading, measured beside, is taken off each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import zmq
from numba import carray, njit

from engine import features, latency, signals
from engine.advance import find_slot
from engine.backends.native_call import ARENA, OUT, STEP, X, copy_bytes, run_step
from engine.backends.registry import open_backend
from engine.book import apply_levels, apply_snapshot
from engine.bundle import load_bundle
from engine.config import Config
from engine.handles import pointer
from engine.model_input import normalise
from engine.pipeline import Pipeline
from feeds import codec, libzmq, sync, tape, wire
from feeds.crc32c import crc32c
from feeds.errors import InputError
from feeds.libzmq import DONTWAIT, SNDMORE, transfer
from feeds.monotonic import monotonic_ns
from feeds.rawbytes import load_i64, load_u16, load_u32
from feeds.tape import RECORD_HEADER_BYTES, padded, put_record
from feeds.tape_reader import TapeReader

STAGES: Final = (
    *("clock", "record", "decode", "sync", "book", "features", "check", "infer", "encode", "send"),
)
_CLOCK, _RECORD, _DECODE, _SYNC, _BOOK, _FEATURES, _CHECK, _INFER, _ENCODE, _SEND = range(10)
CHUNK_RECORDS: Final = 256  # between two looks at what was sent
SIGNAL_ROOM: Final = 1 << 12


class Stage(msgspec.Struct, frozen=True):
    """One stage, in nanoseconds, a reading of the clock taken off."""

    stage: str
    p50_ns: int
    p99_ns: int
    n: int


@njit(
    "int64(int64[::1], uint8[::1], int64, int64, int64, float64, int64[:,::1], int64[::1],"
    " uint8[::1], uint8[::1])",
    cache=True,
)
def run_stages(h, buf, at, stop, most, clip, counts, socket, topic, scratch):  # type: ignore[no-untyped-def]
    """Take at most ``most`` records of one instrument's tape, each stage timed.

    Parameters
    ----------
    h : ndarray of int64
        The pipeline's handles.
    buf : ndarray of uint8
        Tape records.
    clip : float
        Of the model's input.
    counts : ndarray of int64, shape (stages, engine.latency.LENGTH)
    socket : ndarray of int64
        ``zmq_send`` and the socket to send by.
    topic, scratch : ndarray of uint8
        What signals are sent under, and where records are written.

    Returns
    -------
    int
        Where to go on.
    """
    keys = carray(pointer(h[0], np.uint8), (h[1], h[2]))
    ids = carray(pointer(h[5], np.int64), (h[6], h[7]))
    row = carray(pointer(h[10], np.int64), (h[12],))
    held = carray(pointer(h[15], np.uint8), (h[17],))
    window = carray(pointer(h[20], np.int64), (h[22], h[23]))
    far = carray(pointer(h[25], np.int64), (h[27], h[28], h[29]))
    top = carray(pointer(h[30], np.int64), (h[32], h[33], h[34]))
    depth = carray(pointer(h[35], np.int64), (h[37],))
    flow = carray(pointer(h[40], np.int64), (h[41],))
    fi = carray(pointer(h[45], np.int64), (h[47],))
    ff = carray(pointer(h[50], np.float64), (h[52],))
    facts = carray(pointer(h[70], np.int64), (h[71],))
    vector = carray(pointer(h[75], np.float64), (h[76],))
    norm = carray(pointer(h[80], np.float64), (h[81], h[82]))
    seen = carray(pointer(h[85], np.float32), (h[87], h[88]))
    x = carray(pointer(h[90], np.float32), (h[91], h[92]))
    x_bytes = carray(pointer(h[95], np.uint8), (h[96],))
    message = carray(pointer(h[100], np.uint8), (h[102],))
    outputs = carray(pointer(h[105], np.float32), (h[106],))
    guard = carray(pointer(h[110], np.int64), (h[112],))
    scores = carray(pointer(h[115], np.float32), (h[117], h[118]))
    limits_i = carray(pointer(h[120], np.int64), (h[121],))
    limits_f = carray(pointer(h[125], np.float64), (h[126],))
    native = carray(pointer(h[145], np.int64), (h[146],))
    states = carray(pointer(h[150], np.int64), (h[151],))
    size = len(message)
    taken = 0
    while at < stop and taken < most:
        length = np.int64(load_u32(buf, at + 4))
        kind = load_u16(buf, at + 16)
        received = load_i64(buf, at + 8)
        start = at + RECORD_HEADER_BYTES
        at = start + padded(length)
        taken += 1
        if kind != tape.MARKET:
            continue
        t0 = monotonic_ns()
        t1 = monotonic_ns()
        put_record(buf, start - RECORD_HEADER_BYTES, tape.MARKET, received, length)
        t2 = monotonic_ns()
        if wire.check(buf, start, start + length) != 0 or find_slot(buf, start, keys, ids, 0) != 0:
            continue
        t3 = monotonic_ns()
        action = sync.classify(row, held, buf, start)
        t4 = monotonic_ns()
        if action == sync.DROP or action == sync.HOLD:
            continue
        template = load_u16(buf, start + 2)
        now = load_i64(buf, start + wire.AT_EXCHANGE_TIME)
        if template == wire.DELTA:
            apply_levels(window, far, top, depth, flow, buf, start)
        elif template == wire.SNAPSHOT:
            apply_snapshot(window, far, top, depth, buf, start)
        t5 = monotonic_ns()
        if template == wire.DELTA:
            features.on_book(fi, ff, top, depth, flow, now)
        elif template == wire.SNAPSHOT:
            features.on_snapshot(fi, ff, top, depth, now)
        else:
            price = load_i64(buf, start + wire.AT_PRICE)
            lots = load_i64(buf, start + wire.AT_QUANTITY)
            side = np.int64(buf[start + wire.AT_AGGRESSOR])
            features.on_trade(fi, ff, top, depth, price, lots, side, now)
        features.compute(fi, ff, top, depth, now, vector)
        t6 = monotonic_ns()
        check = normalise(vector, norm, clip, seen, x)
        crc = crc32c(x_bytes, 0, len(x_bytes))
        t7 = monotonic_ns()
        mask = run_step(native[STEP], native[X], native[OUT], native[ARENA], states[0])
        t8 = monotonic_ns()
        facts[signals.FACT_SIGNAL_SEQ] += 1
        facts[signals.FACT_VALUE_CHECK] = check
        facts[signals.FACT_INPUT_CRC] = crc
        facts[signals.FACT_EXCHANGE_TIME] = now
        signals.encode_signal(
            message, facts, outputs, mask, 0, 1, 1, 0, t8, guard, scores, limits_i, limits_f
        )
        t9 = monotonic_ns()
        more = DONTWAIT | SNDMORE
        transfer(socket[0], socket[1], topic.ctypes.data, len(topic), more)
        transfer(socket[0], socket[1], message.ctypes.data, size, DONTWAIT)
        t10 = monotonic_ns()
        for i in range(size):
            scratch[RECORD_HEADER_BYTES + i] = message[i]
        put_record(scratch, 0, tape.SIGNAL, t10, size)
        t11 = monotonic_ns()
        clock = t1 - t0
        latency.record(counts[_CLOCK], clock)
        latency.record(counts[_RECORD], max(t2 - t1 + t11 - t10 - 2 * clock, 0))
        latency.record(counts[_DECODE], max(t3 - t2 - clock, 0))
        latency.record(counts[_SYNC], max(t4 - t3 - clock, 0))
        latency.record(counts[_BOOK], max(t5 - t4 - clock, 0))
        latency.record(counts[_FEATURES], max(t6 - t5 - clock, 0))
        latency.record(counts[_CHECK], max(t7 - t6 - clock, 0))
        latency.record(counts[_INFER], max(t8 - t7 - clock, 0))
        latency.record(counts[_ENCODE], max(t9 - t8 - clock, 0))
        latency.record(counts[_SEND], max(t10 - t9 - clock, 0))
    return at


def time_stages(source: Path, model: Path, config: Config) -> list[Stage]:
    """Time the stages over a tape of one instrument, answered by the compiled backend.

    Parameters
    ----------
    source : Path
    model : Path
        A bundle that the compiled backend can run.
    config : Config

    Raises
    ------
    InputError
        If the tape or the bundle cannot be used.
    """
    reader = TapeReader(source)
    bundle = load_bundle(model)
    backend = open_backend("compiled", bundle)
    pipeline = Pipeline(config, bundle, backend)
    native = backend.native_model(1)  # type: ignore[attr-defined]
    pipeline.prepare(live=False)
    copy_state(native.states[0], native.fresh, native.state_bytes)
    venue, symbol = pipeline.names[0]
    topic = np.frombuffer(codec.topic("signal", venue, symbol), dtype=np.uint8).copy()
    counts = np.array([latency.new_counts() for _ in STAGES])
    scratch = np.zeros(SIGNAL_ROOM, dtype=np.uint8)
    context: zmq.Context[Any] = zmq.Context()
    out, subscriber = context.socket(zmq.XPUB), context.socket(zmq.SUB)
    try:
        for one in (out, subscriber):
            one.set_hwm(0)
        out.bind("inproc://stages")
        subscriber.connect("inproc://stages")
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        out.recv()
        socket = np.array([libzmq.functions()[libzmq.SEND], out.underlying], dtype=np.int64)
        for chunk in reader.chunks():
            buf, at = chunk.buf[chunk.start : chunk.stop].copy(), 0
            while at < len(buf):
                at = run_stages(
                    *(pipeline.handles, buf, at, len(buf), CHUNK_RECORDS, pipeline.clip),
                    *(counts, socket, topic, scratch),
                )
                _drop_all(subscriber)
    finally:
        out.close()
        subscriber.close()
        context.term()
        pipeline.close()
    if counts[_SEND, latency.AT_COUNT] == 0:
        raise InputError("no message of the tape changes a book", where=str(source))
    return [
        Stage(
            name,
            int(latency.quantile(row, 0.5)),
            int(latency.quantile(row, 0.99)),
            int(row[latency.AT_COUNT]),
        )
        for name, row in zip(STAGES, counts, strict=True)
    ]


@njit("void(int64, int64, int64)", cache=True)
def copy_state(target, source, n_bytes):  # type: ignore[no-untyped-def]
    """A fresh stream's state at an address."""
    copy_bytes(target, source, n_bytes)


def _drop_all(subscriber: zmq.Socket[bytes]) -> None:
    try:
        while True:
            subscriber.recv(zmq.NOBLOCK)
    except zmq.Again:
        pass
