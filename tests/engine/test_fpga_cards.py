"""XRT cards: the reference's bits through AMD's interface, or a refusal in a line.

The card is the stand-in of `tests.engine.fpga_doubles`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backends.fpga import xrt_card, xrt_kernel
from engine.backends.fpga.xrt_card import XrtCard
from engine.backends.lowering import lower_bundle
from engine.backends.onnx import OnnxBackend
from engine.bundle import Bundle, load_bundle
from engine.features import N_FEATURES
from engine.trust import CHECK_INPUT
from tests.engine.bundles import make_bundle
from tests.engine.fpga_bundles import CLASSES, STREAMS, Bundles, ask, make_bundles, refused, rows
from tests.engine.fpga_doubles import Fault, XrtHardware, xrt_module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return make_bundles(tmp_path_factory)


class XrtSlot:
    """A machine with one card, and an ``.xclbin`` beside the bundle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bundle: Bundle, path: Path) -> None:
        self.bundle, self.path = bundle, path
        self.hardware = XrtHardware(lower_bundle(bundle))
        self.link(f"octick_{bundle.model_hash:016x}" + self.suffix)
        monkeypatch.setenv(xrt_kernel.XCLBIN_VARIABLE, str(path))
        monkeypatch.setitem(sys.modules, "pyxrt", xrt_module(self.hardware))

    @property
    def suffix(self) -> str:
        """What stands behind the model's hash in the kernel's name."""
        return f"_{STREAMS}_streams" if self.bundle.state("int8") else ""

    def link(self, name: str, arguments: int = 4) -> None:
        """Write an ``.xclbin``."""
        self.path.write_text(json.dumps({"other_kernel": 7, name: arguments}))

    def open(self, device: str = "xrt:0", **kw: Any) -> XrtCard:
        """Open the bundle."""
        return XrtCard.open(self.bundle, device, **kw)

    def reopened(self) -> XrtCard:
        """A card that is right while it is tried; the next inference of its life is number 0."""
        card = self.open()
        self.hardware.inferences = 0
        return card


@pytest.fixture(params=["plain", "stateful"])
def slot(
    request: pytest.FixtureRequest,
    made: Bundles,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> XrtSlot:
    return XrtSlot(monkeypatch, getattr(made, request.param), tmp_path / "linked.xclbin")


@pytest.fixture
def plain_slot(made: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> XrtSlot:
    return XrtSlot(monkeypatch, made.plain, tmp_path / "linked.xclbin")


@pytest.fixture
def stateful_slot(made: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> XrtSlot:
    return XrtSlot(monkeypatch, made.stateful, tmp_path / "linked.xclbin")


def test_an_xrt_card_gives_the_reference_bits_and_masks(slot: XrtSlot) -> None:
    given = rows(120, STREAMS)
    card = slot.open()
    info = card.info()
    assert (info.name, info.device, info.precision) == ("fpga", "xrt:0", "int8")
    assert info.numerics == "exact-int8"
    assert info.model_hash == slot.bundle.model_hash
    expected = ask(OnnxBackend.open(slot.bundle), given)
    assert ask(card, given) == expected
    if slot.bundle.checks is not None:
        assert len({mask for _, mask in expected}) > 1
    card.close()
    by_address = slot.open("xrt:0000:65:00.1")
    assert ask(by_address, given) == expected


def test_an_xrt_card_sees_a_nan_that_no_code_can_show(plain_slot: XrtSlot) -> None:
    card = plain_slot.open()
    x, out = np.zeros((1, N_FEATURES), np.float32), np.empty(CLASSES, np.float32)
    assert not card.infer(0, x, out) & CHECK_INPUT
    x[0, 3] = np.nan
    assert card.infer(0, x, out) & CHECK_INPUT


def test_the_highest_bit_of_the_mask_is_a_bit(
    plain_slot: XrtSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = plain_slot.hardware.graph
    highest = tuple(replace(group, mask=1 << 31) for group in graph.checks)
    graph = plain_slot.hardware.graph = replace(graph, checks=highest)
    monkeypatch.setattr(xrt_card, "lower_bundle", lambda _: graph)
    assert {mask for _, mask in ask(plain_slot.open(), rows(40))} == {0, 1 << 31}


def test_a_reset_on_an_xrt_card_is_a_fresh_stream_and_only_that(stateful_slot: XrtSlot) -> None:
    card = stateful_slot.open()
    reference = OnnxBackend.open(stateful_slot.bundle)
    for seed in range(3):
        given = rows(30, STREAMS, seed)
        assert ask(card, given) == ask(reference, given)
        card.reset(seed)
        reference.reset(seed)


def test_answers_of_an_xrt_card_come_in_order_and_a_full_ring_refuses(slot: XrtSlot) -> None:
    given = rows(xrt_card.MAX_IN_FLIGHT, STREAMS)
    more = rows(5, STREAMS, 1)
    expected = ask(OnnxBackend.open(slot.bundle), given + more)
    card = slot.open()
    out = np.empty(CLASSES, np.float32)
    assert card.poll(out) == -1
    for ticket, (stream, x) in enumerate(given, 100):
        assert card.submit(stream, ticket, x)
    assert not card.submit(0, 7, given[0][1])
    assert ask(card, more) == expected[len(given) :], "asked while others are under way"
    unready = 0
    for ticket in range(100, 100 + len(given)):
        while (found := card.poll(out)) == -1:
            unready += 1
            assert unready < 1_000
        assert found == ticket
        assert out.tobytes() == expected[ticket - 100][0]
    assert card.poll(out) == -1
    assert card.submit(0, 8, given[0][1])


def test_polling_an_xrt_card_does_not_wait(plain_slot: XrtSlot) -> None:
    card = plain_slot.open()
    out = np.empty(CLASSES, np.float32)
    assert card.submit(0, 1, rows(1)[0][1])
    assert [card.poll(out) for _ in range(plain_slot.hardware.slow + 1)] == [-1, -1, 1]


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (Fault(score=1), "accumulator of score 0"),
        (Fault(mask=1 << 31), "value check's mask"),
        (Fault(deaf_to_reset=True), "accumulator"),
        (Fault(one_state=True), "accumulator"),
    ],
    ids=["score", "mask", "reset", "streams"],
)
def test_an_xrt_card_that_answers_wrongly_does_not_open(
    stateful_slot: XrtSlot, fault: Fault, part: str
) -> None:
    stateful_slot.hardware.fault = fault
    error = refused(stateful_slot.open, "does not compute what the bundle says")
    assert part in error.where
    assert not stateful_slot.hardware.held, "given back"
    stateful_slot.hardware.fault = Fault()
    assert stateful_slot.open().info().numerics == "exact-int8"


@pytest.mark.parametrize("fault", [Fault(fails_at=5), Fault(hangs_at=5)], ids=["fails", "hangs"])
def test_an_xrt_card_that_fails_while_it_is_tried_does_not_open(
    slot: XrtSlot, fault: Fault
) -> None:
    slot.hardware.fault = fault
    refused(slot.open, "failed while it was tried")


@pytest.mark.parametrize("fault", [Fault(fails_at=5), Fault(hangs_at=5)], ids=["fails", "hangs"])
def test_an_xrt_card_that_failed_answers_no_more(slot: XrtSlot, fault: Fault) -> None:
    given = rows(6, STREAMS)
    expected = ask(OnnxBackend.open(slot.bundle), given)
    card = slot.reopened()
    slot.hardware.fault = fault
    assert ask(card, given[:5]) == expected[:5]
    out = np.empty(CLASSES, np.float32)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the card failed"):
            card.infer(*given[5], out)
    with pytest.raises(RuntimeError, match="until it is opened anew"):
        card.submit(0, 1, given[5][1])
    with pytest.raises(RuntimeError, match="until it is opened anew"):
        card.poll(out)
    card.close()
    slot.hardware.queue.clear()  # as `xbutil reset` does
    assert not slot.hardware.held


def test_a_failure_under_way_comes_out_at_the_poll(plain_slot: XrtSlot) -> None:
    card = plain_slot.reopened()
    plain_slot.hardware.fault = Fault(fails_at=0)
    assert card.submit(0, 1, rows(1)[0][1])
    out = np.empty(CLASSES, np.float32)
    assert [card.poll(out) for _ in range(plain_slot.hardware.slow)] == [-1, -1]
    with pytest.raises(RuntimeError, match="the card failed"):
        card.poll(out)


def test_a_closed_xrt_card_is_free_for_others_and_answers_no_more(slot: XrtSlot) -> None:
    card = slot.open()
    refused(slot.open, "busy")
    assert card.submit(0, 1, rows(1)[0][1])
    card.close()
    card.close()
    assert not slot.hardware.queue, "nothing writes into buffers that are gone"
    x, out = np.zeros((1, N_FEATURES), np.float32), np.empty(CLASSES, np.float32)
    for call in (
        lambda: card.infer(0, x, out),
        lambda: card.submit(0, 1, x),
        lambda: card.poll(out),
    ):
        with pytest.raises(AssertionError, match="closed"):
            call()
    slot.open().close()


def test_more_streams_than_the_circuit_keeps(stateful_slot: XrtSlot) -> None:
    card = stateful_slot.open()
    x, out = np.zeros((1, N_FEATURES), np.float32), np.empty(CLASSES, np.float32)
    card.infer(STREAMS - 1, x, out)
    for call in (lambda: card.infer(STREAMS, x, out), lambda: card.reset(STREAMS)):
        assert refused(call, "more streams").expected == f"0 to {STREAMS - 1}"


def test_circuits_of_other_models_are_refused(slot: XrtSlot) -> None:
    other_kind = "" if slot.suffix else f"_{STREAMS}_streams"
    name = f"octick_{slot.bundle.model_hash:016x}"
    for wrong in (f"octick_{slot.bundle.model_hash ^ 1:016x}{slot.suffix}", name + other_kind):
        slot.link(wrong)
        error = refused(slot.open, "not of this model")
        assert name in error.expected
        assert wrong in error.found
    slot.link(name + slot.suffix, arguments=5)
    refused(slot.open, "not of this model")
    slot.path.write_bytes(b"no xclbin")
    refused(slot.open, "cannot read the .xclbin")
    assert not slot.hardware.loaded, "looked at before it is loaded"


def test_the_circuit_stands_beside_the_bundle_or_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path)
    bundle = load_bundle(tmp_path)
    slot = XrtSlot(monkeypatch, bundle, tmp_path / xrt_kernel.XCLBIN_NAME)
    monkeypatch.delenv(xrt_kernel.XCLBIN_VARIABLE)
    slot.open().close()
    slot.path.unlink()
    assert refused(slot.open, "no circuit").where == str(slot.path)
    monkeypatch.setenv(xrt_kernel.XCLBIN_VARIABLE, "elsewhere.xclbin")
    assert "elsewhere.xclbin" in refused(slot.open, "no circuit").where


def test_what_an_xrt_card_cannot_be_is_said(
    plain_slot: XrtSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in ("xrt:", "xrt:one", "xrt:0000:65:00.9", "vollo:0"):
        assert (
            refused(lambda d=device: plain_slot.open(d), "name of an XRT").where == "model.device"
        )  # type: ignore[misc]
    refused(lambda: plain_slot.open("xrt:3"), "no such card")
    refused(lambda: plain_slot.open(precision="fp32"), r"model\.precision")
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    assert "AMD's XRT" in refused(plain_slot.open, "XRT runtime is not here").fix
