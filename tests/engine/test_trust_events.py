"""Trust events on the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.trust_events import COMMAND_NAMES, MAX_TEXT, Control, ShadowAnswer, decode_event
from feeds.errors import InputError

u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=32)


@given(st.sampled_from(sorted(COMMAND_NAMES)), i64, text, text, i64, u64, u64)
def test_a_control_survives_the_wire(
    command: int, now_ns: int, by: str, why: str, value: int, model_hash: int, seq: int
) -> None:
    event = Control(command, now_ns, by, why, value, model_hash, seq, "sim", "ALPHA")
    assert decode_event(event.encode()) == event


@given(u64, st.lists(st.floats(width=32, allow_nan=False), max_size=5))
def test_an_answer_survives_the_wire(ticket: int, scores: list[float]) -> None:
    fp32 = np.array(scores, dtype=np.float32)
    event = ShadowAnswer(ticket, 7, "sim", "ALPHA", 1, fp32, -fp32)
    found = decode_event(event.encode())
    assert isinstance(found, ShadowAnswer)
    assert found[:5] == event[:5]
    assert found.fp32.tolist() == fp32.tolist()
    assert found.int8.tolist() == (-fp32).tolist()


def test_a_long_text_is_cut_and_what_is_not_ascii_replaced() -> None:
    found = decode_event(Control(1, 0, "Zoë", "x" * 999).encode())
    assert isinstance(found, Control)
    assert found.by == "Zo?"
    assert found.text == "x" * MAX_TEXT


def test_what_is_no_event_is_refused_in_one_line() -> None:
    whole = ShadowAnswer(1, 1, "a", "b", 0, np.ones(3, np.float32), np.ones(3, np.float32)).encode()
    for bad in (b"", whole[:7], whole[:60], whole[:-1], b"\0" * 100, Control(1, 0).encode()[:-1]):
        with pytest.raises(InputError, match="cannot be read"):
            decode_event(bad)
