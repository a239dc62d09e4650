"""The lanes of a MAC engine: weight ROM, multipliers and adder trees, as SystemVerilog."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from engine.backends.fpga.rtl_dense import (
    OPERAND_AT,
    OPERAND_BITS,
    PRODUCT_AT,
    WEIGHT_BITS,
    tree_counts,
)
from engine.backends.fpga.rtl_engine import Engine
from engine.backends.fpga.rtl_text import (
    constant,
    module,
    packed_bytes,
    selection,
    unsigned_bits,
    vector,
    wide_constant,
)

ROM_LANES: Final = 16  # that share one step counter: a wire to more of them is slow


def lanes_and_tree(engine: Engine) -> Iterator[str]:
    """Multipliers, and the adder tree of each output: ``output_lane[o].level<n>[0].sum``."""
    plan, lanes = engine.plan, engine.plan.lanes
    width = lanes.count * WEIGHT_BITS
    counts, bits = tree_counts(lanes.inputs), engine.tree_bits()
    yield f"  wire {vector(width)} weights;"
    yield f"  {engine.name}_weights #(.HOLD(HOLD)) rom ("
    yield "    .clk(clk), .rst(rst), .issue(issue), .fetched(stage[1]), .weights(weights)"
    yield "  );"
    yield ""
    yield f"  wire lane_en = !HOLD || stage[{OPERAND_AT}] || stage[{OPERAND_AT + 1}];"
    yield f"  for (genvar o = 0; o < {lanes.outputs}; o = o + 1) begin : output_lane"
    yield f"    for (genvar i = 0; i < {lanes.inputs}; i = i + 1) begin : level0"
    yield f"      localparam int LANE = o * {lanes.inputs} + i;"
    yield f"      localparam bit BLOCK = LANE < {lanes.dsp};"
    yield f"      wire signed {vector(OPERAND_BITS + WEIGHT_BITS)} product;"
    widths = f".A_BITS({OPERAND_BITS}), .B_BITS({WEIGHT_BITS})"
    yield f"      mult_lane #({widths}, .USE_DSP(BLOCK)) lane ("
    yield "        .clk(clk), .en(lane_en), .a({1'b0, codes[8*i +: 8]}),"
    yield "        .b(weights[8*LANE +: 8]), .p(product)"
    yield "      );"
    low = f"product[{bits[0] - 1}:0]"
    if plan.tree_at > PRODUCT_AT:
        yield f"      logic signed {vector(bits[0])} sum;"
        yield f"      always_ff @(posedge clk) if (!HOLD || stage[{PRODUCT_AT}]) sum <= {low};"
    else:
        yield f"      wire signed {vector(bits[0])} sum = {low};"
    yield "    end"
    for level in range(1, plan.levels + 1):
        before, here = counts[level - 1], counts[level]
        grown = bits[level]
        pair = f"{grown}'(level{level - 1}[2*i].sum) + {grown}'(level{level - 1}[2*i+1].sum)"
        clock = f"always_ff @(posedge clk) if (!HOLD || stage[{plan.tree_at - 1 + level}])"
        yield f"    for (genvar i = 0; i < {here}; i = i + 1) begin : level{level}"
        yield f"      logic signed {vector(bits[level])} sum;"
        if before % 2 == 0:
            yield f"      {clock} sum <= {pair};"
        else:
            rest = f"{bits[level]}'(level{level - 1}[2*i].sum)"
            if plan.biased == level - 1:
                rest += " + output_bias[o].bias"
            yield f"      if (i < {here - 1}) begin : pair"
            yield f"        {clock} sum <= {pair};"
            yield "      end else begin : rest"
            yield f"        {clock} sum <= {rest};"
            yield "      end"
        yield "    end"
    yield "  end"
    yield ""


def weights_module(engine: Engine, name: str) -> str:
    """The weight ROM: chunks of `ROM_LANES` lanes, each with a step counter of its own."""
    plan, count = engine.plan, engine.plan.lanes.count
    steps = engine.weight_steps().reshape(plan.steps, count)
    ports = [
        "input  logic clk",
        "input  logic rst",
        "input  logic issue",
        "input  logic fetched",
        f"output logic {vector(count * WEIGHT_BITS)} weights",
    ]
    body: list[str] = []
    for at, low in enumerate(range(0, count, ROM_LANES)):
        high = min(low + ROM_LANES, count)
        body += _rom(at, low, steps[:, low:high])
    said = [
        f"Weights of {engine.name}: two cycles after its issue, those of a step.",
        f"int8, lane by lane from the low end; {ROM_LANES} lanes share a counter.",
    ]
    return module(name, said, ports, body)


def _rom(at: int, low: int, steps: np.ndarray) -> Iterator[str]:
    lanes = steps.shape[1]
    bits = lanes * WEIGHT_BITS
    words = [packed_bytes(row) for row in steps]
    out = f"weights[{low * WEIGHT_BITS + bits - 1}:{low * WEIGHT_BITS}]"
    if len(set(words)) == 1:
        yield f"  assign {out} = {wide_constant(bits, words[0], '    ')};"
        return
    index = unsigned_bits(len(words) - 1)
    yield f"  (* keep *) logic {vector(index)} step_{at};"
    yield f"  logic {vector(bits)} rom_{at}, weights_{at};"
    yield "  always_ff @(posedge clk) begin"
    yield f"    if (rst) step_{at} <= '0;"
    top = constant(index, len(words) - 1)
    yield f"    else if (issue) step_{at} <= step_{at} == {top} ? '0 : step_{at} + 1'b1;"
    yield "    if (!HOLD || issue)"
    yield from selection(f"step_{at}", index, f"rom_{at}", bits, words, "      ")
    yield f"    if (!HOLD || fetched) weights_{at} <= rom_{at};"
    yield "  end"
    yield f"  assign {out} = weights_{at};"
