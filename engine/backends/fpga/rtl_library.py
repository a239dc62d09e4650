"""The modules that every generated design is made of, in plain SystemVerilog.

How values move
    Every value has a signal ``<name>_ahead``: its codes stand on ``<name>`` `LOOKAHEAD` cycles
    after it was high, so that whoever takes them can fetch weights meanwhile. A value that comes
    in several beats brings them in order; one that comes whole stays until the next inference.

``HOLD``
    With 1, registers keep what they have while nothing passes through them: less power, and a
    simulation that has nothing to evaluate there. With 0 they load in every cycle, which spares
    the wiring of the enables: for speed. The answers are the same.

Rounding is `engine.backends.integer_graph.round_shift`.
"""

from __future__ import annotations

from typing import Final

from engine.backends.fpga.rtl_text import signed_bits
from engine.backends.integer_graph import CODE_MAX, PRE_CLIP

CODE_BITS: Final = 8
LOOKAHEAD: Final = 2
MULT_CYCLES: Final = 2
REQUANTISE_CYCLES: Final = 2
COLLECT_CYCLES: Final = 1
SERIALISE_CYCLES: Final = 1
COUNT_RADIX: Final = 4

MULT_LANE: Final = """\
// One multiplier: operands registered, then the product. Where a device has multipliers of its own,
// this file is replaced by one that instantiates them; USE_DSP tells which lanes are to have one.
module mult_lane #(
  parameter int A_BITS = 9,
  parameter int B_BITS = 9,
  parameter bit USE_DSP = 1
) (
  input  logic clk,
  input  logic en,
  input  logic signed [A_BITS-1:0] a,
  input  logic signed [B_BITS-1:0] b,
  output logic signed [A_BITS+B_BITS-1:0] p
);
  if (USE_DSP) begin : block
    logic signed [A_BITS-1:0] a_1;
    logic signed [B_BITS-1:0] b_1;
    (* use_dsp = "yes" *) logic signed [A_BITS+B_BITS-1:0] product;
    always_ff @(posedge clk) if (en) begin
      a_1 <= a;
      b_1 <= b;
      product <= a_1 * b_1;
    end
    assign p = product;
  end else begin : fabric
    logic signed [A_BITS-1:0] a_1;
    logic signed [B_BITS-1:0] b_1;
    (* use_dsp = "no" *) logic signed [A_BITS+B_BITS-1:0] product;
    always_ff @(posedge clk) if (en) begin
      a_1 <= a;
      b_1 <= b;
      product <= a_1 * b_1;
    end
    assign p = product;
  end
endmodule
"""

ROUND_SHIFT: Final = f"""\
// acc / 2**(SHIFT + above), half to even, plus ZERO; one cycle. `above` is at most SPAN.
// (acc + 2**(s-1) - 1 + acc[s]) >>> s, and ZERO << s added by the same adder.
module round_shift #(
  parameter int IN_BITS = 24,
  parameter int SHIFT = 8,
  parameter int SPAN = 0,
  parameter int ABOVE_BITS = 1,
  parameter int ZERO = 0,
  parameter int OUT_BITS = 26
) (
  input  logic clk,
  input  logic en,
  input  logic signed [IN_BITS-1:0] acc,
  input  logic [ABOVE_BITS-1:0] above,
  output logic signed [OUT_BITS-1:0] value
);
  localparam logic signed [OUT_BITS-1:0] ONE = 1;
  localparam logic signed [OUT_BITS-1:0] OFFSET = OUT_BITS'(ZERO);
  wire signed [OUT_BITS-1:0] wide = OUT_BITS'(acc);
  logic signed [OUT_BITS-1:0] rounded;
  if (SPAN == 0 && SHIFT > 0) begin : always_right
    localparam logic signed [OUT_BITS-1:0] ADDED =
        (OFFSET <<< SHIFT) + (ONE <<< (SHIFT - 1)) - ONE;
    // One carry chain for both: the bit acc[SHIFT] is its carry in.
    wire [OUT_BITS:0] sum = {{wide, 1'b1}} + {{ADDED, wide[SHIFT]}};
    always_ff @(posedge clk) if (en) rounded <= sum[OUT_BITS:1];
    assign value = rounded >>> SHIFT;
  end else if (SHIFT > 0) begin : chosen_right
    logic [ABOVE_BITS-1:0] above_1;
    // One of SPAN + 1 constants, not a sum of its own in front of the adder.
    logic signed [OUT_BITS-1:0] added;
    logic odd;
    always_comb begin
      added = '0;
      odd = 1'b0;
      for (int v = 0; v <= SPAN; v = v + 1)
        if (above == ABOVE_BITS'(v)) begin
          added = (OFFSET <<< (SHIFT + v)) + (ONE <<< (SHIFT - 1 + v)) - ONE;
          odd = wide[SHIFT + v];
        end
    end
    wire [OUT_BITS:0] sum = {{wide, 1'b1}} + {{added, odd}};
    always_ff @(posedge clk) if (en) begin
      rounded <= sum[OUT_BITS:1];
      above_1 <= above;
    end
    assign value = rounded >>> SHIFT >>> above_1;
  end else begin : either_way
    // A shift of 0 rounds nothing; one to the left takes what is within +-{PRE_CLIP}: beyond it,
    // codes saturate.
    localparam logic signed [OUT_BITS-1:0] REACH = {PRE_CLIP};
    logic signed [7:0] by;
    wire signed [7:0] shift = 8'(SHIFT) + 8'(above);
    wire signed [OUT_BITS-1:0] kept = wide >>> shift;
    wire signed [OUT_BITS-1:0] odd = {{{{(OUT_BITS-1){{1'b0}}}}, kept[0]}};
    always_ff @(posedge clk) if (en) begin
      by <= shift;
      if (shift > 0) rounded <= wide + (ONE <<< (shift - 1)) - ONE + odd;
      else if (shift == 0) rounded <= wide;
      else rounded <= wide > REACH ? REACH : wide < -REACH ? -REACH : wide;
    end
    assign value = (by > 0 ? rounded >>> by : rounded <<< -by) + OFFSET;
  end
endmodule
"""

REQUANTISE: Final = f"""\
// Codes of accumulators: rounded, shifted, held within 0..{CODE_MAX}; {REQUANTISE_CYCLES} cycles.
module requantise #(
  parameter int IN_BITS = 24,
  parameter int SHIFT = 8,
  parameter int SPAN = 0,
  parameter int ABOVE_BITS = 1,
  parameter int ZERO = 0,
  parameter int WIDE_BITS = 26
) (
  input  logic clk,
  input  logic en,
  input  logic signed [IN_BITS-1:0] acc,
  input  logic [ABOVE_BITS-1:0] above,
  output logic [7:0] code
);
  logic signed [WIDE_BITS-1:0] value;
  round_shift #(
    .IN_BITS(IN_BITS), .SHIFT(SHIFT), .SPAN(SPAN), .ABOVE_BITS(ABOVE_BITS), .ZERO(ZERO),
    .OUT_BITS(WIDE_BITS)
  ) round (.clk(clk), .en(en), .acc(acc), .above(above), .value(value));
  always_ff @(posedge clk) if (en) begin
    if (value[WIDE_BITS-1]) code <= 8'd0;
    else if (|value[WIDE_BITS-2:8]) code <= 8'd{CODE_MAX};
    else code <= value[7:0];
  end
endmodule
"""

CLIP_ROUND: Final = f"""\
// A cell's state in whole numbers: rounded, shifted, held within LOW..HIGH;
// {REQUANTISE_CYCLES} cycles.
module clip_round #(
  parameter int IN_BITS = 24,
  parameter int OUT_BITS = 16,
  parameter int SHIFT = 8,
  parameter int WIDE_BITS = 26,
  parameter int LOW = -32767,
  parameter int HIGH = 32767
) (
  input  logic clk,
  input  logic en,
  input  logic signed [IN_BITS-1:0] acc,
  output logic signed [OUT_BITS-1:0] value
);
  logic signed [WIDE_BITS-1:0] rounded;
  round_shift #(
    .IN_BITS(IN_BITS), .SHIFT(SHIFT), .OUT_BITS(WIDE_BITS)
  ) round (.clk(clk), .en(en), .acc(acc), .above(1'b0), .value(rounded));
  always_ff @(posedge clk) if (en) begin
    if (rounded < WIDE_BITS'(LOW)) value <= OUT_BITS'(LOW);
    else if (rounded > WIDE_BITS'(HIGH)) value <= OUT_BITS'(HIGH);
    else value <= OUT_BITS'(rounded);
  end
endmodule
"""

COLLECT: Final = f"""\
// The beats of a value, together: there {COLLECT_CYCLES} cycle after the last one, and they stay.
module collect #(
  parameter int BEATS = 2,
  parameter int BEAT_BITS = 8,
  parameter int BITS = 16,
  parameter int COUNT_BITS = 1
) (
  input  logic clk,
  input  logic rst,
  input  logic beat_ahead,
  input  logic [BEAT_BITS-1:0] beat,
  output logic whole_ahead,
  output logic [BITS-1:0] whole
);
  localparam logic [COUNT_BITS-1:0] LAST = COUNT_BITS'(BEATS - 1);
  logic [COUNT_BITS-1:0] count;
  logic [{LOOKAHEAD - 1}:0] due;
  logic [BEATS*BEAT_BITS-1:0] beats;
  always_ff @(posedge clk) begin
    due <= rst ? '0 : {{due[{LOOKAHEAD - 2}:0], beat_ahead}};
    if (rst) count <= '0;
    else if (beat_ahead) count <= count == LAST ? '0 : count + 1'b1;
    whole_ahead <= !rst && beat_ahead && count == LAST;
  end
  if (BEATS == 1) begin : single
    always_ff @(posedge clk) if (due[{LOOKAHEAD - 1}]) beats <= beat;
  end else begin : several
    always_ff @(posedge clk)
      if (due[{LOOKAHEAD - 1}]) beats <= {{beat, beats[BEATS*BEAT_BITS-1:BEAT_BITS]}};
  end
  assign whole = beats[BITS-1:0];
endmodule
"""

SERIALISE: Final = f"""\
// A whole value beat by beat, one a cycle, from {SERIALISE_CYCLES} cycle after it is there.
module serialise #(
  parameter int BEATS = 2,
  parameter int BEAT_BITS = 8,
  parameter int COUNT_BITS = 1
) (
  input  logic clk,
  input  logic rst,
  input  logic whole_ahead,
  input  logic [BEATS*BEAT_BITS-1:0] whole,
  output logic beat_ahead,
  output logic [BEAT_BITS-1:0] beat
);
  localparam logic [COUNT_BITS-1:0] LAST = COUNT_BITS'(BEATS - 1);
  logic [COUNT_BITS-1:0] count;
  logic [{LOOKAHEAD - 1}:0] due;
  logic [BEATS*BEAT_BITS-1:0] beats;
  always_ff @(posedge clk) begin
    due <= rst ? '0 : {{due[{LOOKAHEAD - 2}:0], whole_ahead}};
    beat_ahead <= !rst && (whole_ahead || (beat_ahead && count != LAST));
    count <= rst || !beat_ahead || count == LAST ? '0 : count + 1'b1;
    beats <= due[{LOOKAHEAD - 1}] ? whole : beats >> BEAT_BITS;
  end
  assign beat = beats[BEAT_BITS-1:0];
endmodule
"""

STATE_REGISTER: Final = """\
// What the last inference left, or what a fresh stream begins with, while one is under way.
module state_register #(
  parameter int BITS = 8,
  parameter logic [BITS-1:0] INITIAL = '0
) (
  input  logic clk,
  input  logic start,
  input  logic fresh,
  input  logic [BITS-1:0] next,
  output logic [BITS-1:0] now
);
  always_ff @(posedge clk) if (start) now <= fresh ? INITIAL : next;
endmodule
"""


LIBRARY: Final = {
    "mult_lane": MULT_LANE,
    "round_shift": ROUND_SHIFT,
    "requantise": REQUANTISE,
    "clip_round": CLIP_ROUND,
    "collect": COLLECT,
    "serialise": SERIALISE,
    "state_register": STATE_REGISTER,
}


def requantise_bits(in_bits: int, least: int, greatest: int, zero: int) -> int:
    """Bits that `round_shift` computes in, for shifts from ``least`` to ``greatest``."""
    top = max(greatest, 1)
    if least > 0:
        return max(in_bits, top + (CODE_BITS + 1 if zero else 0), CODE_BITS + 1) + 1
    left = signed_bits(-PRE_CLIP, PRE_CLIP) - least
    return max(in_bits, top, left, CODE_BITS + 1) + 2
