"""Simulation models of what a synthesised ECP5 netlist is made of, for checking it against its RTL.

Yosys brings models of the LUTs, carries, registers and small RAMs (``cells_sim.v``), but none of
the multiplier and the block RAM: for it they are black boxes. Theirs stand here.

Sources: Lattice, *ECP5 and ECP5-5G sysDSP Usage Guide* FPGA-TN-02205 (MULT18X18D: registers,
clocks, clock enables, resets, sources) and *ECP5 and ECP5-5G Memory Usage Guide* FPGA-TN-02204
(DP16KD: widths, addresses, write modes, output registers, initial values).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

OPERAND_BITS: Final = 18
PRODUCT_BITS: Final = 36
_SELECTIONS: Final = ("INPUTA", "INPUTB", "INPUTC", "PIPELINE", "OUTPUT")
# Of a file that is not ours to tidy, or whose ports must be as the vendor names them.
LINT_OFF: Final = "".join(
    f"/* verilator lint_off {name} */\n"
    for name in (
        *("UNUSEDSIGNAL", "UNUSEDPARAM", "UNDRIVEN", "PINMISSING", "PINCONNECTEMPTY"),
        *("DECLFILENAME", "WIDTH", "CASEINCOMPLETE", "VARHIDDEN"),
        *("INITIALDLY", "BLKSEQ", "UNOPTFLAT"),
    )
)


def _ports(name: str, bits: int) -> str:
    return ", ".join(f"{name}{n}" for n in range(bits))


def _bits(name: str, bits: int) -> str:
    return "{" + ", ".join(f"{name}{n}" for n in reversed(range(bits))) + "}"


def _register(name: str, selection: str, bits: int, source: str) -> Iterable[str]:
    """A register that its parameters clock, enable and reset, or leave out."""
    parameter = f"REG_{selection}"
    yield f"  wire {name}_clk = `OCTICK_OF({parameter}_CLK, CLK);"
    yield f"  wire {name}_ce = `OCTICK_OF({parameter}_CE, CE);"
    yield f"  wire {name}_rst = `OCTICK_OF({parameter}_RST, RST);"
    yield f"  reg [{bits - 1}:0] {name}_q;"
    yield f"  initial {name}_q = {bits}'d0;"
    yield "  generate"
    yield '    if (RESETMODE == "ASYNC") begin'
    yield f"      always @(posedge {name}_clk or posedge {name}_rst)"
    yield f"        if ({name}_rst) {name}_q <= {bits}'d0;"
    yield f"        else if ({name}_ce) {name}_q <= {source};"
    yield "    end else begin"
    yield f"      always @(posedge {name}_clk)"
    yield f"        if ({name}_rst) {name}_q <= {bits}'d0;"
    yield f"        else if ({name}_ce) {name}_q <= {source};"
    yield "    end"
    yield "  endgenerate"
    yield f'  wire [{bits - 1}:0] {name} = {parameter}_CLK == "NONE" ? {source} : {name}_q;'


def _multiplier() -> str:
    operand, product = OPERAND_BITS, PRODUCT_BITS
    inputs = [_ports(name, operand) for name in ("A", "B", "C", "SRIA", "SRIB")]
    inputs += ["SIGNEDA, SIGNEDB, SOURCEA, SOURCEB"]
    inputs += [_ports(name, 4) for name in ("CLK", "CE", "RST")]
    outputs = [_ports(name, operand) for name in ("SROA", "SROB", "ROA", "ROB", "ROC")]
    outputs += [_ports("P", product), "SIGNEDP"]
    lines = [
        "`define OCTICK_OF(chosen, port) \\",
        '  (chosen[7:0] == "0" ? port``0 : chosen[7:0] == "1" ? port``1 : \\',
        '   chosen[7:0] == "2" ? port``2 : chosen[7:0] == "3" ? port``3 : 1\'b0)',
        "",
        "// Product of two operands of 18 bits, each signed or not, with registers before, in and",
        "// behind it. SIGNEDA and SIGNEDB are taken as constants; a second clock edge for",
        "// operand B and the division of clocks are not modelled.",
        "module MULT18X18D (",
        ",\n".join(f"  input {names}" for names in inputs) + ",",
        ",\n".join(f"  output {names}" for names in outputs),
        ");",
        *(
            f'  parameter [31:0] REG_{name}_CLK = "NONE";\n'
            f'  parameter [31:0] REG_{name}_CE = "CE0";\n'
            f'  parameter [31:0] REG_{name}_RST = "RST0";'
            for name in _SELECTIONS
        ),
        *(f'  parameter [127:0] CLK{n}_DIV = "ENABLED";' for n in range(4)),
        '  parameter HIGHSPEED_CLK = "NONE";',
        '  parameter [127:0] GSR = "ENABLED";',
        '  parameter CAS_MATCH_REG = "FALSE";',
        '  parameter [127:0] SOURCEB_MODE = "B_SHIFT";',
        '  parameter [127:0] MULT_BYPASS = "DISABLED";',
        '  parameter [127:0] RESETMODE = "SYNC";',
        "",
        *(
            f"  wire [{operand - 1}:0] given_{name.lower()} = SOURCE{name} ?"
            f" {_bits(f'SRI{name}', operand)} : {_bits(name, operand)};"
            for name in "AB"
        ),
        f"  wire [{operand - 1}:0] given_c = {_bits('C', operand)};",
        *_register("a", "INPUTA", operand, "given_a"),
        *_register("b", "INPUTB", operand, "given_b"),
        *_register("c", "INPUTC", operand, "given_c"),
        f"  wire signed [{operand}:0] wide_a = {{SIGNEDA & a[{operand - 1}], a}};",
        f"  wire signed [{operand}:0] wide_b = {{SIGNEDB & b[{operand - 1}], b}};",
        f"  wire signed [{2 * operand + 1}:0] wide_product = wide_a * wide_b;",
        f"  wire [{product - 1}:0] bypassed = {{b, a}};",
        f'  wire [{product - 1}:0] product = MULT_BYPASS == "ENABLED" ? bypassed :',
        f"    wide_product[{product - 1}:0];",
        *_register("inner", "PIPELINE", product, "product"),
        *_register("outer", "OUTPUT", product, "inner"),
        f"  assign {_bits('P', product)} = outer;",
        "  assign SIGNEDP = SIGNEDA | SIGNEDB;",
        *(
            f"  assign {_bits(f'{to}{name}', operand)} = {name.lower()};"
            for to in ("SRO", "RO")
            for name in "AB"
        ),
        f"  assign {_bits('ROC', operand)} = c;",
        "endmodule",
        "",
    ]
    return "\n".join(lines)


MULTIPLIER: Final = _multiplier()

BLOCK_BITS: Final = 18  # of a word, with one bit more for each byte
BLOCK_WORDS: Final = 1024
_ADDRESS_BITS: Final = 14
_INITIAL_VALUES: Final = 64  # parameters of 320 bits, of 16 words in 20 bits each


def _block_port(name: str) -> Iterable[str]:
    """One port: its pins as vectors, and its read value with the optional output register."""
    low = name.lower()
    yield f'  wire clk_{low} = CLK{name}MUX == "INV" ? ~CLK{name} : CLK{name};'
    yield f"  wire [{_ADDRESS_BITS - 1}:0] at_{low} = {_bits(f'AD{name}', _ADDRESS_BITS)};"
    yield f"  wire [{BLOCK_BITS - 1}:0] in_{low} = {_bits(f'DI{name}', BLOCK_BITS)};"
    yield f"  reg [{BLOCK_BITS - 1}:0] read_{low}, out_{low};"
    yield f"  assign {_bits(f'DO{name}', BLOCK_BITS)} ="
    yield f'    reg_{low} == "OUTREG" ? out_{low} : read_{low};'


def _block_reads(name: str) -> Iterable[str]:
    """What a port reads at its clock; of 36 bits, A brings the lower half at B's clock."""
    low = name.lower()
    yield f"  always @(posedge by_{low} or posedge async_{low}) begin"
    yield f"    if (async_{low}) read_{low} <= 0;"
    yield f"    else if (rst_{low}) read_{low} <= 0;"
    yield "    else if (WIDE_READ) begin"
    yield f"      if (CEB) read_{low} <= mem[{{at_b[13:5], 1'b{name == 'B':d}}}];"
    yield "    end"
    yield f"    else if (CE{name}) begin"
    yield f"      if (!WE{name} || DATA_WIDTH_{name} == 36)"
    yield f"        read_{low} <= fetched(at_{low}, DATA_WIDTH_{name});"
    yield f'      else if (WRITEMODE_{name} == "READBEFOREWRITE")'
    yield f"        read_{low} <= fetched(at_{low}, DATA_WIDTH_{name});"
    yield f'      else if (WRITEMODE_{name} == "WRITETHROUGH") read_{low} <= in_{low};'
    yield "    end"
    yield "  end"
    yield f"  always @(posedge by_{low} or posedge async_{low}) begin"
    yield f"    if (async_{low} || rst_{low}) out_{low} <= 0;"
    yield f"    else if (oce_{low}) out_{low} <= read_{low};"
    yield "  end"


def _block_writes(name: str) -> Iterable[str]:
    """What a port writes at its clock: whole bytes of a word, or a part of one."""
    low = name.lower()
    yield f"  always @(posedge clk_{low}) if (CE{name} && WE{name}) begin"
    yield f"    if (DATA_WIDTH_{name} == 36) begin"
    for byte in range(4):
        word, half = divmod(byte, 2)
        source = "in_a" if word == 0 else "in_b"
        at = f"mem[{{at_{low}[13:5], 1'b{word}}}][{9 * half} +: 9]"
        yield f"      if (at_{low}[{byte}]) {at} <= {source}[{9 * half} +: 9];"
    yield f"    end else if (DATA_WIDTH_{name} == 18) begin"
    for half in range(2):
        at = f"mem[at_{low}[13:4]][{9 * half} +: 9]"
        yield f"      if (at_{low}[{half}]) {at} <= in_{low}[{9 * half} +: 9];"
    yield "    end"
    parts = {9: "0", 4: f"4*at_{low}[2]", 2: f"2*at_{low}[2:1]", 1: f"at_{low}[2:0]"}
    for width, part in parts.items():
        at = f"mem[at_{low}[13:4]][9*at_{low}[3] + {part} +: {width}]"
        yield f"    if (DATA_WIDTH_{name} == {width}) {at} <= in_{low}[{width - 1}:0];"
    yield "  end"


def _block_memory() -> str:
    pins = []
    for name in "AB":
        pins += [
            f"  input {_ports(f'DI{name}', BLOCK_BITS)}",
            f"  input {_ports(f'AD{name}', _ADDRESS_BITS)}",
        ]
        pins += [
            f"  input CE{name}, OCE{name}, CLK{name}, WE{name}, RST{name}, {_ports(f'CS{name}', 3)}"
        ]
        pins += [f"  output {_ports(f'DO{name}', BLOCK_BITS)}"]
    lines = [
        "// 18 Kbit in words of 18 bits, with two ports of 1, 2, 4, 9 or 18 bits, or one that",
        "// writes and one that reads 36. Chip selects are taken as selected.",
        "module DP16KD (",
        ",\n".join(pins),
        ");",
        *(
            f"  parameter DATA_WIDTH_{name} = 18;\n"
            f'  parameter REGMODE_{name} = "NOREG";\n'
            f'  parameter [127:0] WRITEMODE_{name} = "NORMAL";\n'
            f'  parameter CLK{name}MUX = "CLK{name}";\n'
            f'  parameter CSDECODE_{name} = "0b000";'
            for name in "AB"
        ),
        '  parameter [127:0] RESETMODE = "SYNC";',
        '  parameter ASYNC_RESET_RELEASE = "SYNC";',
        '  parameter GSR = "ENABLED";',
        *(f"  parameter [319:0] INITVAL_{n:02X} = 320'd0;" for n in range(_INITIAL_VALUES)),
        "  localparam WIDE_READ = DATA_WIDTH_B == 36;",
        "  wire [127:0] reg_a = WIDE_READ ? REGMODE_B : REGMODE_A;",
        "  wire [127:0] reg_b = REGMODE_B;",
        f"  reg [{BLOCK_BITS - 1}:0] mem [0:{BLOCK_WORDS - 1}];",
        *_block_port("A"),
        *_block_port("B"),
        "  wire by_a = WIDE_READ ? clk_b : clk_a;",
        "  wire by_b = clk_b;",
        "  wire oce_a = WIDE_READ ? OCEB : OCEA;",
        "  wire oce_b = OCEB;",
        "  wire rst_a = WIDE_READ ? RSTB : RSTA;",
        "  wire rst_b = RSTB;",
        '  wire async_a = RESETMODE == "ASYNC" && rst_a;',
        '  wire async_b = RESETMODE == "ASYNC" && rst_b;',
        f"  function [{BLOCK_BITS - 1}:0] fetched(",
        f"    input [{_ADDRESS_BITS - 1}:0] at, input integer width",
        "  );",
        f"    reg [{BLOCK_BITS - 1}:0] word;",
        "    begin",
        "      word = mem[at[13:4]];",
        "      case (width)",
        "        18: fetched = word;",
        "        9: fetched = word[9*at[3] +: 9];",
        "        4: fetched = word[9*at[3] + 4*at[2] +: 4];",
        "        2: fetched = word[9*at[3] + 2*at[2:1] +: 2];",
        "        default: fetched = word[9*at[3] + at[2:0] +: 1];",
        "      endcase",
        "    end",
        "  endfunction",
        "  integer n;",
        "  initial begin",
        "    read_a = 0; read_b = 0; out_a = 0; out_b = 0;",
        "    for (n = 0; n < 16; n = n + 1) begin",
        *(
            f"      mem[{16 * v} + n] = INITVAL_{v:02X}[20*n +: 18];"
            for v in range(_INITIAL_VALUES)
        ),
        "    end",
        "  end",
        *_block_reads("A"),
        *_block_reads("B"),
        *_block_writes("A"),
        *_block_writes("B"),
        "endmodule",
        "",
    ]
    return "\n".join(lines)


BLOCK_MEMORY: Final = _block_memory()
MODELS: Final = {"MULT18X18D": MULTIPLIER, "DP16KD": BLOCK_MEMORY}
