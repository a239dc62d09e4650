"""Integers at powers of two against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backends.dyadic import (
    LIMIT,
    Dyadic,
    InexactError,
    add,
    aligned,
    check_exact,
    common,
    dyadic,
    from_float,
    matmul,
    multiply,
    quantise,
    round_to_integer,
    to_float,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MANTISSAS = st.lists(st.integers(-LIMIT, LIMIT), min_size=1, max_size=6)
EXPONENTS = st.integers(-20, 10)


def fractions(value: Dyadic) -> list[Fraction]:
    """Each element as an exact fraction."""
    units = np.broadcast_to(value.e, value.shape).ravel()
    return [
        Fraction(int(m)) * Fraction(2) ** int(e)
        for m, e in zip(value.m.ravel(), units, strict=True)
    ]


def round_half_even(value: Fraction) -> int:
    """As Python rounds fractions."""
    return round(value)


@given(st.lists(FLOATS, min_size=1, max_size=8))
def test_every_float32_is_held_exactly(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    held = from_float(array)
    assert fractions(held) == [Fraction(float(value)) for value in array]
    assert (to_float(held) == array).all()


def test_what_is_no_number_is_refused() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(InexactError):
            from_float(np.array([1.0, bad], dtype=np.float32))


def test_zero_has_one_sign_and_one_unit_serves_all_that_fit() -> None:
    held = from_float(np.array([0.0, -0.0, 1.0, 0.5, -3.0], dtype=np.float32))
    assert held.one_unit
    assert held.m.tolist() == [0, 0, 2, 1, -6]
    assert int(held.e) == -1
    assert not np.signbit(to_float(held)[:2]).any()
    assert not from_float(np.array([1e-30, 1e30], dtype=np.float32)).one_unit
    assert from_float(np.zeros(3, dtype=np.float32)).one_unit


@given(MANTISSAS, EXPONENTS, st.integers(-(2**24), 2**24), EXPONENTS)
def test_sums_differences_and_products_do_not_round(
    m: list[int], e: int, other: int, f: int
) -> None:
    a, b = dyadic(np.array(m), e), dyadic(np.array([other]), f)
    right = fractions(b)[0]
    assert fractions(add(a, b)) == [left + right for left in fractions(a)]
    assert fractions(add(a, b, -1)) == [left - right for left in fractions(a)]
    assert fractions(multiply(a, b)) == [left * right for left in fractions(a)]


def test_units_differ_from_channel_to_channel_and_broadcast() -> None:
    a = dyadic(np.array([[1, 2, 3], [4, 5, 6]]), np.array([0, -1, -2]))
    b = dyadic(np.array([[7], [8]]), np.array([[3], [-3]]))
    left, right, e = aligned(a, b)
    assert (np.ldexp(left, e) == np.ldexp(a.m, a.e)).all()
    assert (np.ldexp(right, e) == np.ldexp(np.broadcast_to(b.m, (2, 3)), b.e)).all()
    assert common(a, [1]).m.tolist() == [[4, 4, 3], [16, 10, 6]]
    assert common(a, [0]).e.tolist() == [[0, -1, -2]]
    product = matmul(a, dyadic(np.array([[1, 2], [3, 4], [5, 6]]), np.array([[0, -4]])))
    exact = np.ldexp(a.m, a.e) @ np.ldexp([[1, 2], [3, 4], [5, 6]], [[0, -4]])
    assert (to_float(product) == exact).all()
    assert product.e.shape == (1, 2)


def test_what_int64_cannot_hold_is_refused_not_wrapped() -> None:
    near, far = dyadic(np.array([1]), -40), dyadic(np.array([LIMIT]), 10)
    with pytest.raises(InexactError, match="apart"):
        add(near, far)
    wide = dyadic(np.array([1 << 40]), 0)
    with pytest.raises(InexactError, match="product"):
        multiply(wide, wide)
    with pytest.raises(InexactError, match="products"):
        matmul(dyadic(np.full((1, 2), 1 << 40), 0), dyadic(np.full((2, 1), 1 << 40), 0))


@pytest.mark.parametrize(
    ("m", "e", "holds"),
    [
        (LIMIT, 0, True),
        (LIMIT + 1, 0, False),
        (LIMIT + 2, 0, True),
        (-LIMIT - 1, 5, False),
        (((1 << 24) - 1) << 20, -10, True),
        ((1 << 25) - 1, 0, False),
        (1, -126, True),
        (1, -127, False),
        (1, 65, False),
        (0, 0, True),
    ],
)
def test_float32_holds_24_bits_between_lowest_and_highest(m: int, e: int, holds: bool) -> None:
    value = dyadic(np.array([1, m]), e)
    if holds:
        check_exact(value)
        assert fractions(value)[1] == Fraction(float(to_float(value)[1]))
    else:
        with pytest.raises(InexactError):
            check_exact(value)


@settings(max_examples=300)
@given(MANTISSAS, st.integers(-70, 45), st.integers(0, 255))
def test_quantising_rounds_half_to_even_then_adds_the_zero_point_then_saturates(
    m: list[int], e: int, zero: int
) -> None:
    value = dyadic(np.array(m), e)
    expected = [min(max(round_half_even(f) + zero, 0), 255) for f in fractions(value)]
    assert quantise(value, 0, zero).tolist() == expected
    assert quantise(Dyadic(value.m, value.e - 9), -9, zero).tolist() == expected


def test_ties_go_to_the_even_code_on_both_sides_of_zero() -> None:
    halves = dyadic(np.arange(-7, 8), -1)
    assert round_to_integer(halves).m.tolist() == [
        -4,
        -3,
        -2,
        -2,
        -2,
        -1,
        0,
        0,
        0,
        1,
        2,
        2,
        2,
        3,
        4,
    ]
    assert quantise(halves, 0, 3).tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5, 6, 7]


@given(st.lists(FLOATS, min_size=1, max_size=8), st.integers(-30, 30))
def test_any_float32_quantises_as_its_exact_value_does(values: list[float], exponent: int) -> None:
    array = np.array(values, dtype=np.float32)
    expected = [
        min(max(round_half_even(Fraction(float(value)) / Fraction(2) ** exponent) + 128, 0), 255)
        for value in array
    ]
    assert quantise(from_float(array), exponent, 128).tolist() == expected


@given(MANTISSAS, EXPONENTS)
def test_rounding_to_whole_numbers(m: list[int], e: int) -> None:
    value = dyadic(np.array(m), e)
    assert fractions(round_to_integer(value)) == [round_half_even(f) for f in fractions(value)]


def test_rounding_where_some_units_are_whole_and_some_are_not() -> None:
    value = dyadic(np.array([5, 5, -5]), np.array([2, -1, -1]))
    assert fractions(round_to_integer(value)) == [20, 2, -2]
