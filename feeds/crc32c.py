# Hot path: free @njit functions.
"""CRC32C (Castagnoli) over a byte array, eight bytes a step, the same on every CPU.

The polynomial is that of RFC 3720, section 12.1 (iSCSI), and that of the CRC32 instruction of
SSE4.2, which is used where the CPU has it; the table method is "slicing-by-8" (Kounavis and Berry,
2005). Written in Numba because the recorder calls it inside a native function for every record.
"""

from __future__ import annotations

from typing import Final

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from feeds.cpu import cpu_features
from feeds.inner import inner
from feeds.rawbytes import load_i64, load_u32

_POLYNOMIAL: Final = 0x82F63B78


def _tables() -> np.ndarray:
    table = np.zeros((8, 256), dtype=np.int64)
    for i in range(256):
        crc = i
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table[0, i] = crc
    for k in range(1, 8):
        for i in range(256):
            below = int(table[k - 1, i])
            table[k, i] = (below >> 8) ^ int(table[0, below & 0xFF])
    return table


_TABLE: Final = _tables()


@intrinsic
def _crc32_u64(typingctx, crc, word):  # type: ignore[no-untyped-def]
    """The CRC32 instruction on eight bytes."""
    signature = types.int64(types.int64, types.int64)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        number = ir.IntType(64)
        kind = ir.FunctionType(number, [number, number])
        name = "llvm.x86.sse42.crc32.64.64"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return signature, codegen


def _whole_words(buf, start, stop):  # type: ignore[no-untyped-def]
    """The register after the whole words of a range: by instruction."""
    crc = np.int64(0xFFFFFFFF)
    for i in range(start, stop - 7, 8):
        crc = _crc32_u64(crc, load_i64(buf, i))
    return crc


def _whole_words_by_table(buf, start, stop):  # type: ignore[no-untyped-def]
    """The same, eight table entries a word."""
    crc = np.int64(0xFFFFFFFF)
    for i in range(start, stop - 7, 8):
        low = load_u32(buf, i) ^ crc
        high = load_u32(buf, i + 4)
        crc = (
            _TABLE[7, low & 0xFF]
            ^ _TABLE[6, (low >> 8) & 0xFF]
            ^ _TABLE[5, (low >> 16) & 0xFF]
            ^ _TABLE[4, (low >> 24) & 0xFF]
            ^ _TABLE[3, high & 0xFF]
            ^ _TABLE[2, (high >> 8) & 0xFF]
            ^ _TABLE[1, (high >> 16) & 0xFF]
            ^ _TABLE[0, (high >> 24) & 0xFF]
        )
    return crc


_words: Final = inner("int64(uint8[::1], int64, int64)")(
    _whole_words if "sse4.2" in cpu_features() else _whole_words_by_table
)


@njit("int64(uint8[::1], int64, int64)", cache=True)
def crc32c(buf, start, stop):  # type: ignore[no-untyped-def]
    """Checksum of ``buf[start:stop]``.

    Parameters
    ----------
    buf : ndarray of uint8, shape (n,)
    start, stop : int
        Byte range, ``0 <= start <= stop <= n``; the caller guarantees it.

    Returns
    -------
    int
        The CRC32C as an unsigned 32-bit number.
    """
    crc = _words(buf, start, stop)
    for i in range(stop - (stop - start) % 8, stop):
        crc = (crc >> 8) ^ _TABLE[0, (crc ^ buf[i]) & 0xFF]
    return crc ^ 0xFFFFFFFF
