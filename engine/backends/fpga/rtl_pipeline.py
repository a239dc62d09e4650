"""The pipeline that a cell's units pass, stage by stage: tables, products, sums, rounding.

A unit's way is counted in cycles after its sums' codes are there: what is registered at the end of
cycle ``k`` is enabled by ``stage[k + LOOKAHEAD]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.backends.fpga.rtl_elementwise import look_up_module
from engine.backends.fpga.rtl_library import (
    CODE_BITS,
    LOOKAHEAD,
    MULT_CYCLES,
    REQUANTISE_CYCLES,
    requantise_bits,
)
from engine.backends.fpga.rtl_text import (
    constant,
    module,
    packed,
    signed_bits,
    unsigned_bits,
    vector,
)
from engine.backends.fpga.rtl_value import Value
from engine.backends.integer_graph import CODE_MAX, Point

SUMS: Final = 4  # of each unit


@dataclass(frozen=True)
class Number:
    """A signed signal with its range.

    Attributes
    ----------
    name : str
    low, high : int
    """

    name: str
    low: int
    high: int

    @property
    def bits(self) -> int:
        """Bits that hold it."""
        return signed_bits(self.low, self.high)

    def times(self, other: Number, name: str) -> Number:
        """The product's range."""
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Number(name, min(ends), max(ends))


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell's module.

    Attributes
    ----------
    files : dict of str to str
    out : Value
        Codes of the hidden state, beat by beat.
    inner : Value
        Codes inside the cell that the value check may count, at `inner_point`.
    inner_point : Point
    settled : int
        Cycle from which the cell is that of the next inference.
    """

    files: dict[str, str]
    out: Value
    inner: Value
    inner_point: Point
    settled: int


class CellPipeline:
    """The text of a cell's module, as it grows.

    Parameters
    ----------
    name : str
        Of the module.
    sums : Value
        Codes of its sums, those of each unit side by side.
    ends : (int, int, int)
        Least and greatest value of the state, and the one that a fresh stream begins with.
    draft : bool
        Whether only the cycles are asked for.
    """

    def __init__(
        self, name: str, sums: Value, ends: tuple[int, int, int], *, draft: bool = False
    ) -> None:
        low, high, initial = ends
        self.name, self.sums, self.draft = name, sums, draft
        self.units, self.beats = sums.beat // SUMS, sums.beats
        self.state = Number("state", min(low, initial), max(high, initial))
        self.initial = initial
        self.files: dict[str, str] = {}
        self.inside: list[str] = []  # of the loop over units
        self.depth = 0

    def at(self, cycle: int) -> str:
        """Whether a beat is at a cycle of its way."""
        self.depth = max(self.depth, cycle + LOOKAHEAD)
        return f"stage[{cycle + LOOKAHEAD}]"

    def enabled(self, cycle: int, cycles: int = 1) -> str:
        """The enable of what takes so many cycles from this one on."""
        return " || ".join(["!HOLD", *(self.at(cycle + n) for n in range(cycles))])

    def look_up(
        self, table: str, entries: np.ndarray, zero: int, users: dict[str, str], cycle: int
    ) -> list[Number]:
        """Numbers that a table has for codes: by name, the code's signal."""
        numbers = entries.astype(np.int64) - zero
        found = Number("", int(numbers.min()), int(numbers.max()))
        module_name = f"{self.name}_{table}"
        said = f"{table} of {self.name}, its zero point taken off."
        if not self.draft:
            self.files[f"{module_name}.sv"] = look_up_module(
                module_name, numbers.tolist(), found.bits, said
            )
        for name, code in users.items():
            self.inside += [
                f"    wire signed {vector(found.bits)} {name};",
                f"    {module_name} #(.HOLD(HOLD)) {name}_table (",
                f"      .clk(clk), .en({self.at(cycle)}), .code({code}), .value({name})",
                "    );",
            ]
        return [Number(name, found.low, found.high) for name in users]

    def product(self, name: str, a: Number, b: Number, cycle: int) -> Number:
        """A product of two signals at a cycle; there `MULT_CYCLES` later."""
        found = a.times(b, name)
        self.inside += [
            f"    wire signed {vector(a.bits + b.bits)} {name}_whole;",
            f"    wire signed {vector(found.bits)} {name} = {name}_whole[{found.bits - 1}:0];",
            f"    mult_lane #(.A_BITS({a.bits}), .B_BITS({b.bits}), .USE_DSP(1'b1)) {name}_lane (",
            f"      .clk(clk), .en({self.enabled(cycle, MULT_CYCLES)}),",
            f"      .a({a.name}), .b({b.name}), .p({name}_whole)",
            "    );",
        ]
        return found

    def sum(self, name: str, terms: Sequence[tuple[Number, int]], cycle: int) -> Number:
        """The sum of signals shifted to the left; there in the next cycle."""
        found = Number(
            name,
            sum(number.low << up for number, up in terms),
            sum(number.high << up for number, up in terms),
        )
        bits = found.bits
        added = " + ".join(f"({bits}'({number.name}) <<< {up})" for number, up in terms)
        self.inside += [
            f"    logic signed {vector(bits)} {name};",
            f"    always_ff @(posedge clk) if ({self.enabled(cycle)})",
            f"      {name} <= {added};",
        ]
        return found

    def offset(self, name: str, code: str, zero: int, cycle: int) -> Number:
        """A code less its zero point; there in the next cycle."""
        found = Number(name, -zero, CODE_MAX - zero)
        bits = max(found.bits, CODE_BITS + 1)
        self.inside += [
            f"    logic signed {vector(found.bits)} {name};",
            f"    always_ff @(posedge clk) if ({self.enabled(cycle)})",
            f"      {name} <= {found.bits}'({bits}'({code}) - {constant(bits, zero)});",
        ]
        return found

    def rest(self, name: str, one: int, number: Number, cycle: int) -> Number:
        """What is left of ``one``; there in the next cycle."""
        found = Number(name, one - number.high, one - number.low)
        bits = max(found.bits, signed_bits(min(one, 0), one), number.bits)
        self.inside += [
            f"    logic signed {vector(found.bits)} {name};",
            f"    always_ff @(posedge clk) if ({self.enabled(cycle)})",
            f"      {name} <= {found.bits}'({constant(bits, one)} - {bits}'({number.name}));",
        ]
        return found

    def later(self, number: Number, cycles: int) -> Number:
        """A signal as it was some cycles ago."""
        name, bits = f"{number.name}_later", number.bits
        whole = f"{number.name}_wait"
        shifted = number.name
        if cycles > 1:
            shifted = f"{{{whole}[{bits * (cycles - 1) - 1}:0], {number.name}}}"
        self.inside += [
            f"    logic {vector(bits * cycles)} {whole};",
            f"    always_ff @(posedge clk) {whole} <= {shifted};",
            f"    wire signed {vector(bits)} {name} ="
            f" {whole}[{bits * cycles - 1}:{bits * (cycles - 1)}];",
        ]
        return Number(name, number.low, number.high)

    def codes(self, name: str, number: Number, shift: int, point: Point, cycle: int) -> str:
        """Codes of a signal; there `REQUANTISE_CYCLES` later."""
        wide = requantise_bits(number.bits, shift, shift, point.zero_point)
        self.inside += [
            "    requantise #(",
            f"      .IN_BITS({number.bits}), .SHIFT({shift}), .ZERO({point.zero_point}),",
            f"      .WIDE_BITS({wide})",
            f"    ) {name}_codes (",
            f"      .clk(clk), .en({self.enabled(cycle, REQUANTISE_CYCLES)}), .acc({number.name}),",
            f"      .above(1'b0), .code({name}[8*u +: 8])",
            "    );",
        ]
        return f"{name}[8*u +: 8]"

    def clipped(self, number: Number, shift: int, low: int, high: int, cycle: int) -> Number:
        """The state's new value; there `REQUANTISE_CYCLES` later, and then written."""
        bits = self.state.bits
        wide = max(requantise_bits(number.bits, shift, shift, 0), bits + 1)
        self.inside += [
            f"    wire signed {vector(bits)} state = written[{bits}*u +: {bits}];",
            "    clip_round #(",
            f"      .IN_BITS({number.bits}), .OUT_BITS({bits}), .SHIFT({shift}),",
            f"      .WIDE_BITS({wide}), .LOW({low}), .HIGH({high})",
            "    ) clip (",
            f"      .clk(clk), .en({self.enabled(cycle, REQUANTISE_CYCLES)}), .acc({number.name}),",
            f"      .value(written[{bits}*u +: {bits}])",
            "    );",
        ]
        return Number("state", self.state.low, self.state.high)

    def kept(self) -> Number:
        """The state as the last inference left it."""
        bits = self.state.bits
        self.inside.append(f"    wire signed {vector(bits)} kept = read[{bits}*u +: {bits}];")
        return Number("kept", self.state.low, self.state.high)

    def memory(self, read_at: int, written_at: int) -> Iterator[str]:
        """The cell's memory, of one entry a beat."""
        width = self.units * self.state.bits
        index = unsigned_bits(self.beats - 1)
        top = constant(index, self.beats - 1)
        initial = constant(width, packed(self.state.bits, [self.initial] * self.units))
        yield f"  logic {vector(width)} memory [0:{(1 << index) - 1}];"
        yield f"  logic {vector(index)} read_beat, written_beat;"
        yield f"  logic {vector(width)} entry;"
        yield f"  wire {vector(width)} read = fresh ? {initial} : entry;"
        yield f"  wire {vector(width)} written;"
        yield "  always_ff @(posedge clk) begin"
        yield f"    if ({self.at(read_at)}) entry <= memory[read_beat];"
        yield f"    if ({self.at(written_at)}) memory[written_beat] <= written;"
        for counter, cycle in (("read_beat", read_at), ("written_beat", written_at)):
            yield f"    if (rst) {counter} <= '0;"
            yield f"    else if ({self.at(cycle)})"
            yield f"      {counter} <= {counter} == {top} ? '0 : {counter} + 1'b1;"
        yield "  end"

    def finish(self, said: str, inner: str, inner_at: int, out_at: int, memory: list[str]) -> Value:
        """Put the module together; ``inner`` are codes that leave it beside the output."""
        sums, name, width = self.sums, self.name, vector(self.units * CODE_BITS)
        ends = [
            f"  assign {inner}_ahead = {self.at(inner_at - LOOKAHEAD)};",
            f"  assign {name}_ahead = {self.at(out_at - LOOKAHEAD)};",
        ]
        ports = [
            "input  logic clk",
            "input  logic rst",
            "input  logic fresh",
            f"input  logic {sums.signal}_ahead",
            f"input  logic {vector(sums.width)} {sums.signal}",
            f"output logic {inner}_ahead",
            f"output logic {width} {inner}",
            f"output logic {name}_ahead",
            f"output logic {width} {name}",
        ]
        depth = self.depth
        body = [
            f"  logic [{depth}:1] stage;",
            "  always_ff @(posedge clk)",
            f"    stage <= rst ? '0 : {{stage[{depth - 1}:1], {sums.signal}_ahead}};",
            "",
            "  // ---- the cell as the last inference left it, and as this one does",
            *memory,
            "",
            f"  for (genvar u = 0; u < {self.units}; u = u + 1) begin : unit",
            *self.inside,
            "  end",
            *ends,
        ]
        self.files[f"{name}.sv"] = module(name, [said], ports, body)
        return self._value(name, out_at)

    def _value(self, signal: str, at: int) -> Value:
        size, ahead = self.units * self.beats, self.sums.ahead + at
        return Value(signal, signal, size, CODE_BITS, self.units, ahead, self.sums.interval)

    def made(self, out: Value, inner: str, point: Point, inner_at: int, state_at: int) -> Cell:
        """What was made."""
        settled = self.sums.last_ahead + LOOKAHEAD + state_at + 1
        return Cell(self.files, out, self._value(inner, inner_at), point, settled)
