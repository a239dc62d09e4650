"""LSTM and GRU cells of a QDQ graph, found by walking back from the state that they leave.

See `engine.backends.integer_graph.LstmCell` and `GruCell` for what is looked for. The walk takes
whatever order the file gives factors, terms and gates in; canonical orders are made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from engine.backends.integer_graph import Dense, GruCell, LstmCell, Point
from engine.backends.lowering import Lowering, Real
from engine.backends.lowering_products import Term, bounded, read_terms, sum_terms
from engine.backends.qdq_graph import Node
from engine.manifest import StateTensor


def match_cells(graph: Lowering) -> dict[tuple[str, ...], Callable[[], None]]:
    """What emits each cell, by its last node's outputs; all its other nodes are taken."""
    cells: dict[tuple[str, ...], Callable[[], None]] = {}
    for tensor in graph.state:
        users = graph.users.get(tensor.input, [])
        if tensor.dtype == "uint8" and any(node.op == "DequantizeLinear" for node in users):
            last, emit = _lstm(graph, tensor)
        elif tensor.dtype == "float32" and any(node.op == "QuantizeLinear" for node in users):
            last, emit = _gru(graph, tensor)
        else:
            continue
        cells[last.outputs] = emit
    return cells


def _maker(graph: Lowering, name: str) -> Node:
    node = graph.makers.get(name)
    if node is None:
        graph.refuse_tensor(name, "a cell that is not known", "a node that makes it")
    return node


def _gate_first(graph: Lowering, sides: Sequence[Real], by: Node) -> tuple[Real, Real]:
    """The factor that is a part of a Split, then the other."""
    for one, other in (sides, sides[::-1]):
        if _maker(graph, one.codes).op == "Split":
            return one, other
    by.refuse("a cell that is not known", expected="a gate, split off its table")


def _products(graph: Lowering, total: Node, past: str) -> tuple[Node, str, Node]:
    """Of both products of a sum: the one with the past in it, what that is a factor of; the other.

    Those of a node that has the past in both, or twice in one, are not told apart.
    """
    factors = [graph.made(side, "Mul", total) for side in total.inputs]
    kept, added = sorted(factors, key=lambda node: past not in node.inputs)
    if kept.inputs.count(past) != 1 or past in added.inputs:
        kept.refuse("a cell that is not known", expected=f"{past} in one of its products")
    return kept, next(side for side in kept.inputs if side != past), added


def _check_units(graph: Lowering, tensors: Sequence[str], units: int) -> None:
    """Whether each of these is one row of ``units``: nothing broadcasts, nothing has two rows."""
    for name in tensors:
        if graph.shapes[name] != (1, units):
            graph.refuse_tensor(name, "a part of a cell of another shape", f"(1, {units})")


def _check_state(graph: Lowering, state: StateTensor, low: int, high: int, unit: int) -> None:
    """Whether a state in whole numbers is one: its first value, and what it is rounded from."""
    if not float(state.initial).is_integer() or not low <= state.initial <= high:
        expected = f"a whole number from {low} to {high}"
        graph.refuse_tensor(state.output, f"a state that begins with {state.initial}", expected)
    if unit > 0:
        graph.refuse_tensor(state.output, "a state coarser than its unit", "steps of 1 or finer")


def _either(graph: Lowering, node: Node, op: str) -> tuple[str, str]:
    """The two inputs of a node: the one that ``op`` makes, then the other."""
    first, second = node.inputs
    for one, other in ((first, second), (second, first)):
        maker = graph.makers.get(one)
        if maker is not None and maker.op == op:
            return one, other
    node.refuse("a cell that is not known", expected=f"{op} before it")


def _part(graph: Lowering, real: Real, by: Node) -> tuple[Node, int]:
    """The Split that codes are a part of, and which."""
    split = graph.made(real.codes, "Split", by)
    return split, split.outputs.index(real.codes)


def _own(graph: Lowering, point: Point) -> Point:
    """A point inside a cell, under a name that no value has."""
    return replace(point, name=graph.unique(point.name))


def _reorder(graph: Lowering, split: Node, order: Sequence[int], units: int) -> np.ndarray:
    """Outputs of a product so that its gates stand in this order."""
    if sorted(order) != list(range(len(split.outputs))):
        split.refuse("a cell that is not known", expected="each gate once")
    _check_units(graph, split.outputs, units)
    _check_units(graph, split.inputs[:1], units * len(order))
    return np.concatenate([np.arange(units) + at * units for at in order])


def _wide_sum(graph: Lowering, clip: Node) -> tuple[Node, int, int]:
    """The Add behind Clip and Round, and the limits."""
    if len(clip.inputs) != 3:
        clip.refuse("a state without limits", expected="a Clip between two constants")
    low, high = (graph.whole_number(name, clip) for name in clip.inputs[1:])
    rounded = graph.made(clip.inputs[0], "Round", clip)
    return graph.made(rounded.inputs[0], "Add", rounded), low, high


def _same_zero(node: Node, reals: Sequence[Real]) -> int:
    zeros = {real.zero for real in reals}
    if len(zeros) != 1:
        node.refuse("gates with different zero points", expected="one", found=sorted(zeros))
    return zeros.pop()


def _aligned(a: int, b: int) -> tuple[int, int, int]:
    """How far two numbers are shifted to the left to the finer of their units, and that unit."""
    unit = min(a, b)
    return a - unit, b - unit, unit


def _shift(exponent: int) -> int:
    return int(bounded(np.array([exponent]))[0])


def _stacked(first: Sequence[Term], second: Sequence[Term], by: Node) -> list[Term]:
    """Outputs of ``second`` behind those of ``first``, product by product."""
    others = {term.codes: term for term in second}
    if len(others) != len(second) or {term.codes for term in first} != others.keys():
        by.refuse("gates that do not all see the same values", expected="products of [x, h]")
    stacked = []
    for term in first:
        other = others[term.codes]
        stacked.append(
            Term(
                term.codes,
                np.concatenate([term.weight, other.weight]),
                np.concatenate([term.bias, other.bias]),
                np.concatenate([term.exponent, other.exponent]),
            )
        )
    return stacked


def _input_first(terms: Sequence[Term], hidden: str, by: Node) -> list[Term]:
    """[x, h], whatever the order in the file."""
    if len(terms) != 2 or sum(term.codes == hidden for term in terms) != 1:
        by.refuse("a cell that is not known", expected=f"products of its input and of {hidden}")
    return sorted(terms, key=lambda term: term.codes == hidden)


def _lstm(graph: Lowering, hidden: StateTensor) -> tuple[Node, Callable[[], None]]:
    quantise = _maker(graph, hidden.output)
    if quantise.op != "QuantizeLinear":
        quantise.refuse("a hidden state that is not quantised", expected="QuantizeLinear")
    name = hidden.output.removesuffix(".next").removesuffix(".h")
    out = graph.point(quantise)
    product = graph.made(quantise.inputs[0], "Mul", quantise)
    sides = [graph.real(side, product) for side in product.inputs]
    gate_o, shown = _gate_first(graph, sides, product)
    split, at_o = _part(graph, gate_o, product)
    cell_tanh, cell_codes = graph.look_up(shown.codes, product)
    cell_quantise = graph.made(cell_codes, "QuantizeLinear", product)
    shown_in = graph.point(cell_quantise)
    clip = graph.made(cell_quantise.inputs[0], "Clip", cell_quantise)
    cell = next((tensor for tensor in graph.state if tensor.output == clip.outputs[0]), None)
    if cell is None:
        clip.refuse("a cell that is not known", expected="its state behind this node")
    total, low, high = _wide_sum(graph, clip)
    kept, factor, added = _products(graph, total, cell.input)
    gate_f = graph.real(factor, kept)
    sides = [graph.real(side, added) for side in added.inputs]
    gate_i, new = _gate_first(graph, sides, added)
    positions = [_part(graph, gate, kept) for gate in (gate_i, gate_f)]
    if any(node is not split for node, _ in positions):
        split.refuse("gates that do not come from one table", expected="one Split")
    sigmoid, gate_codes = graph.look_up(split.inputs[0], split)
    tanh, new_codes = graph.look_up(new.codes, added)
    gate_quantise = graph.made(gate_codes, "QuantizeLinear", split)
    new_quantise = graph.made(new_codes, "QuantizeLinear", added)
    gates_in, candidate_in = graph.point(gate_quantise), graph.point(new_quantise)
    units = hidden.shape[-1]
    order = _reorder(graph, split, [positions[0][1], positions[1][1], at_o], units)
    _check_units(graph, (hidden.input, cell.input, new.codes, shown.codes), units)
    terms = read_terms(graph, gate_quantise.inputs[0], gate_quantise)
    gates = [term.outputs(order) for term in terms]
    fresh = read_terms(graph, new_quantise.inputs[0], new_quantise)
    terms = _input_first(_stacked(gates, fresh, split), hidden.input, split)
    up_kept, up_added, unit = _aligned(gate_f.exponent, gate_i.exponent + new.exponent)
    _check_state(graph, cell, low, high, unit)
    points = [gates_in] * 3 + [candidate_in]
    scales = np.repeat([point.exponent for point in points], units)

    def emit() -> None:
        graph.name_value(hidden.input, hidden.input, units)
        sums = sum_terms(graph, f"{name}.sums", 1, terms, None)
        graph.forget_value(hidden.input)
        shift = bounded(scales - sums.exponent)
        layer = LstmCell(
            name=name,
            sums=Dense(sums.name, 1, sums.products, sums.exponent, None, shift),
            hidden=hidden,
            cell=cell,
            gates_in=_own(graph, gates_in),
            candidate_in=_own(graph, candidate_in),
            shown_in=_own(graph, shown_in),
            out=out,
            sigmoid=sigmoid,
            tanh=tanh,
            cell_tanh=cell_tanh,
            gates_zero=_same_zero(split, (gate_i, gate_f, gate_o)),
            candidate_zero=new.zero,
            shown_zero=shown.zero,
            up_kept=up_kept,
            up_added=up_added,
            cell_shift=_shift(-unit),
            shown_shift=_shift(shown_in.exponent),
            out_shift=_shift(out.exponent - gate_o.exponent - shown.exponent),
            low=low,
            high=high,
        )
        graph.emit(layer, hidden.output)

    return quantise, emit


def _gru(graph: Lowering, hidden: StateTensor) -> tuple[Node, Callable[[], None]]:
    past = next(n for n in graph.users[hidden.input] if n.op == "QuantizeLinear")
    codes, before = past.outputs[0], graph.quantisation(past)
    clip = _maker(graph, hidden.output)
    after = [n for n in graph.users.get(hidden.output, []) if n.op == "QuantizeLinear"]
    if clip.op != "Clip" or len(after) != 1:
        clip.refuse("a cell that is not known", expected="a Clip, and one QuantizeLinear behind it")
    quantise = after[0]
    out = graph.point(quantise, quantise.name.partition(".quantise")[0])
    if before != (out.exponent, out.zero_point):
        past.refuse("a state that is quantised in two ways", expected=f"as in {quantise.name!r}")
    name = out.name.removesuffix(".out")
    graph.take(clip)
    total, low, high = _wide_sum(graph, clip)
    kept, factor, added = _products(graph, total, hidden.input)
    gate_z = graph.real(factor, kept)
    opened, fresh = _either(graph, added, "Sub")
    rest = graph.made(opened, "Sub", added)
    gate_again = graph.real(rest.inputs[1], rest)
    one = graph.number(rest.inputs[0], rest)
    new = graph.real(fresh, added)
    tanh, new_codes = graph.look_up(new.codes, added)
    new_quantise = graph.made(new_codes, "QuantizeLinear", added)
    candidate_in = graph.point(new_quantise)
    inner = graph.made(new_quantise.inputs[0], "Add", new_quantise)
    reset_name, given_name = _either(graph, inner, "Mul")
    reset = graph.made(reset_name, "Mul", inner)
    given = graph.real(given_name, inner)
    sides = [graph.real(side, reset) for side in reset.inputs]
    gate_r, own = _gate_first(graph, sides, reset)
    (split, at_r), (again, at_z) = (_part(graph, gate, kept) for gate in (gate_r, gate_z))
    if again is not split or gate_again.codes != gate_z.codes:
        split.refuse("gates that do not come from one table", expected="one Split")
    sigmoid, gate_codes = graph.look_up(split.inputs[0], split)
    gate_quantise = graph.made(gate_codes, "QuantizeLinear", split)
    x_quantise = graph.made(given.codes, "QuantizeLinear", inner)
    h_quantise = graph.made(own.codes, "QuantizeLinear", reset)
    gates_in, x_in, h_in = (graph.point(n) for n in (gate_quantise, x_quantise, h_quantise))
    units = hidden.shape[-1]
    order = _reorder(graph, split, [at_r, at_z], units)
    _check_units(graph, (hidden.input, own.codes, given.codes, new.codes), units)
    terms = read_terms(graph, gate_quantise.inputs[0], gate_quantise)
    gates = _input_first([term.outputs(order) for term in terms], codes, split)
    new_x = read_terms(graph, x_quantise.inputs[0], x_quantise)
    new_h = read_terms(graph, h_quantise.inputs[0], h_quantise)
    sources = [[term.codes for term in terms] for terms in (new_x, new_h)]
    if sources != [[term.codes] for term in gates]:
        h_quantise.refuse(
            "gates that do not all see the same values", expected="products of [x, h]"
        )
    one_in_gates = np.ldexp(float(one.m.flat[0]), int(one.e.flat[0]) - gate_again.exponent)
    if not one_in_gates.is_integer() or abs(one_in_gates) > 1 << 20:
        rest.refuse("a 1 that is no whole number of the gates' steps", found=one_in_gates)
    up_given, up_reset, inner_unit = _aligned(given.exponent, gate_r.exponent + own.exponent)
    up_added, up_kept, unit = _aligned(gate_again.exponent + new.exponent, gate_z.exponent)
    _check_state(graph, hidden, low, high, unit)

    def dense(part: str, terms: list[Term], point: Point) -> Dense:
        return sum_terms(graph, f"{name}.{part}", 1, terms, _own(graph, point))

    def emit() -> None:
        graph.name_value(codes, hidden.input, units)
        products = [
            dense("gates", gates, gates_in),
            dense("new_x", new_x, x_in),
            dense("new_h", new_h, h_in),
        ]
        graph.forget_value(codes)
        layer = GruCell(
            name=name,
            gates=products[0],
            new_x=products[1],
            new_h=products[2],
            hidden=hidden,
            candidate_in=_own(graph, candidate_in),
            out=out,
            sigmoid=sigmoid,
            tanh=tanh,
            gates_zero=_same_zero(split, (gate_r, gate_z, gate_again)),
            candidate_zero=new.zero,
            one=int(one_in_gates),
            up_given=up_given,
            up_reset=up_reset,
            candidate_shift=_shift(candidate_in.exponent - inner_unit),
            up_added=up_added,
            up_kept=up_kept,
            state_shift=_shift(-unit),
            out_shift=_shift(out.exponent),
            low=low,
            high=high,
        )
        graph.emit(layer, quantise.outputs[0])

    return quantise, emit
