"""Unaligned little-endian loads and stores against ``struct``."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from feeds import rawbytes

SIZE = 24


@njit("int64[::1](uint8[::1], int64)")
def load_all(buf, at):  # type: ignore[no-untyped-def]
    out = np.zeros(6, dtype=np.int64)
    out[0] = rawbytes.load_u8(buf, at)
    out[1] = rawbytes.load_i8(buf, at)
    out[2] = rawbytes.load_u16(buf, at)
    out[3] = rawbytes.load_u32(buf, at)
    out[4] = rawbytes.load_i64(buf, at)
    return out


@njit("void(uint8[::1], int64, int64, int64)")
def store(buf, at, bits, value):  # type: ignore[no-untyped-def]
    if bits == 8:
        rawbytes.store_u8(buf, at, value)
    elif bits == 16:
        rawbytes.store_u16(buf, at, value)
    elif bits == 32:
        rawbytes.store_u32(buf, at, value)
    else:
        rawbytes.store_i64(buf, at, value)


@njit("void(uint8[::1], int64, float32)")
def store_float(buf, at, value):  # type: ignore[no-untyped-def]
    rawbytes.store_f32(buf, at, value)


@given(st.binary(min_size=SIZE, max_size=SIZE), st.integers(0, SIZE - 8))
def test_loads_read_what_struct_reads(data: bytes, at: int) -> None:
    buf = np.frombuffer(bytearray(data), dtype=np.uint8)
    found = load_all(buf, at).tolist()
    expected = [struct.unpack_from(f"<{code}", data, at)[0] for code in "BbHIq"]
    assert found[:5] == expected


@pytest.mark.parametrize(("bits", "code"), [(8, "B"), (16, "H"), (32, "I"), (64, "q")])
@given(
    value=st.integers(-(2**63), 2**63 - 1),
    at=st.integers(0, SIZE - 8),
    fill=st.sampled_from((0, 255)),
)
def test_stores_write_the_low_bits_and_nothing_else(bits, code, value, at, fill) -> None:
    buf = np.full(SIZE, fill, dtype=np.uint8)
    store(buf, at, bits, value)
    expected = bytearray([fill]) * SIZE
    low = value if bits == 64 else value % 2**bits
    struct.pack_into(f"<{code}", expected, at, low)
    assert bytes(buf) == bytes(expected)


@given(st.floats(width=32), st.integers(0, SIZE - 8))
def test_floats_keep_their_bits(value: float, at: int) -> None:
    buf = np.zeros(SIZE, dtype=np.uint8)
    store_float(buf, at, np.float32(value))
    assert bytes(buf[at : at + 4]) == np.float32(value).tobytes()
    assert not buf[:at].any()
    assert not buf[at + 4 :].any()
