"""CRC32C against published vectors and an independent package."""

from __future__ import annotations

import crc32c as independent
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feeds.crc32c import crc32c


def ours(data: bytes, start: int = 0, stop: int | None = None) -> int:
    buf = np.frombuffer(bytearray(data), dtype=np.uint8)
    return int(crc32c(buf, start, len(data) if stop is None else stop))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # the check value of the CRC catalogue, CRC-32/ISCSI
        (bytes(32), 0x8A9136AA),  # these four: RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_vectors(data: bytes, expected: int) -> None:
    assert ours(data) == expected


@given(st.binary(max_size=200))
def test_any_bytes_agree_with_an_independent_package(data: bytes) -> None:
    assert ours(data) == independent.crc32c(data)


@given(st.binary(max_size=64), st.binary(max_size=64), st.binary(max_size=64))
def test_only_the_range_counts(before: bytes, data: bytes, after: bytes) -> None:
    whole = before + data + after
    assert ours(whole, len(before), len(before) + len(data)) == independent.crc32c(data)
