"""Kernels that only other kernels call: compiled into their callers, loaded on no start.

An eager signature makes a kernel ready for Python before its first call, but costs each start 2 to
4 ms, cached or not. A kernel that Python never calls needs none: its code stands in its callers
and is compiled with them, ahead of time. Its signature stays written beside it, and
`tests/feeds/test_inner.py` holds it against what the callers made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from numba import njit

DECLARED: Final[list[tuple[Any, str]]] = []


def inner(signature: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Mark a kernel that only other kernels call.

    Parameters
    ----------
    signature : str
        The one signature it is called with, as `numba.njit` takes it. Nothing converts what a
        caller passes: its types must be these.
    **options
        Of `numba.njit`; ``cache`` is on.

    Returns
    -------
    callable
        A decorator. Called from Python, as tests do, the kernel is compiled on its first call.
    """

    def declare(function: Callable[..., Any]) -> Any:
        kernel = njit(**{"cache": True, **options})(function)
        DECLARED.append((kernel, signature))
        return kernel

    return declare
