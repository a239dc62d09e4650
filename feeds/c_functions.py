# Hot path: what a kernel calls a C function through.
"""C functions that a kernel calls by their addresses, known only when a library is loaded.

A kernel's numbers are 64 bits wide. What a function takes or gives as an ``int`` is made narrower
and wider on the way.

Source: Numba documentation, "Low-level extension API", "Implementing intrinsics".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import llvmlite.ir as ir
from numba import types

INT: Final = ir.IntType(32)  # with a sign
WORD: Final = ir.IntType(64)  # a pointer, a size, an ``int64_t``


def c_function(
    result: ir.IntType, arguments: Sequence[ir.IntType]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Write an intrinsic that calls whatever function of one type stands at an address.

    Parameters
    ----------
    result : INT or WORD
        What such a function gives.
    arguments : sequence of INT and WORD
        What it takes.

    Returns
    -------
    callable
        A decorator, to stand below `numba.extending.intrinsic`. The body of what it decorates
        counts for nothing, its parameters give the names: Numba's context, the address, and the
        arguments. In a kernel all are int64, and so is what comes back.
    """
    numbers = [types.int64] * (1 + len(arguments))

    def write(named: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(named)  # Numba reads the names of the parameters, and counts them
        def typed(typingctx: Any, *given: Any) -> Any:
            return types.int64(*numbers), codegen

        return typed

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address = builder.inttoptr(args[0], ir.FunctionType(result, arguments).as_pointer())
        given = [
            number if kind == WORD else builder.trunc(number, kind)
            for number, kind in zip(args[1:], arguments, strict=True)
        ]
        found = builder.call(address, given)
        return found if result == WORD else builder.sext(found, WORD)

    return write
