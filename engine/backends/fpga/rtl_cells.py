"""LSTM and GRU cells: the rows of their MAC engine, and what happens to its codes, unit by unit.

The engine brings the sums of one or more units a beat, side by side, as codes; behind it each unit
passes one pipeline of tables and products. The cell in whole numbers is kept in a memory of one
entry a beat; the hidden state in codes is a register that changes between inferences.
"""

from __future__ import annotations

import numpy as np

from engine.backends.fpga.rtl_dense import Rows, rows_of
from engine.backends.fpga.rtl_library import MULT_CYCLES, REQUANTISE_CYCLES
from engine.backends.fpga.rtl_pipeline import SUMS, Cell, CellPipeline
from engine.backends.fpga.rtl_value import Lanes, Value
from engine.backends.integer_graph import Dense, GruCell, LstmCell, denses


def cell_lanes(lanes: Lanes, units: int) -> Lanes:
    """Lanes that bring the sums of whole units, and of a whole number of beats."""
    at_once = max(
        n for n in range(1, units + 1) if units % n == 0 and SUMS * n <= max(lanes.outputs, SUMS)
    )
    return Lanes(lanes.inputs, SUMS * at_once, lanes.dsp)


def lstm_rows(cell: LstmCell) -> Rows:
    """Gates i, f, o and the candidate of each unit, side by side."""
    zero = np.repeat(
        [cell.gates_in.zero_point, cell.candidate_in.zero_point], [3 * cell.units, cell.units]
    )
    order = np.arange(SUMS * cell.units).reshape(SUMS, cell.units).T.reshape(-1)
    return rows_of(cell.sums, zero).chosen(order)


def _gru_sizes(cell: GruCell) -> dict[tuple[str, int], int]:
    """Inputs of each source, in the order of the engine's."""
    return {
        key: product.weight.shape[1]
        for dense in denses(cell)
        for key, product in zip(_keys(dense), dense.products, strict=True)
    }


def gru_sources(cell: GruCell) -> tuple[str, ...]:
    """Sources of a GRU's engine; the same one twice where a layer takes it twice."""
    return tuple(name for name, _ in _gru_sizes(cell))


def gru_rows(cell: GruCell) -> Rows:
    """Gates r, z and the candidate's two sums of each unit, side by side."""
    sizes = _gru_sizes(cell)
    parts = [_spread(dense, sizes) for dense in denses(cell)]
    whole = Rows(
        tuple(np.concatenate([part.weights[s] for part in parts]) for s in range(len(sizes))),
        tuple(np.concatenate([part.ups[s] for part in parts]) for s in range(len(sizes))),
        np.concatenate([part.bias for part in parts]),
        np.concatenate([part.shift for part in parts]),
        np.concatenate([part.zero for part in parts]),
    )
    order = np.arange(SUMS * cell.units).reshape(SUMS, cell.units).T.reshape(-1)
    return whole.chosen(order)


def _keys(dense: Dense) -> list[tuple[str, int]]:
    """A layer's sources, numbered where it takes one twice."""
    names = [product.source for product in dense.products]
    return [(name, names[:at].count(name)) for at, name in enumerate(names)]


def _spread(dense: Dense, sizes: dict[tuple[str, int], int]) -> Rows:
    """A layer's rows over more sources than its own: those weigh nothing."""
    own, keys = rows_of(dense), _keys(dense)
    weights, ups = [], []
    for key, size in sizes.items():
        if key in keys:
            weights.append(own.weights[keys.index(key)])
            ups.append(own.ups[keys.index(key)])
        else:
            weights.append(np.zeros((own.size, size), dtype=np.int8))
            ups.append(np.zeros(own.size, dtype=np.int64))
    return Rows(tuple(weights), tuple(ups), own.bias, own.shift, own.zero)


def lstm_cell(cell: LstmCell, name: str, inner: str, sums: Value, *, draft: bool) -> Cell:
    """The module behind an LSTM's sums; ``inner`` names the codes of the cell that is shown."""
    ends = (cell.low, cell.high, int(cell.cell.initial))
    p = CellPipeline(name, sums, ends, draft=draft)
    code = {gate: f"{sums.signal}[{8 * SUMS}*u + {8 * at} +: 8]" for at, gate in enumerate("ifog")}
    gates = {"i": code["i"], "f": code["f"], "o": code["o"]}
    i, f, o = p.look_up("sigmoid", cell.sigmoid, cell.gates_zero, gates, 0)
    (g,) = p.look_up("tanh", cell.tanh, cell.candidate_zero, {"g": code["g"]}, 0)
    products = 1
    kept = p.product("f_c", p.kept(), f, products)
    added = p.product("i_g", i, g, products)
    sum_at = products + MULT_CYCLES
    total = p.sum("total", [(kept, cell.up_kept), (added, cell.up_added)], sum_at)
    clip_at = sum_at + 1
    state = p.clipped(total, cell.cell_shift, cell.low, cell.high, clip_at)
    state_at = clip_at + REQUANTISE_CYCLES
    shown_code = p.codes(inner, state, cell.shown_shift, cell.shown_in, state_at)
    shown_at = state_at + REQUANTISE_CYCLES
    (s,) = p.look_up("cell_tanh", cell.cell_tanh, cell.shown_zero, {"s": shown_code}, shown_at)
    last = p.product("o_s", p.later(o, shown_at), s, shown_at + 1)
    out_at = shown_at + 1 + MULT_CYCLES
    p.codes(name, last, cell.out_shift, cell.out, out_at)
    memory = list(p.memory(0, state_at))
    said = f"LSTM cell {cell.name}: {cell.units} units, {p.units} a beat."
    out = p.finish(said, inner, shown_at, out_at + REQUANTISE_CYCLES, memory)
    return p.made(out, inner, cell.shown_in, shown_at, state_at)


def gru_cell(cell: GruCell, name: str, inner: str, sums: Value, *, draft: bool) -> Cell:
    """The module behind a GRU's sums; ``inner`` names the codes of the candidate's sum."""
    assert cell.new_x.point is not None
    assert cell.new_h.point is not None
    ends = (cell.low, cell.high, int(cell.hidden.initial))
    p = CellPipeline(name, sums, ends, draft=draft)
    code = [f"{sums.signal}[{8 * SUMS}*u + {8 * at} +: 8]" for at in range(SUMS)]
    r, z = p.look_up("sigmoid", cell.sigmoid, cell.gates_zero, {"r": code[0], "z": code[1]}, 0)
    given = p.offset("given", code[2], cell.new_x.point.zero_point, 0)
    own = p.offset("own", code[3], cell.new_h.point.zero_point, 0)
    reset = p.product("r_own", r, own, 1)
    inner_at = 1 + MULT_CYCLES
    given = p.later(given, MULT_CYCLES)
    total = p.sum("candidate", [(given, cell.up_given), (reset, cell.up_reset)], inner_at)
    new_code = p.codes(inner, total, cell.candidate_shift, cell.candidate_in, inner_at + 1)
    new_at = inner_at + 1 + REQUANTISE_CYCLES
    (n,) = p.look_up("tanh", cell.tanh, cell.candidate_zero, {"n": new_code}, new_at)
    z = p.later(z, new_at - 1)
    rest = p.rest("rest", cell.one, z, new_at)
    z = p.later(z, 1)
    products = new_at + 1
    added = p.product("rest_n", rest, n, products)
    kept = p.product("z_h", p.kept(), z, products)
    sum_at = products + MULT_CYCLES
    total = p.sum("total", [(added, cell.up_added), (kept, cell.up_kept)], sum_at)
    state = p.clipped(total, cell.state_shift, cell.low, cell.high, sum_at + 1)
    state_at = sum_at + 1 + REQUANTISE_CYCLES
    p.codes(name, state, cell.out_shift, cell.out, state_at)
    memory = list(p.memory(new_at, state_at))
    said = f"GRU cell {cell.name}: {cell.units} units, {p.units} a beat."
    out = p.finish(said, inner, new_at, state_at + REQUANTISE_CYCLES, memory)
    return p.made(out, inner, cell.candidate_in, new_at, state_at)
