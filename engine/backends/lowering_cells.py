"""LSTM and GRU cells of a QDQ graph, found by walking back from the state that they leave.

See `engine.backends.integer_graph.LstmCell` and `GruCell` for what is looked for. The walk takes
whatever order the file gives factors, terms and gates in; canonical orders are made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.backends.integer_graph import Dense, GruCell, LstmCell, Point
from engine.backends.lowering import Lowering, Real, Term, bounded
from engine.backends.qdq_graph import Node
from engine.manifest import StateTensor


def match_cells(graph: Lowering) -> dict[str, Callable[[], None]]:
    """What emits each cell, by its last node's name; all its other nodes are taken."""
    cells: dict[str, Callable[[], None]] = {}
    for tensor in graph.state:
        users = graph.users.get(tensor.input, [])
        if tensor.dtype == "uint8" and any(node.op == "DequantizeLinear" for node in users):
            last, emit = _lstm(graph, tensor)
        elif tensor.dtype == "float32" and any(node.op == "QuantizeLinear" for node in users):
            last, emit = _gru(graph, tensor)
        else:
            continue
        cells[last.name] = emit
    return cells


def _maker(graph: Lowering, name: str) -> Node:
    node = graph.makers.get(name)
    assert node is not None, f"no node makes {name}"
    return node


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


def _reorder(graph: Lowering, split: Node, order: Sequence[int], units: int) -> np.ndarray:
    """Outputs of a product so that its gates stand in this order."""
    if sorted(order) != list(range(len(split.outputs))):
        split.refuse("a cell that is not known", expected="each gate once")
    return np.concatenate([np.arange(units) + at * units for at in order])


def _wide_sum(graph: Lowering, clip: Node) -> tuple[Node, int, int]:
    """The Add behind Clip and Round, and the limits."""
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
    gate_o, shown = sorted(sides, key=lambda side: _maker(graph, side.codes).op != "Split")
    split, at_o = _part(graph, gate_o, product)
    cell_tanh, cell_codes = graph.look_up(shown.codes, product)
    cell_quantise = graph.made(cell_codes, "QuantizeLinear", product)
    shown_in = graph.point(cell_quantise)
    clip = graph.made(cell_quantise.inputs[0], "Clip", cell_quantise)
    cell = next((tensor for tensor in graph.state if tensor.output == clip.outputs[0]), None)
    if cell is None:
        clip.refuse("a cell that is not known", expected="its state behind this node")
    total, low, high = _wide_sum(graph, clip)
    factors = [graph.made(side, "Mul", total) for side in total.inputs]
    kept, added = sorted(factors, key=lambda node: cell.input not in node.inputs)
    gate_f = graph.real(next(side for side in kept.inputs if side != cell.input), kept)
    sides = [graph.real(side, added) for side in added.inputs]
    gate_i, new = sorted(sides, key=lambda side: _maker(graph, side.codes).op != "Split")
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
    gates = [term.outputs(order) for term in graph.terms(gate_quantise.inputs[0], gate_quantise)]
    fresh = graph.terms(new_quantise.inputs[0], new_quantise)
    terms = _input_first(_stacked(gates, fresh, split), hidden.input, split)
    up_kept, up_added, unit = _aligned(gate_f.exponent, gate_i.exponent + new.exponent)
    points = [gates_in] * 3 + [candidate_in]
    scales = np.repeat([point.exponent for point in points], units)

    def emit() -> None:
        graph.name_value(hidden.input, hidden.input, units)
        sums = graph.dense(f"{name}.sums", 1, terms, None)
        shift = bounded(scales - sums.exponent)
        layer = LstmCell(
            name=name,
            sums=Dense(sums.name, 1, sums.products, sums.exponent, None, shift),
            hidden=hidden,
            cell=cell,
            gates_in=gates_in,
            candidate_in=candidate_in,
            shown_in=shown_in,
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
        graph.emit(layer, hidden.output, out)

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
    graph.done.add(clip.name)
    total, low, high = _wide_sum(graph, clip)
    factors = [graph.made(side, "Mul", total) for side in total.inputs]
    kept, added = sorted(factors, key=lambda node: hidden.input not in node.inputs)
    gate_z = graph.real(next(side for side in kept.inputs if side != hidden.input), kept)
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
    gate_r, own = sorted(sides, key=lambda side: _maker(graph, side.codes).op != "Split")
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
    gates = [term.outputs(order) for term in graph.terms(gate_quantise.inputs[0], gate_quantise)]
    gates = _input_first(gates, codes, split)
    new_x = graph.terms(x_quantise.inputs[0], x_quantise)
    new_h = graph.terms(h_quantise.inputs[0], h_quantise)
    if [term.codes for term in new_h] != [codes] or len(new_x) != 1:
        h_quantise.refuse("a cell that is not known", expected="one product of its state")
    one_in_gates = np.ldexp(float(one.m.flat[0]), int(one.e.flat[0]) - gate_again.exponent)
    if not one_in_gates.is_integer() or abs(one_in_gates) > 1 << 20:
        rest.refuse("a 1 that is no whole number of the gates' steps", found=one_in_gates)
    up_given, up_reset, inner_unit = _aligned(given.exponent, gate_r.exponent + own.exponent)
    up_added, up_kept, unit = _aligned(gate_again.exponent + new.exponent, gate_z.exponent)

    def dense(name: str, terms: list[Term], point: Point) -> Dense:
        return graph.dense(name, 1, terms, point)

    def emit() -> None:
        graph.name_value(codes, hidden.input, units)
        layer = GruCell(
            name=name,
            gates=dense(f"{name}.gates", gates, gates_in),
            new_x=dense(f"{name}.new_x", new_x, x_in),
            new_h=dense(f"{name}.new_h", new_h, h_in),
            hidden=hidden,
            candidate_in=candidate_in,
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
        graph.emit(layer, quantise.outputs[0], out)

    return quantise, emit
