"""The frame that a design is placed and routed in: few pins, and registers at all its ports.

A design has hundreds of ports, a package has some two hundred pins. In the frame the inputs stand
in one long shift register and the outputs are taken over by registers and shifted out, so that
every path to be timed begins and ends in a register: input and output pins are in no figure. It is
written in the primitives of the device and joined to the synthesised netlist, which stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

FRAME: Final = "octick_pins"
CLOCK: Final = "clk"
_LOAD_OR_SHIFT: Final = "16'hCACA"  # LUT4: A where C is 0, B where C is 1


@dataclass(frozen=True)
class Port:
    """A port of a module."""

    name: str
    bits: int
    is_input: bool


def ports_of(netlist: Mapping[str, Any], top: str) -> list[Port]:
    """The ports of a module in a netlist that Yosys wrote as JSON (`write_json`)."""
    ports = netlist["modules"][top]["ports"]
    return [
        Port(name, len(port["bits"]), port["direction"] == "input") for name, port in ports.items()
    ]


def harness_text(top: str, ports: list[Port]) -> str:
    """The frame as Verilog, in cells of the ECP5.

    Parameters
    ----------
    top : str
        The module within.
    ports : list of Port
        Its own: a clock, one bit, and at least one other input and one output.
    """
    inputs = [port for port in ports if port.is_input and port.name != CLOCK]
    outputs = [port for port in ports if not port.is_input]
    assert inputs
    assert outputs
    assert any(port.name == CLOCK for port in ports)
    width, taken = sum(p.bits for p in inputs), sum(p.bits for p in outputs)
    lines = [
        f"module {FRAME} (input clk, input pin_in, input pin_shift, output pin_out);",
        f"  wire [{width}:0] chain;",
        f"  wire [{taken - 1}:0] out, held;",
        f"  wire [{taken}:0] shifted;",
        f"  wire [{taken - 1}:0] next;",
        "  wire shift;",
        "  assign chain[0] = pin_in;",
        "  assign shifted[0] = 1'b0;",
        f"  assign pin_out = shifted[{taken}];",
        _register("f_shift", "pin_shift", "shift"),
    ]
    lines += [_register(f"f_in_{n}", f"chain[{n}]", f"chain[{n + 1}]") for n in range(width)]
    for n in range(taken):
        lines += [
            _register(f"f_held_{n}", f"out[{n}]", f"held[{n}]"),
            f"  LUT4 #(.INIT({_LOAD_OR_SHIFT})) m_{n} (.A(held[{n}]), .B(shifted[{n}]),"
            f" .C(shift), .D(1'b0), .Z(next[{n}]));",
            _register(f"f_out_{n}", f"next[{n}]", f"shifted[{n + 1}]"),
        ]
    wired = [f".{CLOCK}(clk)"]
    low = 1
    for port in inputs:
        wired.append(f".{port.name}(chain[{low + port.bits - 1}:{low}])")
        low += port.bits
    low = 0
    for port in outputs:
        wired.append(f".{port.name}(out[{low + port.bits - 1}:{low}])")
        low += port.bits
    lines += [f"  {top} within ({', '.join(wired)});", "endmodule", ""]
    return "\n".join(lines)


def _register(name: str, source: str, target: str) -> str:
    return (
        '  TRELLIS_FF #(.GSR("DISABLED"), .CEMUX("1"), .CLKMUX("CLK"), .LSRMUX("LSR"),'
        f' .SRMODE("LSR_OVER_CE"), .REGSET("RESET")) {name}'
        f" (.CLK(clk), .LSR(1'b0), .CE(1'b1), .DI({source}), .Q({target}));"
    )
