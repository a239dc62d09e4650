"""LSTM and GRU cells as operations of a block of threads, in CUDA C.

A cell's state is two copies in global memory: a step reads the one and writes the other, by the
parity of its position, so that a step that failed may be done again.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.backends.cuda.layers import Memory, Tally, dense_codes, integer_type, joined
from engine.backends.cuda.schedule import Operation, Read
from engine.backends.integer_graph import CODE_MAX, Dense, GruCell, LstmCell, Point


@dataclass(frozen=True)
class _TwoCopies:
    """Expressions of one unit's state: as the last step left it, and where this one puts it."""

    before: str
    after: str


def _two_copies(memory: Memory, name: str, units: int, kind: str, initial: int) -> _TwoCopies:
    width = 1 if kind == "u8" else 4
    copies = f"(({kind}*)(state + {memory.state.add(name, 2 * units * width)}))"
    return _TwoCopies(
        f"(position ? {copies}[(position & 1) * {units} + i] : ({kind}){initial})",
        f"{copies}[((position & 1) ^ 1) * {units} + i]",
    )


def _magnitude(entries_zero: int) -> int:
    return max(CODE_MAX - entries_zero, abs(entries_zero))


def lstm(memory: Memory, cell: LstmCell) -> list[Operation]:
    """Gates and candidate as codes, then one thread a unit."""
    units, name, hidden = cell.units, cell.name, cell.hidden.input
    gates = f"{name}/gates"
    h = _two_copies(memory, hidden, units, "u8", int(cell.hidden.initial))
    c = _two_copies(memory, cell.cell.input, units, "int", int(cell.cell.initial))
    load = Operation(
        note=f"LSTM {name}: the hidden state",
        items=units,
        body=f"{memory.new(hidden, units)}[i] = {h.before};",
        reads=(),
        writes=(hidden,),
        own=True,
    )
    points = ((0, cell.gates_in), (3 * units, cell.candidate_in))
    products = dense_codes(memory, cell.sums, gates, points)

    gate, g = _magnitude(cell.gates_zero), _magnitude(cell.candidate_zero)
    reach = max(abs(cell.low), abs(cell.high), abs(int(cell.cell.initial)))
    total = (gate * reach << cell.up_kept) + (gate * g << cell.up_added)
    shifts = (cell.cell_shift, cell.shown_shift, cell.out_shift)
    kind = integer_type(
        total, gate * _magnitude(cell.shown_zero), *(1 << max(s, 0) for s in shifts)
    )
    shown, out = Tally(cell.shown_in, "saturated0"), Tally(cell.out, "saturated1")
    sigmoid, tanh, cell_tanh = (
        memory.weights(entries) for entries in (cell.sigmoid, cell.tanh, cell.cell_tanh)
    )
    code = memory.at(gates)
    unit = Operation(
        note=f"LSTM {name}: {units} units",
        items=units,
        body=joined(
            *(
                f"const {kind} {gate} ="
                f" look_up({sigmoid}, {code}[{n * units} + i]) - {cell.gates_zero};"
                for n, gate in enumerate(("in", "forget", "show"))
            ),
            f"const {kind} fresh ="
            f" look_up({tanh}, {code}[{3 * units} + i]) - {cell.candidate_zero};",
            f"const {kind} total = forget * {c.before} * (({kind})1 << {cell.up_kept})"
            f" + in * fresh * (({kind})1 << {cell.up_added});",
            f"const {kind} kept = clip<{kind}>("
            f"round_shift<{kind}>(total, {cell.cell_shift}), {cell.low}, {cell.high});",
            f"const int seen = to_code<{kind}>("
            f"kept, {cell.shown_shift}, {cell.shown_in.zero_point});",
            shown.count("seen"),
            f"const {kind} level = look_up({cell_tanh}, seen) - {cell.shown_zero};",
            f"const int code = to_code<{kind}>("
            f"show * level, {cell.out_shift}, {cell.out.zero_point});",
            out.count("code"),
            f"{memory.new(name, units)}[i] = (u8)code;",
            f"{h.after} = (u8)code;",
            f"{c.after} = (int)kept;",
        ),
        reads=(Read(gates),),
        writes=(name, *shown.writes, *out.writes),
        own=True,
        before=joined(shown.before, out.before),
        after=joined(shown.after, out.after),
    )
    return [load, products, unit]


def gru(memory: Memory, cell: GruCell) -> list[Operation]:
    """Gates and both parts of the candidate as codes, then one thread a unit."""
    units, name, hidden = cell.units, cell.name, cell.hidden.input
    h = _two_copies(memory, hidden, units, "int", int(cell.hidden.initial))
    reach = max(abs(cell.low), abs(cell.high), abs(int(cell.hidden.initial)))
    state_kind = integer_type(reach, 1 << max(cell.out_shift, 0))
    zero = cell.out.zero_point
    load = Operation(
        note=f"GRU {name}: codes of the hidden state",
        items=units,
        body=f"{memory.new(hidden, units)}[i] ="
        f" (u8)to_code<{state_kind}>({h.before}, {cell.out_shift}, {zero});",
        reads=(),
        writes=(hidden,),
        own=True,
    )
    parts = {"gates": cell.gates, "own": cell.new_h, "given": cell.new_x}
    values = {part: f"{name}/{part}" for part in parts}
    products = [
        dense_codes(memory, dense, values[part], ((0, _point(dense)),))
        for part, dense in parts.items()
    ]
    kind = _gru_type(cell, reach)
    fresh, out = Tally(cell.candidate_in, "saturated0"), Tally(cell.out, "saturated1")
    sigmoid, tanh = memory.weights(cell.sigmoid), memory.weights(cell.tanh)
    gates, own, given = (memory.at(values[part]) for part in parts)
    unit = Operation(
        note=f"GRU {name}: {units} units",
        items=units,
        body=joined(
            f"const {kind} reset = look_up({sigmoid}, {gates}[i]) - {cell.gates_zero};",
            f"const {kind} keep = look_up({sigmoid}, {gates}[{units} + i]) - {cell.gates_zero};",
            f"const {kind} own = {own}[i] - {_point(cell.new_h).zero_point};",
            f"const {kind} given = {given}[i] - {_point(cell.new_x).zero_point};",
            f"const {kind} inner = given * (({kind})1 << {cell.up_given})"
            f" + reset * own * (({kind})1 << {cell.up_reset});",
            f"const int seen = to_code<{kind}>("
            f"inner, {cell.candidate_shift}, {cell.candidate_in.zero_point});",
            fresh.count("seen"),
            f"const {kind} candidate = look_up({tanh}, seen) - {cell.candidate_zero};",
            f"const {kind} total = ({cell.one} - keep) * candidate * (({kind})1 << {cell.up_added})"
            f" + keep * {h.before} * (({kind})1 << {cell.up_kept});",
            f"const {kind} kept = clip<{kind}>("
            f"round_shift<{kind}>(total, {cell.state_shift}), {cell.low}, {cell.high});",
            f"const int code = to_code<{kind}>(kept, {cell.out_shift}, {zero});",
            out.count("code"),
            f"{memory.new(name, units)}[i] = (u8)code;",
            f"{h.after} = (int)kept;",
        ),
        reads=tuple(Read(values[part]) for part in parts),
        writes=(name, *fresh.writes, *out.writes),
        own=True,
        before=joined(fresh.before, out.before),
        after=joined(fresh.after, out.after),
    )
    return [load, *products, unit]


def _gru_type(cell: GruCell, reach: int) -> str:
    gate, candidate = _magnitude(cell.gates_zero), _magnitude(cell.candidate_zero)
    own, given = (_magnitude(_point(dense).zero_point) for dense in (cell.new_h, cell.new_x))
    inner = (given << cell.up_given) + (gate * own << cell.up_reset)
    total = (gate * reach << cell.up_kept) + ((gate + abs(cell.one)) * candidate << cell.up_added)
    shifts = (cell.candidate_shift, cell.state_shift, cell.out_shift)
    return integer_type(inner, total, *(1 << max(shift, 0) for shift in shifts))


def _point(layer: Dense) -> Point:
    assert layer.point is not None
    return layer.point
