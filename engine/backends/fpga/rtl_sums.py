"""Behind the adder trees of a MAC engine: biases, accumulators, requantisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from engine.backends.fpga.rtl_engine import Engine
from engine.backends.fpga.rtl_library import CODE_BITS, LOOKAHEAD, requantise_bits
from engine.backends.fpga.rtl_text import (
    constant,
    packed,
    selection,
    unsigned_bits,
    vector,
    wide_constant,
)
from engine.backends.integer_graph import MIN_SHIFT

PARAMETER_BITS: Final = 10
COPY_OUTPUTS: Final = 4  # accumulators that share the wires that steer them


def biases(engine: Engine) -> Iterator[str]:
    """The bias of each output lane's row, there when it is added."""
    plan, outputs, bits = engine.plan, engine.plan.lanes.outputs, engine.acc_bits
    used_at = plan.total_at - 1 if plan.biased < 0 else plan.tree_at + plan.biased
    yield "  // ---- biases"
    words = [packed(bits, row) for row in engine.rows.bias.reshape(plan.groups, outputs)]
    begin = f"stage[{used_at - 1}]" if plan.group_steps == 1 else f"first[{used_at - 1}]"
    yield from _by_group("biases", bits * outputs, words, begin)
    yield f"  for (genvar o = 0; o < {outputs}; o = o + 1) begin : output_bias"
    yield f"    wire signed {vector(bits)} bias = biases[{bits}*o +: {bits}];"
    yield "  end"
    yield ""


def accumulators(engine: Engine) -> Iterator[str]:
    """The sums of a group: ``output_sum[o].total``, there at `Sums.total_at`."""
    plan, outputs, bits = engine.plan, engine.plan.lanes.outputs, engine.acc_bits
    root = f"output_lane[o].level{plan.levels}[0].sum"
    yield "  // ---- accumulators, which begin with the bias"
    if plan.align:
        yield from _shift_left(engine)
    if plan.biased < 0:
        yield from _turns(engine)
    yield f"  for (genvar o = 0; o < {outputs}; o = o + 1) begin : output_sum"
    if plan.biased >= 0:
        yield f"    wire signed {vector(bits)} total = {root};"
    else:
        added = "output_aligned[o].sum" if plan.align else f"{bits}'({root})"
        turn, begin = f"turn[o / {COPY_OUTPUTS}]", "output_bias[o].bias"
        if plan.group_steps > 1:
            begin = f"{turn}.begins ? {begin} : total"
        yield f"    logic signed {vector(bits)} total;"
        yield f"    wire signed {vector(bits)} begun = {begin};"
        yield f"    always_ff @(posedge clk) if ({turn}.adds)"
        yield f"      total <= begun + {added};"
    yield "  end"
    yield ""


def _turns(engine: Engine) -> Iterator[str]:
    """Whether accumulators add, and begin anew: a copy for every few, on a wire of its own."""
    plan = engine.plan
    at, copies = plan.total_at - 2, -(-plan.lanes.outputs // COPY_OUTPUTS)
    begins = plan.group_steps > 1
    yield f"  for (genvar c = 0; c < {copies}; c = c + 1) begin : turn"
    yield f"    (* keep *) logic adds{', begins' if begins else ''};"
    yield f"    always_ff @(posedge clk) adds <= !rst && stage[{at}];"
    if begins:
        yield f"    always_ff @(posedge clk) begins <= first[{at}];"
    yield "  end"


def _shift_left(engine: Engine) -> Iterator[str]:
    """A step's sums in the finest unit of all sources: ``output_aligned[o].sum``."""
    plan, outputs, bits = engine.plan, engine.plan.lanes.outputs, engine.acc_bits
    ups = np.stack([up.reshape(plan.groups, outputs) for up in engine.rows.ups])
    least, span = int(ups.min()), int(ups.max() - ups.min())
    index = unsigned_bits(span)
    of_source = np.repeat(np.arange(len(plan.slices)), plan.slices)
    words = [packed(index, ups[s, g] - least) for g in range(plan.groups) for s in of_source]
    yield "  // sources have units of their own"
    yield from _by_group("ups", index * outputs, words, f"stage[{plan.root_at - 1}]")
    yield f"  for (genvar o = 0; o < {outputs}; o = o + 1) begin : output_aligned"
    root = f"output_lane[o].level{plan.levels}[0].sum"
    yield f"    logic signed {vector(bits)} sum;"
    yield f"    wire signed {vector(bits)} wide = {bits}'({root});"
    up = f"ups[{index}*o +: {index}]" if span else "0"
    low = f" <<< {least}" if least else ""
    yield f"    always_ff @(posedge clk) if (!HOLD || stage[{plan.root_at}])"
    yield f"      sum <= wide{low} <<< {up};"
    yield "  end"


def requantisers(engine: Engine) -> Iterator[str]:
    """The codes of a group, which leave the module."""
    plan, outputs = engine.plan, engine.plan.lanes.outputs
    in_bits = engine.acc_bits
    at, pulse = plan.total_at, "last" if plan.group_steps > 1 else "stage"
    shift = engine.rows.shift.reshape(plan.groups, outputs)
    zero = engine.rows.zero.reshape(plan.groups, outputs)
    assert (zero == zero[0]).all(), "a lane's rows have one zero point"
    least, span = shift.min(axis=0), shift.max(axis=0) - shift.min(axis=0)
    index = unsigned_bits(int(span.max()))
    yield "  // ---- codes"
    yield f"  wire round_en = !HOLD || {pulse}[{at}] || {pulse}[{at + 1}];"
    if span.any():
        words = [packed(index, row - least) for row in shift]
        yield from _by_group("shifts", index * outputs, words, f"{pulse}[{at - 1}]")
    else:
        yield f"  wire {vector(index * outputs)} shifts = '0;"
    wide = [
        requantise_bits(in_bits, int(low), int(low + more), int(offset))
        for low, more, offset in zip(least, span, zero[0], strict=True)
    ]
    parameters = {"SHIFT": least, "SPAN": span, "ZERO": zero[0], "WIDE_BITS": np.array(wide)}
    shown = []
    for parameter, values in parameters.items():
        if (values == values[0]).all():
            shown.append(f".{parameter}({values[0]})")
        else:
            bits = PARAMETER_BITS * outputs
            entries = constant(bits, packed(PARAMETER_BITS, values - MIN_SHIFT))
            yield f"  localparam logic {vector(bits)} {parameter}_OF = {entries};"
            entry = f"{parameter}_OF[{PARAMETER_BITS}*o +: {PARAMETER_BITS}]"
            shown.append(f".{parameter}({entry} - {-MIN_SHIFT})")
    yield f"  for (genvar o = 0; o < {outputs}; o = o + 1) begin : output_code"
    yield "    requantise #("
    yield f"      .IN_BITS({in_bits}), .ABOVE_BITS({index}), {', '.join(shown)}"
    yield "    ) codes ("
    yield "      .clk(clk), .en(round_en), .acc(output_sum[o].total),"
    yield f"      .above(shifts[{index}*o +: {index}]),"
    yield f"      .code({engine.name}[{CODE_BITS}*o +: {CODE_BITS}])"
    yield "    );"
    yield "  end"
    yield f"  assign {engine.name}_ahead = {pulse}[{at}];"


def sums_out(engine: Engine) -> Iterator[str]:
    """The sums of a group, which leave the module."""
    plan, bits = engine.plan, engine.acc_bits
    pulse = "last" if plan.group_steps > 1 else "stage"
    yield f"  for (genvar o = 0; o < {plan.lanes.outputs}; o = o + 1) begin : output_out"
    yield f"    assign {engine.name}[{bits}*o +: {bits}] = output_sum[o].total;"
    yield "  end"
    yield f"  assign {engine.name}_ahead = {pulse}[{plan.total_at - LOOKAHEAD}];"


def _by_group(name: str, bits: int, words: Sequence[int], begin: str) -> Iterator[str]:
    """A constant of each group, registered when ``begin``."""
    if len(set(words)) == 1:
        yield f"  wire {vector(bits)} {name} = {wide_constant(bits, words[0], '    ')};"
        return
    index = unsigned_bits(len(words) - 1)
    yield f"  logic {vector(index)} {name}_group;"
    yield f"  logic {vector(bits)} {name};"
    yield "  always_ff @(posedge clk) begin"
    yield f"    if (rst) {name}_group <= '0;"
    top = constant(index, len(words) - 1)
    yield f"    else if ({begin}) {name}_group <= {name}_group == {top} ? '0 : {name}_group + 1'b1;"
    yield f"    if ({begin})"
    yield from selection(f"{name}_group", index, name, bits, words, "      ")
    yield "  end"
