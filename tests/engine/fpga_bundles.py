"""What the tests of card adapters share: two bundles, inputs of several streams, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from engine.backends.interface import Backend
from engine.bundle import Bundle, load_bundle
from engine.features import N_FEATURES
from feeds.errors import InputError
from tests.engine import integer_graphs
from tests.engine.bundles import float_twin, make_bundle, write_models
from tests.engine.integer_graphs import X_EXPONENT, X_ZERO, GraphBuilder

STREAMS = 4
CLASSES = 3
Row = tuple[int, np.ndarray]


class Bundles(NamedTuple):
    """A model with a value check and no state, and one with state."""

    plain: Bundle
    stateful: Bundle


def delayed(rng: np.random.Generator) -> GraphBuilder:
    """A uint8 delay of three steps before one dense layer and the scores."""
    g = GraphBuilder(N_FEATURES, CLASSES)
    q = g.quantise("x", X_EXPONENT, X_ZERO)
    old = g.remember("delay", "uint8", (3, N_FEATURES), X_ZERO)
    whole = g.node("Concat", [old, q], axis=0)
    g.node("Slice", [whole, *(g.constant([v], np.int64) for v in (1, 4, 0))], out="delay.next")
    q = g.node("Reshape", [whole, g.constant([1, 4 * N_FEATURES], np.int64)])
    sums = g.dense(rng, q, (X_EXPONENT, X_ZERO), (4 * N_FEATURES, 8), name="taps")
    q = g.quantise(sums, -2, 120)
    g.dense(rng, q, (-2, 120), (8, CLASSES), name="head", out="logits")
    return g


def make_bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Write and load both."""
    plain, stateful = (tmp_path_factory.mktemp(name) for name in ("plain", "stateful"))
    make_bundle(plain, checks=True)
    rng = np.random.default_rng(1)
    write_models(stateful, delayed(rng), float_twin(rng, N_FEATURES, CLASSES, True))
    return Bundles(load_bundle(plain), load_bundle(stateful))


def rows(n: int, streams: int = 1, seed: int = 0) -> list[Row]:
    """Inputs, some of them saturated, of several streams in turn."""
    rng = np.random.default_rng(seed)
    x = integer_graphs.inputs(rng, n, N_FEATURES)
    return [(int(rng.integers(streams)), x[i : i + 1]) for i in range(n)]


def ask(backend: Backend, given: list[Row]) -> list[tuple[bytes, int]]:
    """Scores and masks, one after another."""
    out = np.empty(CLASSES, np.float32)
    found = []
    for stream, x in given:
        mask = backend.infer(stream, x, out)
        found.append((out.tobytes(), mask))
    return found


def refused(call: Callable[[], object], what: str) -> InputError:
    """What is refused, in one line."""
    with pytest.raises(InputError, match=what) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value
