"""C functions by their addresses: those of the C library, of one width and of the other."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from numba import njit
from numba.core.errors import TypingError
from numba.extending import intrinsic

from feeds.c_functions import INT, WORD, c_function

LIBRARY = ctypes.CDLL(None)


def address(name: str) -> int:
    found = ctypes.cast(getattr(LIBRARY, name), ctypes.c_void_p).value
    assert found is not None
    return found


@intrinsic
@c_function(INT, [INT])
def narrow(typingctx: Any, function: Any, number: Any) -> Any:
    """``toupper`` and the like."""


@intrinsic
@c_function(WORD, [WORD, WORD, INT])
def parse(typingctx: Any, function: Any, text: Any, end: Any, radix: Any) -> Any:
    """``strtoll``."""


@njit
def call_narrow(function, number):  # type: ignore[no-untyped-def]
    return narrow(function, number)


@njit
def call_parse(function, text, end, radix):  # type: ignore[no-untyped-def]
    return parse(function, text, end, radix)


@njit
def call_with_too_few(function, text):  # type: ignore[no-untyped-def]
    return parse(function, text)


def test_an_int_keeps_its_sign_on_the_way_back() -> None:
    assert call_narrow(address("toupper"), ord("a")) == ord("A")
    assert call_narrow(address("toupper"), -1) == -1  # EOF


def test_an_int_is_the_low_half_of_a_number() -> None:
    assert call_narrow(address("toupper"), ord("a") + (1 << 40)) == ord("A")


@pytest.mark.parametrize("value", [0, -5, (1 << 62) + 3, -(1 << 63)])
def test_pointers_and_wide_numbers_pass_whole(value: int) -> None:
    text = ctypes.create_string_buffer(f"{value:+o} rest".encode())
    end = ctypes.c_void_p()
    found = call_parse(address("strtoll"), ctypes.addressof(text), ctypes.addressof(end), 8)
    assert found == value
    assert ctypes.string_at(end.value or 0) == b" rest"


def test_another_number_of_arguments_does_not_compile() -> None:
    with pytest.raises(TypingError, match="Cannot bind"):
        call_with_too_few(address("strtoll"), 0)
