"""Float32 tensors as integers: every value is ``m * 2**e``.

A graph that keeps `exact-int8` holds nothing else: scales are powers of two, so each float32 in it
is an integer mantissa at a known power of two, the **unit**. Sums, differences and products of
such numbers are computed here in int64, without rounding; `check_exact` then asks whether float32
could hold the result, and `quantise` and `round_to_integer` round where the graph rounds, half to
even.

Zero has one sign here. Float32 has two, which compare equal.

Source: IEEE 754-2019, sections 3.3 (sets of floating-point data), 4.3.1 (roundTiesToEven).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

FLOAT32_BITS: Final = 24
LIMIT: Final = 1 << FLOAT32_BITS  # float32 holds every integer up to and including this one
INT64_BITS: Final = 62  # what a mantissa may need here: a bit for the sign, a bit to spare
SMALLEST_EXPONENT: Final = -126  # units below would need subnormal numbers
LARGEST_EXPONENT: Final = 64  # mantissas of `INT64_BITS` still stay below the greatest float32


class InexactError(ArithmeticError):
    """A value that float32 cannot hold, or cannot be sure to reach without rounding."""


@dataclass(frozen=True, eq=False)
class Dyadic:
    """The tensor ``m * 2**e``.

    Attributes
    ----------
    m : ndarray of int64
        Mantissas; the tensor's shape.
    e : ndarray of int64
        Units: one for all (shape ()), or as many dimensions as ``m`` and broadcastable to it.
    """

    m: np.ndarray
    e: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.m.shape

    @property
    def one_unit(self) -> bool:
        """Whether all elements have one unit."""
        return self.e.ndim == 0


def dyadic(m: np.ndarray, e: np.ndarray | int) -> Dyadic:
    """A `Dyadic` in its simplest form: one unit where all units are the same."""
    m, e = np.asarray(m, dtype=np.int64), np.asarray(e, dtype=np.int64)
    if e.size and (e == e.flat[0]).all():
        return Dyadic(m, np.asarray(e.flat[0]))
    return Dyadic(m, e.reshape((1,) * (m.ndim - e.ndim) + e.shape))


def from_float(values: np.ndarray) -> Dyadic:
    """The exact value of a float32 array: in one unit where int64 can hold that.

    Raises
    ------
    InexactError
        For NaN or infinity.
    """
    values = np.asarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InexactError("a value that is no number")
    fraction, exponent = np.frexp(values.astype(np.float64))
    m = (fraction * LIMIT).astype(np.int64)
    # Units of zero are free: those of the others, so that one unit serves all where possible.
    odd, e = odd_parts(m, np.asarray(exponent, dtype=np.int64) - FLOAT32_BITS)
    if not odd.any():
        return Dyadic(odd, np.asarray(0))
    least, greatest = e[odd != 0].min(), e[odd != 0].max()
    e = np.where(odd == 0, least, e)
    if greatest - least + FLOAT32_BITS <= INT64_BITS:
        return Dyadic(odd << (e - least), np.asarray(least))
    return dyadic(odd, e)


def to_float(value: Dyadic) -> np.ndarray:
    """float32 of the same shape; exact for what passes `check_exact`."""
    return np.ldexp(value.m.astype(np.float64), value.e).astype(np.float32)


def check_exact(value: Dyadic) -> None:
    """Whether float32 holds each element: an odd factor below 2**24, and no extreme unit.

    Raises
    ------
    InexactError
        If it does not.
    """
    if value.m.size == 0:
        return
    if np.abs(value.m).max() > LIMIT:
        odd = np.abs(odd_parts(value.m, value.e)[0])
        if odd.max() > LIMIT:
            raise InexactError(f"{odd.max()} steps of its unit, and float32 holds {LIMIT}")
    if value.e.min() < SMALLEST_EXPONENT or value.e.max() > LARGEST_EXPONENT:
        raise InexactError(f"a unit of 2**{value.e.min()} to 2**{value.e.max()}")


def odd_parts(m: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same values ``m * 2**e`` with odd mantissas, each in a unit of its own; 0 stays 0."""
    lowest = np.maximum(m & -m, 1)
    shift = np.frexp(lowest.astype(np.float64))[1].astype(np.int64) - 1
    return m >> shift, e + shift


def _bits(m: np.ndarray) -> int:
    return int(np.abs(m).max(initial=0)).bit_length()


def aligned(a: Dyadic, b: Dyadic) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mantissas of both in the finer of their units, and that unit.

    Raises
    ------
    InexactError
        If the units are too far apart for int64, and so for float32.
    """
    e = np.minimum(a.e, b.e)
    up_a, up_b = a.e - e, b.e - e
    if max(_bits(a.m) + up_a.max(initial=0), _bits(b.m) + up_b.max(initial=0)) > INT64_BITS:
        raise InexactError(f"units 2**{int(max(up_a.max(), up_b.max()))} apart")
    return a.m << up_a, b.m << up_b, e


def common(value: Dyadic, axes: Sequence[int]) -> Dyadic:
    """The same tensor with one unit along ``axes``, the finest there."""
    if value.one_unit:
        return value
    e = value.e.min(axis=tuple(axes), keepdims=True)
    up = value.e - e
    if _bits(value.m) + up.max(initial=0) > INT64_BITS:
        raise InexactError(f"units 2**{int(up.max())} apart")
    return Dyadic(value.m << up, e)


def add(a: Dyadic, b: Dyadic, sign: int = 1) -> Dyadic:
    """``a + sign * b``, with broadcasting."""
    left, right, e = aligned(a, b)
    return dyadic(left + sign * right, e)


def multiply(a: Dyadic, b: Dyadic) -> Dyadic:
    """``a * b``, with broadcasting."""
    if _bits(a.m) + _bits(b.m) > INT64_BITS:
        raise InexactError(f"a product of {_bits(a.m) + _bits(b.m)} bits")
    return dyadic(a.m * b.m, a.e + b.e)


def matmul(a: Dyadic, b: Dyadic) -> Dyadic:
    """``a @ b`` over the last axis of ``a`` and the last but one of ``b``; both 2-D or more."""
    a, b = common(a, [-1]), common(b, [-2])
    terms = a.m.shape[-1]
    if _bits(a.m) + _bits(b.m) + terms.bit_length() > INT64_BITS:
        raise InexactError(f"a sum of {terms} products of {_bits(a.m) + _bits(b.m)} bits")
    return dyadic(a.m @ b.m, a.e + b.e)


def round_shift(m: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """``m * 2**shift`` as integers, half to even; what int64 cannot hold saturates near 2**62."""
    left = np.clip(shift, 0, INT64_BITS - FLOAT32_BITS)
    right = np.clip(-shift, 0, INT64_BITS)
    # Half less one unit, and one more where the quotient is odd: a tie then goes to the even one.
    half = (np.left_shift(1, right) >> 1) - 1 + ((m >> right) & 1)
    rounded = (m + np.where(right > 0, half, 0)) >> right
    rounded = np.where(shift < -INT64_BITS, 0, rounded)
    return np.where(left > 0, np.clip(rounded, -LIMIT, LIMIT), rounded) << left


def quantise(value: Dyadic, exponent: int, zero_point: int) -> np.ndarray:
    """QuantizeLinear: uint8 of ``round(value / 2**exponent) + zero_point``, saturating."""
    codes = round_shift(value.m, value.e - exponent) + zero_point
    return np.asarray(np.clip(codes, 0, 255)).astype(np.uint8)


def round_to_integer(value: Dyadic) -> Dyadic:
    """Round: to whole numbers, half to even."""
    if (value.e >= 0).all():
        return value
    if value.e.max(initial=0) + _bits(value.m) > INT64_BITS:
        raise InexactError(f"whole numbers of up to 2**{int(value.e.max())}")
    whole = value.m << np.maximum(value.e, 0)
    return dyadic(np.where(value.e < 0, round_shift(value.m, np.minimum(value.e, 0)), whole), 0)
