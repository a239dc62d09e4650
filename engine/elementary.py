# Hot path: free @njit functions.
"""Logarithm and decay that give the same bits on every CPU.

The platform's libm rounds ``log`` and ``exp`` differently from version to version and from one
instruction set to the next, so nothing of it may reach a feature. These kernels use only float64
``+ - * /`` (correctly rounded by IEEE 754), exact integer operations and a fixed order of
evaluation.

Sources: range reduction and the cancellation-free final sum of ``ln`` follow Tang, "Table-driven
implementation of the logarithm function in IEEE floating-point arithmetic", ACM TOMS 16 (1990),
and the ``log`` of fdlibm; the coefficients are the exact Taylor coefficients of 2 artanh(s) and
of exp(g), rounded once. Muller, "Elementary Functions", 3rd ed., chapters 5 and 11, for the
error analysis. ``tests/engine/test_elementary.py`` measures the error against 200-bit arithmetic.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from feeds.inner import inner

# ln 2 in two parts. The first has 21 trailing zero bits, so k * LN2_HIGH is exact for any
# exponent k of a float64.
LN2_HIGH: Final = 0.6931471803691238
LN2_LOW: Final = 1.9082149292705877e-10
LN2: Final = 0.6931471805599453
SQRT2: Final = 1.4142135623730951

MIN_LN_ARGUMENT: Final = 2.2250738585072014e-308  # smallest normal float64
MAX_HALVINGS: Final = 64.0
"""`half_power` takes more halvings than this as this many: 2**-64 of anything is nothing."""

_MANTISSA: Final = 0x000F_FFFF_FFFF_FFFF
_ONE_BITS: Final = 0x3FF0_0000_0000_0000
_TWO_52_BITS: Final = 0x4330_0000_0000_0000
_TWO_52_AND_BIAS: Final = 4503599627370496.0 + 1023.0

# No zero-division branches (every divisor is positive), no reference counts (nothing here can
# allocate: the compiler refuses it).
LEAN: Final[dict[str, Any]] = {"cache": True, "error_model": "numpy", "_nrt": False}

# 2 artanh(s) = 2s + s * (A1 z + A2 z**2 + ...), z = s**2, A_n = 2 / (2n + 1).
_A1: Final = 2.0 / 3.0
_A2: Final = 2.0 / 5.0
_A3: Final = 2.0 / 7.0
_A4: Final = 2.0 / 9.0
_A5: Final = 2.0 / 11.0
_A6: Final = 2.0 / 13.0
_A7: Final = 2.0 / 15.0
_A8: Final = 2.0 / 17.0
_A9: Final = 2.0 / 19.0
_A10: Final = 2.0 / 21.0

# exp(g) = 1 + (even + odd), factorials inverted once.
_E2: Final = 1.0 / 2.0
_E3: Final = 1.0 / 6.0
_E4: Final = 1.0 / 24.0
_E5: Final = 1.0 / 120.0
_E6: Final = 1.0 / 720.0
_E7: Final = 1.0 / 5040.0
_E8: Final = 1.0 / 40320.0
_E9: Final = 1.0 / 362880.0
_E10: Final = 1.0 / 3628800.0
_E11: Final = 1.0 / 39916800.0
_E12: Final = 1.0 / 479001600.0
_E13: Final = 1.0 / 6227020800.0


@inner("float64(float64)", **LEAN)
def ln(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a finite positive float64; below 1 ulp of error, bit for bit portable.

    Parameters
    ----------
    x : float
        Positive and finite. Anything below the smallest normal float64 (zero and negative
        numbers too) is taken as that, so the result is always finite.

    Returns
    -------
    float
        ``ln x``.

    Examples
    --------
    >>> ln(1.0)
    0.0
    >>> ln(8.0) == 3 * LN2
    True
    """
    x = x if x > MIN_LN_ARGUMENT else MIN_LN_ARGUMENT
    bits = np.float64(x).view(np.int64)
    m = np.int64((bits & _MANTISSA) | _ONE_BITS).view(np.float64)
    # The exponent as a float64 by its bits: a conversion instruction would stop vectorisation.
    k = np.int64((bits >> 52) | _TWO_52_BITS).view(np.float64) - _TWO_52_AND_BIAS
    high = m > SQRT2
    m = m * 0.5 if high else m
    k = k + 1.0 if high else k
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    odd = z * (_A1 + w * (_A3 + w * (_A5 + w * (_A7 + w * _A9))))
    even = w * (_A2 + w * (_A4 + w * (_A6 + w * (_A8 + w * _A10))))
    r = odd + even
    half = 0.5 * f * f
    return k * LN2_HIGH - ((half - (s * (half + r) + k * LN2_LOW)) - f)


@inner("float64(float64)", **LEAN)
def half_power(halvings):  # type: ignore[no-untyped-def]
    """``2 ** -halvings``: what is left after that many half-lives; below 2 ulp of error.

    Parameters
    ----------
    halvings : float
        At least 0; more than `MAX_HALVINGS` is taken as that.

    Returns
    -------
    float
        In [2**-64, 1]; exactly 1 for 0 halvings and exact for whole numbers.

    Examples
    --------
    >>> half_power(0.0), half_power(3.0)
    (1.0, 0.125)
    """
    x = min(max(halvings, 0.0), MAX_HALVINGS)
    n = np.int64(x + 0.5)
    g = (np.float64(n) - x) * LN2
    w = g * g
    even = w * (_E2 + w * (_E4 + w * (_E6 + w * (_E8 + w * (_E10 + w * _E12)))))
    odd = g * (1.0 + w * (_E3 + w * (_E5 + w * (_E7 + w * (_E9 + w * (_E11 + w * _E13))))))
    scale = np.int64((1023 - n) << 52).view(np.float64)
    return (1.0 + (odd + even)) * scale
