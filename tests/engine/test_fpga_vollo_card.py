"""VOLLO cards: within a tolerance through Myrtle.ai's interface, or a refusal in a line.

The card is the stand-in of `tests.engine.fpga_doubles`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engine.backends.fpga import vollo_card, vollo_program
from engine.backends.fpga.vollo_card import VolloCard
from engine.backends.onnx import OnnxBackend
from engine.backends.qdq_graph import without_checks
from engine.bundle import Bundle, load_bundle
from engine.features import N_FEATURES
from engine.trust import CHECK_INPUT, CHECK_OUTPUT
from tests.conftest import ROOT
from tests.engine.fpga_bundles import CLASSES, STREAMS, Bundles, ask, make_bundles, refused, rows
from tests.engine.fpga_doubles import Fault, VolloHardware, bfloat16, vollo_module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return make_bundles(tmp_path_factory)


def far(found: list[tuple[bytes, int]], expected: list[tuple[bytes, int]]) -> float:
    """Greatest difference of a score."""
    a, b = (np.array([np.frombuffer(s, np.float32) for s, _ in item]) for item in (found, expected))
    return float(np.abs(a - b).max())


class VolloSlot:
    """A machine with one card, and a program."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, bundle: Bundle, path: Path, sdk: int = 29
    ) -> None:
        self.bundle, self.path = bundle, path
        state = bundle.state("fp32")
        self.hardware = VolloHardware(_without_checks(bundle), state)
        self.compile()
        monkeypatch.setenv(vollo_program.PROGRAM_VARIABLE, str(path))
        monkeypatch.setitem(sys.modules, "vollo_rt", vollo_module(self.hardware, sdk=sdk))
        monkeypatch.setattr(vollo_program, "DRAWN_ROWS", 2 * vollo_card.RESET_EVERY)
        self.opened: list[VolloCard] = []

    def compile(self, **changed: Any) -> None:
        """Write a program, for as many streams as the tests use."""
        models = STREAMS if self.bundle.state("fp32") else 1
        right = {"name": f"octick_{self.bundle.model_hash:016x}", "models": models}
        self.hardware.write_program(self.path, **right | changed)

    def open(self, device: str = "vollo:0", **kw: Any) -> VolloCard:
        """Open the bundle."""
        self.opened.append(VolloCard.open(self.bundle, device, **{"precision": "fp32"} | kw))
        return self.opened[-1]

    def close(self) -> None:
        """Close whatever is open: there can be one."""
        for card in self.opened:
            card.close()


def _without_checks(bundle: Bundle) -> bytes:
    model = onnx.load_model_from_string(bundle.model_bytes("fp32"))
    return bytes(without_checks(model).SerializeToString())


@pytest.fixture(params=["plain", "stateful"])
def vollo(
    request: pytest.FixtureRequest,
    made: Bundles,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[VolloSlot]:
    found = VolloSlot(monkeypatch, getattr(made, request.param), tmp_path / "compiled.vollo")
    yield found
    found.close()


@pytest.fixture
def stateful_vollo(
    made: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[VolloSlot]:
    found = VolloSlot(monkeypatch, made.stateful, tmp_path / "compiled.vollo")
    yield found
    found.close()


def test_bfloat16_rounds_half_to_even() -> None:
    given = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -3.0e38, 0.1], np.float32)
    expected = np.array([1.0, 1.0, 1.0 + 2**-6, -3.0042e38, 0.10009766], np.float32)
    np.testing.assert_allclose(bfloat16(given), expected, rtol=1e-4)
    assert bfloat16(given)[1] == 1.0


def test_a_vollo_card_is_within_its_tolerance_and_says_so(vollo: VolloSlot) -> None:
    given = rows(120, STREAMS)
    card = vollo.open()
    info = card.info()
    assert (info.name, info.device, info.precision) == ("fpga", "vollo:0", "fp32")
    assert info.numerics == "tolerance"
    assert 0.0 < card.difference <= card.tolerance
    found = ask(card, given)
    expected = ask(OnnxBackend.open(vollo.bundle, precision="fp32"), given)
    assert 0.0 < far(found, expected) < 2.0 * card.tolerance
    assert [mask for _, mask in found] == [mask for _, mask in expected]
    card.close()


def test_the_bound_of_a_vollo_card_is_the_one_it_measures_against(
    vollo: VolloSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = vollo.open()
    limit, own = card.tolerance, card.difference
    card.close()
    vollo.hardware.fault = Fault(score=limit - 1.1 * own)
    vollo.open().close()
    vollo.hardware.fault = Fault(score=limit + 1.1 * own)
    refused(vollo.open, "too far from the bundle's FP32 model")
    vollo.hardware.fault = Fault(score=float("nan"))
    refused(vollo.open, "too far from the bundle's FP32 model")
    vollo.hardware.fault = Fault()
    vollo.open().close()


def test_golden_inputs_are_what_a_vollo_card_is_tried_with() -> None:
    reference = load_bundle(ROOT / "models" / "reference")
    with np.load(reference.path / vollo_program.GOLDEN_NAME) as golden:
        assert np.array_equal(vollo_program.trial_inputs(reference), golden["x"])


def test_a_reset_on_a_vollo_card_is_a_fresh_stream_and_only_that(
    stateful_vollo: VolloSlot,
) -> None:
    card = stateful_vollo.open()
    reference = OnnxBackend.open(stateful_vollo.bundle, precision="fp32")
    for seed in range(3):
        given = rows(40, STREAMS, seed)
        assert far(ask(card, given), ask(reference, given)) < 2.0 * card.tolerance
        card.reset(seed)
        reference.reset(seed)
    first = rows(1)[0][1]
    card.reset(0)
    assert card.submit(0, 1, first), "before the next reset"
    card.reset(0)
    once, twice = ask(card, [(0, first)] * 2)
    card.reset(0)
    assert ask(card, [(0, first)] * 2) == [once, twice]
    assert once != twice
    out = np.empty(CLASSES, np.float32)
    assert card.poll(out) == 1
    assert out.tobytes() == once[0]
    card.close()


def test_answers_of_a_vollo_card_come_in_order_and_a_full_queue_refuses(vollo: VolloSlot) -> None:
    given = rows(vollo_card.MAX_IN_FLIGHT, STREAMS)
    more = rows(5, STREAMS, 1)
    card = vollo.open()
    expected = ask(card, given + more)
    for stream in range(STREAMS):
        card.reset(stream)
    out, entry = np.empty(CLASSES, np.float32), np.empty((1, N_FEATURES), np.float32)
    assert card.poll(out) == -1
    vollo.hardware.slow = 1 << 60
    for ticket, (stream, x) in enumerate(given, 100):
        entry[:] = x  # the caller's array is free at once
        assert card.submit(stream, ticket, entry)
    assert not card.submit(0, 7, entry)
    assert card.poll(out) == -1
    vollo.hardware.slow = 2
    assert ask(card, more) == expected[len(given) :]
    for ticket in range(100, 100 + len(given)):
        while (found := card.poll(out)) == -1:
            pass
        assert found == ticket
        assert out.tobytes() == expected[ticket - 100][0]
    assert card.poll(out) == -1
    card.close()


def test_a_vollo_card_checks_values_on_the_host(
    made: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slot = VolloSlot(monkeypatch, made.plain, tmp_path / "compiled.vollo")
    card = slot.open()
    x, out = np.zeros((1, N_FEATURES), np.float32), np.empty(CLASSES, np.float32)
    assert card.infer(0, x, out) == 0
    slot.hardware.fault = Fault(score=float("inf"))
    assert card.infer(0, x, out) == CHECK_OUTPUT
    slot.hardware.fault = Fault()
    x[0, 3] = 2.0 * made.plain.clip
    assert card.infer(0, x, out) == CHECK_INPUT
    card.close()


@pytest.mark.parametrize("fault", [Fault(fails_at=3), Fault(hangs_at=3)], ids=["fails", "hangs"])
def test_a_vollo_card_that_failed_answers_no_more(
    vollo: VolloSlot, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rows(4)
    card = vollo.open()
    vollo.hardware.inferences, vollo.hardware.fault = 0, fault
    ask(card, given[:3])
    monkeypatch.setattr(vollo_card, "ANSWER_WITHIN_S", 0.05)
    out = np.empty(CLASSES, np.float32)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the card"):
            card.infer(*given[3], out)
    with pytest.raises(RuntimeError, match="until it is opened anew"):
        card.submit(0, 1, given[0][1])
    with pytest.raises(RuntimeError, match="until it is opened anew"):
        card.poll(out)
    card.close()
    assert vollo.hardware.contexts == 0
    vollo.hardware.inferences = 0
    refused(vollo.open, "failed while it was tried")
    assert vollo.hardware.contexts == 0


@pytest.mark.parametrize(
    "fault", [Fault(deaf_to_reset=True), Fault(one_state=True)], ids=["reset", "streams"]
)
def test_a_vollo_card_with_anothers_state_does_not_open(
    stateful_vollo: VolloSlot, fault: Fault
) -> None:
    stateful_vollo.hardware.fault = fault
    refused(stateful_vollo.open, "too far from the bundle's FP32 model")


def test_one_vollo_card_at_a_time_and_none_after_it_is_closed(vollo: VolloSlot) -> None:
    card = vollo.open()
    refused(vollo.open, "open already")
    card.close()
    card.close()
    x, out = np.zeros((1, N_FEATURES), np.float32), np.empty(CLASSES, np.float32)
    for call in (
        lambda: card.infer(0, x, out),
        lambda: card.submit(0, 1, x),
        lambda: card.poll(out),
    ):
        with pytest.raises(AssertionError, match="closed"):
            call()
    vollo.open().close()


def test_more_streams_than_the_program_has_models(stateful_vollo: VolloSlot) -> None:
    card = stateful_vollo.open()
    x, out = np.zeros((1, N_FEATURES), np.float32), np.empty(CLASSES, np.float32)
    card.infer(STREAMS - 1, x, out)
    for call in (lambda: card.infer(STREAMS, x, out), lambda: card.reset(STREAMS)):
        assert refused(call, "more streams").expected == f"0 to {STREAMS - 1}"
    card.close()


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"name": "octick_0123456789abcdef"}, "not of this model"),
        ({"name": None}, "not of this model"),
        ({"ends": [2, 2]}, "other inputs and outputs"),
        ({"input_shape": [1, 95]}, "other inputs and outputs"),
        ({"block_size": 64}, "cannot load the program"),
        ({"streaming": False}, "this program keeps none"),
        ({"resettable": False}, "cannot be reset"),
    ],
)
def test_programs_that_cannot_serve_are_refused(
    stateful_vollo: VolloSlot, changed: dict[str, Any], what: str
) -> None:
    stateful_vollo.compile(**changed)
    refused(stateful_vollo.open, what)
    assert stateful_vollo.hardware.contexts == 0
    stateful_vollo.compile()
    stateful_vollo.open().close()


def test_a_runtime_that_cannot_reset_serves_no_model_with_state(
    made: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = VolloSlot(monkeypatch, made.stateful, tmp_path / "compiled.vollo", sdk=27)
    assert "SDK 28" in refused(old.open, "cannot be reset").expected
    VolloSlot(monkeypatch, made.plain, tmp_path / "compiled.vollo", sdk=27).open().close()


def test_what_a_vollo_card_cannot_be_is_said(
    vollo: VolloSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in ("vollo:", "vollo:x", "xrt:0"):
        assert refused(lambda d=device: vollo.open(d), "name of a VOLLO").where == "model.device"  # type: ignore[misc]
    refused(lambda: vollo.open("vollo:1"), "opens no such card")
    assert "fp32" in refused(lambda: vollo.open(precision="int8"), r"model\.precision").fix
    vollo.path.write_bytes(b"no program")
    refused(vollo.open, "cannot load the program")
    vollo.path.unlink()
    refused(vollo.open, "no program for the card")
    vollo.compile()
    monkeypatch.setitem(sys.modules, "vollo_rt", None)
    assert "Myrtle.ai" in refused(vollo.open, "VOLLO runtime is not here").fix
