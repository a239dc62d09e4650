"""ln and 2**-x: accurate, monotone where it matters, the same bits whoever computes them."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.elementary import LN2, MAX_HALVINGS, MIN_LN_ARGUMENT, half_power, ln
from tests.engine import feature_reference

positive = st.floats(min_value=MIN_LN_ARGUMENT, allow_infinity=False, allow_nan=False)
halvings = st.floats(min_value=0.0, max_value=MAX_HALVINGS)


def _ulps(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest distance of ``found`` from extended-precision values, in float64 spacings."""
    spacing = np.spacing(np.abs(exact).astype(np.float64)).astype(np.longdouble)
    return float(np.max(np.abs(found.astype(np.longdouble) - exact) / spacing))


def _arguments() -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.concatenate(
        [
            1.0 + np.arange(0, 20_000, dtype=np.float64),  # what log sizes are taken of
            np.exp(rng.uniform(-700, 700, 20_000)),
            1.0 + rng.uniform(-0.3, 0.45, 20_000),
            1.0 + np.ldexp(rng.uniform(-1, 1, 5_000), -40),
            np.nextafter([math.sqrt(2), math.sqrt(0.5), 1.0, 2.0], np.inf),
            np.nextafter([math.sqrt(2), math.sqrt(0.5), 1.0, 2.0], 0.0),
            [MIN_LN_ARGUMENT, np.finfo(np.float64).max],
        ]
    )


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no wider float to compare with")
def test_ln_is_within_one_ulp() -> None:
    x = _arguments()
    found = np.array([ln(v) for v in x])
    exact = np.log(x.astype(np.longdouble))
    keep = exact != 0
    assert _ulps(found[keep], exact[keep]) < 1.0
    assert (found[~keep] == 0).all()


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no wider float to compare with")
def test_half_power_is_within_two_ulps() -> None:
    rng = np.random.default_rng(8)
    x = np.concatenate([rng.uniform(0, 64, 20_000), rng.uniform(0, 1, 20_000), np.logspace(-20, 0)])
    found = np.array([half_power(v) for v in x])
    exact = np.exp2(-x.astype(np.longdouble))
    assert _ulps(found, exact) < 2.0


def test_ln_of_what_everybody_knows() -> None:
    assert ln(1.0) == 0.0
    assert ln(2.0) == LN2
    assert ln(8.0) == 3 * LN2
    assert ln(math.e) == 1.0


@pytest.mark.parametrize("x", [0.0, -1.0, -math.inf, 5e-324])
def test_ln_is_finite_below_its_domain(x: float) -> None:
    assert ln(x) == ln(MIN_LN_ARGUMENT)
    assert math.isfinite(ln(x))


def test_whole_half_lives_are_exact() -> None:
    assert [half_power(float(n)) for n in range(65)] == [2.0**-n for n in range(65)]
    assert half_power(-3.0) == 1.0
    assert half_power(1e300) == 2.0**-64


@given(halvings)
def test_nothing_grows_by_waiting(x: float) -> None:
    assert 2.0**-64 <= half_power(x) <= 1.0


@given(positive)
def test_ln_has_the_bits_of_plain_python(x: float) -> None:
    assert struct.pack("<d", ln(x)) == struct.pack("<d", feature_reference.ln(x))


@given(halvings)
def test_half_power_has_the_bits_of_plain_python(x: float) -> None:
    assert struct.pack("<d", half_power(x)) == struct.pack("<d", feature_reference.half_power(x))
