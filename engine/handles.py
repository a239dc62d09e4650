# Hot path: how a kernel gets at the arrays it works on.
"""Arrays by their addresses: one argument in place of dozens.

Handing an array to a kernel costs some 60 ns, whatever the kernel does. A pipeline's arrays never
move, so their addresses and shapes are written down once, and the kernel makes arrays of them.
Whoever writes them down keeps the arrays alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numba import types
from numba.extending import intrinsic

FIELDS: Final = 5  # of one array: its address, and up to four dimensions
MAX_DIMENSIONS: Final = FIELDS - 1


def new_handles(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Addresses and shapes: int64 of shape (`FIELDS` * arrays,)."""
    handles = np.zeros(FIELDS * len(arrays), dtype=np.int64)
    for i, array in enumerate(arrays):
        set_handle(handles, i, array)
    return handles


def set_handle(handles: np.ndarray, i: int, array: np.ndarray) -> None:
    """Let the ``i``-th handle stand for an array, C order."""
    assert array.flags.c_contiguous
    assert array.ndim <= MAX_DIMENSIONS
    handles[FIELDS * i] = array.ctypes.data
    handles[FIELDS * i + 1 : FIELDS * i + 1 + array.ndim] = array.shape


def place(names: Sequence[str], name: str) -> int:
    """Where among the handles of named arrays one's address stands; its shape stands behind."""
    return FIELDS * names.index(name)


@intrinsic
def pointer(typingctx, address, dtype):  # type: ignore[no-untyped-def]
    """An address as a pointer to numbers of a type, for `numba.carray`."""
    result = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, dtype), codegen
