# Hot path: what a kernel sends and receives through.
"""libzmq's own functions, called by their addresses: a socket read and written without Python.

The binding costs a microsecond a frame, most of it objects that the hot path has no use for. Its
socket is libzmq's socket, so a kernel may use that very socket as long as only the thread that
owns it does, and never waits in it.

Source: zmq_recv(3), zmq_send(3), zmq_getsockopt(3), zmq_errno(3).
"""

from __future__ import annotations

import ctypes
import errno
import sys
from typing import Any, Final

import llvmlite.ir as ir
import numpy as np
import zmq
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from zmq.backend import zmq_errno

from feeds.c_functions import INT, WORD, c_function
from feeds.errors import InputError

# Columns of what `functions` gives.
RECV: Final = 0
SEND: Final = 1
GETSOCKOPT: Final = 2
ERRNO: Final = 3
FUNCTIONS: Final = ("zmq_recv", "zmq_send", "zmq_getsockopt", "zmq_errno")

DONTWAIT: Final = int(zmq.DONTWAIT)
SNDMORE: Final = int(zmq.SNDMORE)
EAGAIN: Final = errno.EAGAIN
EINTR: Final = errno.EINTR
_RCVMORE: Final = int(zmq.RCVMORE)
_INT_BYTES: Final = 4


def functions() -> np.ndarray:
    """Addresses of `FUNCTIONS` in the libzmq that the binding uses: int64 of shape (4,).

    Raises
    ------
    InputError
        If the binding hides its libzmq.
    """
    found = []
    try:
        binding = ctypes.CDLL(sys.modules[zmq_errno.__module__].__file__)
        for name in FUNCTIONS:
            found.append(ctypes.cast(getattr(binding, name), ctypes.c_void_p).value or 0)
    except (AttributeError, OSError) as error:
        raise InputError(
            "libzmq's functions cannot be reached",
            where=f"pyzmq {zmq.__version__}",
            expected="a binding that links libzmq as a shared library, as its wheels do",
            found=str(error),
            fix="install pyzmq from its wheel",
        ) from None
    return np.array(found, dtype=np.int64)


@intrinsic
@c_function(INT, [WORD, WORD, WORD, INT])
def transfer(typingctx: Any, function: Any, socket: Any, at: Any, n_bytes: Any, flags: Any) -> Any:
    """``zmq_recv`` or ``zmq_send`` of one frame at an address.

    Returns
    -------
    int
        Bytes of the frame, also where a received one was cut to ``n_bytes``; or -1.
    """


@intrinsic
def more_follows(typingctx: Any, function: Any, socket: Any) -> Any:
    """Whether the frame just received has another behind it, by ``zmq_getsockopt``: 0 or 1."""
    signature = types.int64(types.int64, types.int64)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        value = cgutils.alloca_once(builder, INT)
        size = cgutils.alloca_once(builder, WORD)
        builder.store(INT(0), value)
        builder.store(WORD(_INT_BYTES), size)
        kind = ir.FunctionType(INT, [WORD, INT, value.type, size.type])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [args[1], INT(_RCVMORE), value, size])
        return builder.zext(builder.load(value), WORD)

    return signature, codegen


@intrinsic
@c_function(INT, [])
def last_error(typingctx: Any, function: Any) -> Any:
    """``zmq_errno`` of this thread."""
