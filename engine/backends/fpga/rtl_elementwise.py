"""Modules that do no products: a delay's ring buffer, the sum of two values, a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from engine.backends.fpga.rtl_library import (
    CODE_BITS,
    LOOKAHEAD,
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
    wide_constant,
)
from engine.backends.fpga.rtl_value import Value
from engine.backends.integer_graph import CODE_MAX, Add, Delay

START_AT: Final = 1  # cycle, from the input's handshake, in which `start` is high
ADD_CYCLES: Final = 1 + REQUANTISE_CYCLES
TABLE_CYCLES: Final = 1


def past_lags(layer: Delay) -> list[tuple[int, int]]:
    """Lags that come from the ring buffer and their places among all, the oldest first."""
    found = [(lag, place) for place, lag in enumerate(layer.lags) if lag > 0]
    return sorted(found, reverse=True)


def past_value(layer: Delay, signal: str, size: int) -> Value:
    """What a delay remembers, its lags side by side in the order of `past_lags`."""
    lags = len(past_lags(layer))
    there = START_AT + lags + 1
    return Value(layer.name, signal, size * lags, CODE_BITS, size * lags, there - LOOKAHEAD)


def delay_settled(layer: Delay, source: Value) -> int:
    """Cycle from which a delay's state is that of the next inference."""
    return max(START_AT + len(past_lags(layer)), source.ahead + LOOKAHEAD) + 1


def delay_module(layer: Delay, name: str, source: Value) -> str:
    """A ring buffer: reads its lags when an inference starts, and keeps the value that comes."""
    lags, width = [lag for lag, _ in past_lags(layer)], source.width
    at, fill = unsigned_bits(max(layer.steps - 1, 1)), unsigned_bits(layer.steps)
    index, last = unsigned_bits(len(lags) - 1), len(lags) - 1
    initial = packed(CODE_BITS, [int(layer.state.initial)] * source.size)
    ports = [
        "input  logic clk",
        "input  logic rst",
        "input  logic start",
        "input  logic fresh",
        f"input  logic {source.signal}_ahead",
        f"input  logic {vector(width)} {source.signal}",
        f"output logic {name}_ahead",
        f"output logic {vector(width * len(lags))} {name}",
    ]
    chosen = []
    for n, lag in enumerate(lags):
        key = f"{index}'d{n}" if n < last else "default"
        entry, held = constant(at, lag % (1 << at)), constant(fill, lag)
        chosen.append(f"      {key}: begin back = {entry}; held = filled >= {held}; end")
    older = f"{{read, {name}[{width * len(lags) - 1}:{width}]}}" if last else "read"
    body = [
        "  // ---- one lag a cycle, the oldest first; a stream that is shorter has INITIAL there",
        f"  logic {vector(width)} ring [0:{(1 << at) - 1}];",
        f"  logic {vector(at)} next, back;",
        f"  logic {vector(fill)} filled;",
        f"  logic {vector(index)} lag;",
        "  logic running, held, remembered, took;",
        f"  logic {vector(width)} entry;",
        "  wire reading = start || running;",
        f"  localparam logic {vector(width)} INITIAL =",
        f"      {wide_constant(width, initial, '      ')};",
        f"  wire {vector(width)} read = remembered ? entry : INITIAL;",
        "  always_comb begin",
        "    case (lag)",
        *chosen,
        "    endcase",
        "  end",
        "  always_ff @(posedge clk) begin",
        f"    running <= !rst && reading && lag != {constant(index, last)};",
        f"    lag <= rst || !reading || lag == {constant(index, last)} ? '0 : lag + 1'b1;",
        "    took <= reading;",
        "    if (reading) begin",
        "      entry <= ring[next - back];",
        "      remembered <= held && !fresh;",
        "    end",
        f"    if (took) {name} <= {older};",
        "  end",
        f"  assign {name}_ahead = reading && lag == {constant(index, last)};",
        "",
        "  // ---- the newest value, once all lags are read",
        "  logic comes, waiting;",
        "  wire keep = waiting && !reading;",
        "  always_ff @(posedge clk) begin",
        f"    comes <= !rst && {source.signal}_ahead;",
        "    waiting <= !rst && (comes || (waiting && !keep));",
        f"    if (keep) ring[next] <= {source.signal};",
        "    if (rst) next <= '0;",
        "    else if (keep) next <= next + 1'b1;",
        "    if (rst) filled <= '0;",
        f"    else if (keep && fresh) filled <= {constant(fill, 1)};",
        f"    else if (keep && filled != {constant(fill, layer.steps)}) filled <= filled + 1'b1;",
        "  end",
    ]
    wanted = ", ".join(map(str, lags))
    said = [f"The last {layer.steps} values of {layer.source}: those {wanted} steps ago."]
    return module(name, said, ports, body)


def add_module(layer: Add, name: str, size: int) -> str:
    """The sum of two values, requantised; both stay while it is computed."""
    reach = [
        max(abs(zero), abs(CODE_MAX - zero)) << up
        for zero, up in ((layer.zero_a, layer.up_a), (layer.zero_b, layer.up_b))
    ]
    bits = signed_bits(-sum(reach), sum(reach))
    wide = requantise_bits(bits, layer.shift, layer.shift, layer.point.zero_point)
    at = LOOKAHEAD + 1
    ports = [
        "input  logic clk",
        "input  logic rst",
        "input  logic ahead",
        f"input  logic {vector(size * CODE_BITS)} a",
        f"input  logic {vector(size * CODE_BITS)} b",
        f"output logic {name}_ahead",
        f"output logic {vector(size * CODE_BITS)} {name}",
    ]
    terms = [
        f"(({bits}'({value}[8*i +: 8]) - {constant(bits, zero)}) <<< {up})"
        for value, zero, up in (("a", layer.zero_a, layer.up_a), ("b", layer.zero_b, layer.up_b))
    ]
    body = [
        f"  logic [{at + 1}:1] stage;",
        f"  always_ff @(posedge clk) stage <= rst ? '0 : {{stage[{at}:1], ahead}};",
        f"  wire round_en = !HOLD || stage[{at}] || stage[{at + 1}];",
        f"  for (genvar i = 0; i < {size}; i = i + 1) begin : element",
        f"    logic signed {vector(bits)} sum;",
        f"    always_ff @(posedge clk) if (!HOLD || stage[{LOOKAHEAD}])",
        f"      sum <= {terms[0]} + {terms[1]};",
        "    requantise #(",
        f"      .IN_BITS({bits}), .SHIFT({layer.shift}), .ZERO({layer.point.zero_point}), "
        f".WIDE_BITS({wide})",
        "    ) codes (",
        "      .clk(clk), .en(round_en), .acc(sum), .above(1'b0),",
        f"      .code({name}[8*i +: 8])",
        "    );",
        "  end",
        f"  assign {name}_ahead = stage[{at}];",
    ]
    return module(name, [f"{layer.a} + {layer.b}."], ports, body)


def look_up_module(name: str, entries: Sequence[int], bits: int, said: str) -> str:
    """A table of 256 entries, registered."""
    ports = [
        "input  logic clk",
        "input  logic en",
        "input  logic [7:0] code",
        f"output logic {vector(bits)} value",
    ]
    lines = []
    for code, entry in enumerate(entries):
        key = f"8'd{code}" if code < CODE_MAX else "default"
        lines.append(f"      {key}: entry = {constant(bits, int(entry))};")
    body = [
        f"  logic {vector(bits)} entry;",
        "  always_comb begin",
        "    case (code)",
        *lines,
        "    endcase",
        "  end",
        "  always_ff @(posedge clk) if (!HOLD || en) value <= entry;",
    ]
    return module(name, [said], ports, body)


def table_files(name: str, entries: np.ndarray, source: Value) -> dict[str, str]:
    """Each code looked up, beat by beat as they come."""
    look_up = f"{name}_entries"
    ports = [
        "input  logic clk",
        "input  logic rst",
        f"input  logic {source.signal}_ahead",
        f"input  logic {vector(source.width)} {source.signal}",
        f"output logic {name}_ahead",
        f"output logic {vector(source.width)} {name}",
    ]
    body = [
        f"  logic [{LOOKAHEAD}:1] stage;",
        "  always_ff @(posedge clk)",
        f"    stage <= rst ? '0 : {{stage[{LOOKAHEAD - 1}:1], {source.signal}_ahead}};",
        f"  for (genvar i = 0; i < {source.beat}; i = i + 1) begin : element",
        f"    {look_up} #(.HOLD(HOLD)) look_up (",
        f"      .clk(clk), .en(stage[{LOOKAHEAD}]), .code({source.signal}[8*i +: 8]),",
        f"      .value({name}[8*i +: 8])",
        "    );",
        "  end",
        f"  assign {name}_ahead = stage[{TABLE_CYCLES}];",
    ]
    said = f"Table of {name}."
    return {
        f"{name}.sv": module(name, [f"Each code of {source.name} looked up."], ports, body),
        f"{look_up}.sv": look_up_module(look_up, entries.tolist(), CODE_BITS, said),
    }
