"""SystemVerilog as text: identifiers, widths, constants, tables and modules.

Only what both Verilator 5 and Yosys 0.23 read: packed vectors, `always_ff`, generate loops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final

import numpy as np

LINE_BITS: Final = 256  # of a constant on one line
INDENT: Final = "  "
_RESERVED: Final = frozenset(
    re.findall(
        r"\w+",
        """
    accept_on alias always always_comb always_ff always_latch and assert assign assume automatic
    before begin bind bins binsof bit break buf bufif0 bufif1 byte case casex casez cell chandle
    checker class clocking cmos config const constraint context continue cover covergroup
    coverpoint cross deassign default defparam design disable dist do edge else end endcase
    endchecker endclass endclocking endconfig endfunction endgenerate endgroup endinterface
    endmodule endpackage endprimitive endprogram endproperty endspecify endsequence endtable
    endtask enum event eventually expect export extends extern final first_match for force
    foreach forever fork forkjoin function generate genvar global highz0 highz1 if iff ifnone
    ignore_bins illegal_bins implements implies import incdir include initial inout input inside
    instance int integer interconnect interface intersect join join_any join_none large let
    liblist library local localparam logic longint macromodule matches medium modport module
    nand negedge nettype new nexttime nmos nor noshowcancelled not notif0 notif1 null or output
    package packed parameter pmos posedge primitive priority program property protected pull0
    pull1 pulldown pullup pulsestyle_ondetect pulsestyle_onevent pure rand randc randcase
    randsequence rcmos real realtime ref reg reject_on release repeat restrict return rnmos
    rpmos rtran rtranif0 rtranif1 s_always s_eventually s_nexttime s_until s_until_with scalared
    sequence shortint shortreal showcancelled signed small soft solve specify specparam static
    string strong strong0 strong1 struct super supply0 supply1 sync_accept_on sync_reject_on
    table tagged task this throughout time timeprecision timeunit tran tranif0 tranif1 tri tri0
    tri1 triand trior trireg type typedef union unique unique0 unsigned until until_with untyped
    use uwire var vectored virtual void wait wait_order wand weak weak0 weak1 while wildcard
    wire with within wor xnor xor
    """,
    )
)
# What stands inside our modules, beside the names of layers.
_OURS: Final = re.compile(
    r"""[a-wyz]|adds|begins|\w*_ahead|level\d+|out_\w+|in_\w+|u_\w+
    |(?:accept|added|back|begun|beats?|candidate|clip|clk|codes?|comes|count|deliver|done|due)
    |(?:element|en|entry|fabric|fetched|filled|fresh|given|group\d*_\w+|held|kept|keep|lag)
    |(?:lane|lane_en|look_up|memory|newest|next|none|now|odd|own|pair|product|read|read_beat)
    |(?:reading|remembered|rest|ring|round|round_en|rst|running|saturated|score|single|several)
    |(?:stage|start|state|sum|term|took|total|unit|value|violations|waiting|whole|wide)
    |(?:written|written_beat|f_c|i_g|o_s|r_own|rest_n|z_h)
    |(?:biases|chosen|first|issue|last|left|output|rom|run|shifts|slice|step|turn|ups|weights)
    (?:_\w+)?""",
    re.VERBOSE,
)


@cache
def identifier(name: str) -> str:
    """A name of the model as a SystemVerilog identifier: what else it holds becomes ``_``.

    A name that begins with no letter, or that the language or a module keeps for itself, gets the
    prefix ``layer_``.
    """
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    if not re.match(r"[A-Za-z]", plain) or plain in _RESERVED or _OURS.fullmatch(plain):
        plain = f"layer_{plain}"
    return plain


def unsigned_bits(greatest: int) -> int:
    """Bits of an unsigned number up to ``greatest``, at least 1."""
    return max(1, int(greatest).bit_length())


def signed_bits(least: int, greatest: int) -> int:
    """Bits of a two's complement number from ``least`` to ``greatest``."""
    return max(int(greatest).bit_length(), int(-least - 1).bit_length() if least < 0 else 0) + 1


def constant(bits: int, value: int) -> str:
    """A sized hexadecimal constant, in two's complement where negative."""
    assert -(1 << bits) < value < 1 << bits, f"{value} in {bits} bits"
    return f"{bits}'h{value & ((1 << bits) - 1):x}"


def packed(bits: int, values: Iterable[int]) -> int:
    """Values of so many bits each as one number, the first one lowest."""
    found = 0
    for at, value in enumerate(values):
        found |= (int(value) & ((1 << bits) - 1)) << (bits * at)
    return found


def packed_bytes(codes: np.ndarray) -> int:
    """Bytes of uint8 or int8 as one number, the first one lowest."""
    return int.from_bytes(np.ascontiguousarray(codes).tobytes(), "little")


def wide_constant(bits: int, value: int, indent: str) -> str:
    """A constant of any width, broken into lines of `LINE_BITS`, highest first."""
    if bits <= LINE_BITS:
        return constant(bits, value)
    parts = []
    for low in reversed(range(0, bits, LINE_BITS)):
        width = min(LINE_BITS, bits - low)
        parts.append(constant(width, (value >> low) & ((1 << width) - 1)))
    return "{" + f",\n{indent}{INDENT}".join(parts) + "}"


def selection(
    index: str, index_bits: int, target: str, bits: int, entries: Sequence[int], indent: str
) -> list[str]:
    """A case statement: ``target <= entries[index]``; an index beyond them takes the last one."""
    lines = [f"{indent}case ({index})"]
    for at, entry in enumerate(entries):
        key = f"{index_bits}'d{at}" if at + 1 < len(entries) else "default"
        value = wide_constant(bits, entry, indent + 2 * INDENT)
        lines.append(f"{indent}{INDENT}{key}: {target} <= {value};")
    return [*lines, f"{indent}endcase"]


def vector(bits: int) -> str:
    """The range of a packed vector."""
    return f"[{bits - 1}:0]"


def module(
    name: str,
    comment: Sequence[str],
    ports: Sequence[str],
    body: Sequence[str],
    parameters: Sequence[str] = (),
) -> str:
    """A module's text.

    Parameters
    ----------
    name : str
    comment : sequence of str
        What it is, above it.
    ports, body : sequence of str
        Lines, the body's already indented by one step.
    parameters : sequence of str
        Behind ``HOLD``, which every module has; see `engine.backends.fpga.rtl_library`.
    """
    said = [f"// {line}".rstrip() for line in comment]
    given = ",\n".join(f"{INDENT}parameter {line}" for line in ("bit HOLD = 1", *parameters))
    listed = ",\n".join(INDENT + port for port in ports)
    return "\n".join(
        [*said, f"module {name} #(", given, ") (", listed, ");", *body, "endmodule", ""]
    )
