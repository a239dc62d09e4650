"""The multiplier of a lane on an ECP5: a `MULT18X18D` with its own registers, or carry chains.

Synthesis alone does neither well: it leaves the registers of an inferred `MULT18X18D` unused, so
that a product and the way to it share one cycle, and it makes a 9x8 product in logic of some 240
LUTs where 86 do.

In logic, two bits of the narrower operand choose a row: nothing, the wider operand, twice or three
times it. A row is one carry chain, as the LUT4 before each carry computes
``(a and b0) xor (a/2 and b1)`` of four inputs, and is itself what must be carried where both are
set; the top row subtracts its second part, as a two's complement number's highest bit weighs
negative. The rows are registered, then added up, then registered: two cycles, as everywhere.

Sources: Lattice, *ECP5 and ECP5-5G sysDSP Usage Guide* FPGA-TN-02205 (MULT18X18D, its registers
and attributes); *ECP5 and ECP5-5G Family Data Sheet* FPGA-DS-02012, "Ripple mode" (CCU2C).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from feeds.errors import InputError

MULT_LANE: Final = "mult_lane"
MULTIPLIER_BITS: Final = 18
PRODUCT_BITS: Final = 2 * MULTIPLIER_BITS


def _block() -> str:
    """Ports of the primitive, which has one for each bit."""
    ports = [
        f".{port}{n}(wide_{port.lower()}[{n}])" for port in "AB" for n in range(MULTIPLIER_BITS)
    ]
    ports += [f".C{n}(1'b0)" for n in range(MULTIPLIER_BITS)]
    ports += [f".P{n}(wide_p[{n}])" for n in range(PRODUCT_BITS)]
    ports += [".SIGNEDA(1'b1)", ".SIGNEDB(1'b1)", ".SOURCEA(1'b0)", ".SOURCEB(1'b0)"]
    ports += [".CLK0(clk)", ".CE0(en)", ".RST0(1'b0)"]
    lines = [", ".join(ports[n : n + 6]) for n in range(0, len(ports), 6)]
    return ",\n      ".join(lines)


ECP5_MULT_LANE: Final = f"""\
// A lane's multiplier on an ECP5: operands registered, then the product.
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
  if (!USE_DSP) begin : fabric
    // The rows stand on the narrower operand: fewer of them.
    if (A_BITS < B_BITS) begin : swapped
      mult_rows #(.A_BITS(B_BITS), .B_BITS(A_BITS)) rows (.clk(clk), .en(en), .a(b), .b(a), .p(p));
    end else begin : straight
      mult_rows #(.A_BITS(A_BITS), .B_BITS(B_BITS)) rows (.clk(clk), .en(en), .a(a), .b(b), .p(p));
    end
  end else if (A_BITS > {MULTIPLIER_BITS} || B_BITS > {MULTIPLIER_BITS}) begin : refused
    operands_wider_than_a_multiplier_block refused ();
  end else begin : block
    wire signed [{MULTIPLIER_BITS - 1}:0] wide_a = a;
    wire signed [{MULTIPLIER_BITS - 1}:0] wide_b = b;
    wire [{PRODUCT_BITS - 1}:0] wide_p;
    MULT18X18D #(
      .REG_INPUTA_CLK("CLK0"), .REG_INPUTA_CE("CE0"), .REG_INPUTA_RST("RST0"),
      .REG_INPUTB_CLK("CLK0"), .REG_INPUTB_CE("CE0"), .REG_INPUTB_RST("RST0"),
      .REG_PIPELINE_CLK("NONE"),
      .REG_OUTPUT_CLK("CLK0"), .REG_OUTPUT_CE("CE0"), .REG_OUTPUT_RST("RST0"),
      .GSR("DISABLED"), .SOURCEB_MODE("B_SHIFT"), .RESETMODE("SYNC")
    ) multiplier (
      {_block()}
    );
    assign p = wide_p[A_BITS+B_BITS-1:0];
  end
endmodule

// A product in logic: rows registered, then their sum.
module mult_rows #(
  parameter int A_BITS = 9,
  parameter int B_BITS = 8
) (
  input  logic clk,
  input  logic en,
  input  logic signed [A_BITS-1:0] a,
  input  logic signed [B_BITS-1:0] b,
  output logic signed [A_BITS+B_BITS-1:0] p
);
  localparam int ROWS = (B_BITS + 1) / 2;
  localparam int ROW_BITS = A_BITS + 2;
  wire signed [2*ROWS-1:0] digits = b;
  wire [ROWS*ROW_BITS-1:0] row;
  logic [ROWS*ROW_BITS-1:0] kept;
  for (genvar r = 0; r < ROWS; r = r + 1) begin : each
    mult_row #(.A_BITS(A_BITS), .TOP(r == ROWS - 1)) one (
      .a(a), .b0(digits[2*r]), .b1(digits[2*r+1]), .row(row[ROW_BITS*r +: ROW_BITS])
    );
  end
  wire signed [A_BITS+2*ROWS-1:0] total;
  add_rows #(.ROWS(ROWS), .ROW_BITS(ROW_BITS)) sum (.rows(kept), .total(total));
  always_ff @(posedge clk) if (en) begin
    kept <= row;
    p <= total[A_BITS+B_BITS-1:0];
  end
endmodule

// Rows of growing weight, by halves: below the weight of the upper half nothing is added.
module add_rows #(
  parameter int ROWS = 4,
  parameter int ROW_BITS = 11
) (
  input  logic [ROWS*ROW_BITS-1:0] rows,
  output logic signed [ROW_BITS+2*ROWS-3:0] total
);
  if (ROWS == 1) begin : single
    assign total = rows;
  end else begin : halves
    localparam int LOW = (ROWS + 1) / 2;
    localparam int HIGH = ROWS - LOW;
    localparam int LOW_BITS = ROW_BITS + 2 * LOW - 2;
    localparam int HIGH_BITS = ROW_BITS + 2 * HIGH - 2;
    localparam int SUM_BITS = ROW_BITS + 2 * HIGH - 2;
    wire signed [LOW_BITS-1:0] low;
    wire signed [HIGH_BITS-1:0] high;
    add_rows #(.ROWS(LOW), .ROW_BITS(ROW_BITS)) first (.rows(rows[LOW*ROW_BITS-1:0]), .total(low));
    add_rows #(.ROWS(HIGH), .ROW_BITS(ROW_BITS)) second (
      .rows(rows[ROWS*ROW_BITS-1:LOW*ROW_BITS]), .total(high)
    );
    wire signed [ROW_BITS-3:0] above = low[LOW_BITS-1:2*LOW];
    wire signed [SUM_BITS-1:0] sum = high + above;
    assign total = {{sum, low[2*LOW-1:0]}};
  end
endmodule

// b0*a + 2*b1*a, or b0*a - 2*b1*a for the top row: one carry chain, two bits a CCU2C. The first
// position of a top row makes the carry that a subtraction begins with.
module mult_row #(
  parameter int A_BITS = 9,
  parameter bit TOP = 0
) (
  input  logic signed [A_BITS-1:0] a,
  input  logic b0,
  input  logic b1,
  output logic [A_BITS+1:0] row
);
  localparam int SKIP = TOP ? 1 : 0;
  localparam int CELLS = (A_BITS + 2 + SKIP + 1) / 2;
  wire [2*CELLS-1:0] one, two, sum;
  wire [CELLS:0] carry;
  assign carry[0] = 1'b0;
  for (genvar n = 0; n < 2*CELLS; n = n + 1) begin : bits
    if (n < SKIP) begin : begins
      assign one[n] = 1'b0;
      assign two[n] = 1'b0;
    end else begin : follows
      assign one[n] = n - SKIP < A_BITS ? a[n-SKIP] : a[A_BITS-1];
      if (n - SKIP == 0) begin : first
        assign two[n] = 1'b0;
      end else begin : doubled
        assign two[n] = n - SKIP - 1 < A_BITS ? a[n-SKIP-1] : a[A_BITS-1];
      end
    end
  end
  for (genvar c = 0; c < CELLS; c = c + 1) begin : chain
    if (TOP) begin : minus
      if (c == 0) begin : begins
        CCU2C #(.INIT0(16'h000F), .INIT1(16'h8777), .INJECT1_0("NO"), .INJECT1_1("NO")) cell_ (
          .A0(1'b1), .B0(1'b1), .C0(1'b1), .D0(1'b1),
          .A1(two[1]), .B1(b1), .C1(one[1]), .D1(b0),
          .CIN(carry[0]), .S0(sum[0]), .S1(sum[1]), .COUT(carry[1])
        );
      end else begin : follows
        CCU2C #(.INIT0(16'h8777), .INIT1(16'h8777), .INJECT1_0("NO"), .INJECT1_1("NO")) cell_ (
          .A0(two[2*c]), .B0(b1), .C0(one[2*c]), .D0(b0),
          .A1(two[2*c+1]), .B1(b1), .C1(one[2*c+1]), .D1(b0),
          .CIN(carry[c]), .S0(sum[2*c]), .S1(sum[2*c+1]), .COUT(carry[c+1])
        );
      end
    end else begin : plus
      CCU2C #(.INIT0(16'h7888), .INIT1(16'h7888), .INJECT1_0("NO"), .INJECT1_1("NO")) cell_ (
        .A0(one[2*c]), .B0(b0), .C0(two[2*c]), .D0(b1),
        .A1(one[2*c+1]), .B1(b0), .C1(two[2*c+1]), .D1(b1),
        .CIN(carry[c]), .S0(sum[2*c]), .S1(sum[2*c+1]), .COUT(carry[c+1])
      );
    end
  end
  assign row = sum[SKIP +: A_BITS + 2];
endmodule
"""

_MODULE: Final = re.compile(
    rf"^[ \t]*module\s+{MULT_LANE}\b.*?^[ \t]*endmodule[^\n]*\n", re.M | re.S
)


def with_ecp5_multiplier(files: Mapping[str, str]) -> dict[str, str]:
    """A design's files with the portable multiplier replaced by `ECP5_MULT_LANE`.

    Raises
    ------
    InputError
        If not exactly one file has the portable one.
    """
    found = [name for name, text in files.items() if _MODULE.search(text)]
    if len(found) != 1:
        raise InputError(
            "no multiplier that could be replaced by the device's",
            where="generated design",
            expected=f"module {MULT_LANE} in one file",
            found=f"it in {len(found)} files",
        )
    (name,) = found
    rest = _MODULE.sub("", files[name])
    replaced = dict(files)
    replaced[name] = ECP5_MULT_LANE if not re.search(r"\bmodule\b", rest) else ECP5_MULT_LANE + rest
    return replaced
