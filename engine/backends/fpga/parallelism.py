"""How many multipliers each layer gets, where a budget is all that is said.

Every layer has two good shapes. *Grouped* lanes take many inputs at once and few outputs, one group
of outputs after the other; *serial* lanes take few inputs and all outputs, and can begin while the
layer before them still brings codes, as many a beat as they take. The search starts with one
input at a time for all outputs, or where the budget is smaller with the fewest lanes, and always
buys what saves the most cycles a multiplier, of one layer or of two neighbours together. The cycles
are those of the planned design, not an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from engine.backends.fpga.rtl_circuit import Circuit
from engine.backends.fpga.rtl_pipeline import SUMS
from engine.backends.fpga.rtl_value import Lanes, Parallelism
from engine.backends.integer_graph import GruCell, IntegerGraph, LstmCell, denses

MULTIPLIERS: Final = 416  # of the MAC engines; a cell's few products come on top
BLOCKS: Final = 96
MAX_PURCHASES: Final = 200
MAX_UNITS: Final = 4  # of a cell at once: each has tables of its own
MIN_LANES: Final = 0.5  # what a purchase counts as that costs none
MAX_GROUP: Final = 16  # outputs of grouped lanes
_SLICES: Final = (1, 2, 3)
_STEPS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

Purchase = tuple[tuple[str, Lanes], ...]


def choose_parallelism(
    graph: IntegerGraph, multipliers: int = MULTIPLIERS, blocks: int = BLOCKS
) -> Parallelism:
    """Lanes of every layer, so that an inference takes few cycles.

    Parameters
    ----------
    graph : IntegerGraph
    multipliers : int
        Budget of all MAC engines together; each gets at least one lane.
    blocks : int
        How many of them may be multiplier blocks of the device. They go to the layers with the most
        lanes, of those whose weights change from step to step.
    """
    shapes = {name: tuple(dict.fromkeys(_shapes(graph, name))) for name in _engines(graph)}
    chosen = {name: found[0] for name, found in shapes.items()}
    if sum(lanes.count for lanes in chosen.values()) > multipliers:
        chosen = {name: min(found, key=lambda lanes: lanes.count) for name, found in shapes.items()}
    offers = list(dict.fromkeys(_purchases(shapes)))
    rates = np.full(len(offers), np.inf)
    for _ in range(MAX_PURCHASES):
        taken = _best(graph, chosen, offers, rates, multipliers)
        if taken is None:
            break
        chosen |= dict(taken)
        touched = _neighbours(list(shapes), taken)
        rates[[any(name in touched for name, _ in offer) for offer in offers]] = np.inf
    return Parallelism(_with_blocks(graph, chosen, blocks))


def _best(
    graph: IntegerGraph,
    chosen: dict[str, Lanes],
    offers: list[Purchase],
    rates: np.ndarray,
    multipliers: int,
) -> Purchase | None:
    """What saves the most cycles a multiplier; None where nothing within the budget saves any.

    ``rates`` are what was found last: a purchase elsewhere seldom makes one better, so only the
    best of them are looked at anew.
    """
    cycles, total = _cycles(graph, chosen), sum(lanes.count for lanes in chosen.values())
    looked_at: set[int] = set()
    while True:
        best = int(rates.argmax())
        if rates[best] <= 0:
            return None
        if best in looked_at:
            return offers[best]
        looked_at.add(best)
        taken = chosen | dict(offers[best])
        more = sum(lanes.count for lanes in taken.values()) - total
        rates[best] = 0.0
        if taken != chosen and total + more <= multipliers:
            saved = cycles - _cycles(graph, taken)
            rates[best] = saved / max(more, MIN_LANES)
            if saved == 0 and more < 0:
                rates[best] = MIN_LANES / multipliers


def _neighbours(names: list[str], taken: Purchase) -> set[str]:
    """The layers of a purchase, and the one behind them: what it saves depends on their beats."""
    at = [names.index(name) for name, _ in taken]
    return set(names[min(at) : max(at) + 2])


def _engines(graph: IntegerGraph) -> list[str]:
    return [layer.name for layer in graph.layers if denses(layer)]


def _shapes(graph: IntegerGraph, name: str) -> Iterator[Lanes]:
    """Lanes that are worth a try for a layer."""
    layer = next(layer for layer in graph.layers if layer.name == name)
    products = [product for dense in denses(layer) for product in dense.products]
    inputs = max(product.weight.shape[1] for product in products)
    if isinstance(layer, LstmCell | GruCell):
        for units in range(1, MAX_UNITS + 1):
            if layer.units % units == 0:
                yield from (Lanes(n, SUMS * units) for n in {*_up_to(inputs), inputs})
        return
    outputs = products[0].weight.shape[0]
    for n in _up_to(inputs):
        yield Lanes(n, outputs)
        yield Lanes(n, 1)
    for slices in _SLICES:
        for n in _up_to(min(outputs, MAX_GROUP)):
            yield Lanes(-(-inputs // slices), n)


def _up_to(greatest: int) -> list[int]:
    return [n for n in _STEPS if n <= greatest]


def _purchases(shapes: dict[str, tuple[Lanes, ...]]) -> Iterator[Purchase]:
    """What can be bought: lanes of one layer, or of a grouped one and the serial one behind it."""
    names = list(shapes)
    for at, name in enumerate(names):
        yield from (((name, lanes),) for lanes in shapes[name])
        if at + 1 == len(names):
            continue
        behind = names[at + 1]
        outputs = max(lanes.outputs for lanes in shapes[behind])
        for lanes in shapes[name]:
            if lanes.outputs <= MAX_GROUP:
                yield (name, lanes), (behind, Lanes(lanes.outputs, outputs))


def _cycles(graph: IntegerGraph, chosen: dict[str, Lanes]) -> int:
    return Circuit(graph, Parallelism(chosen), draft=True).due


def _with_blocks(graph: IntegerGraph, chosen: dict[str, Lanes], blocks: int) -> dict[str, Lanes]:
    """Hand out the multiplier blocks: whole outputs where they suffice for one."""
    plans = Circuit(graph, Parallelism(chosen), draft=True).plans
    found = {name: plan.lanes for name, plan in plans.items()}
    for name, plan in sorted(plans.items(), key=lambda entry: -entry[1].lanes.count):
        lanes = plan.lanes
        if plan.steps == 1:
            continue
        given = min(lanes.count, blocks)
        if given < lanes.count:
            given -= given % lanes.inputs
        found[name] = Lanes(lanes.inputs, lanes.outputs, given)
        blocks -= given
    return found
