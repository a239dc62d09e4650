"""From the integer graph to one SystemVerilog design: a module for each layer, and their order.

Every layer becomes a module of its name, with its weights in a ROM beside it. Layers start one
another by what `engine.backends.fpga.rtl_library` calls ``ahead``: there is no central sequence,
and the cycles of an inference follow from the graph alone. They are known here, and never vary.

The ports of the top module, at the rising edge of ``clk``; ``rst`` is synchronous, active high:

======================  ===========================================================================
``in_valid, in_ready``  an input is taken where both are high
``in_data``             its codes, 8 bits each, the first one lowest
``in_reset``            whether the state begins afresh with it; so it does after ``rst``
``out_valid, out_ready``  an answer is taken where both are high; it waits as long as need be
``out_data``            32 bit each, the first one lowest: accumulators of the scores, or codes
``out_violations``      mask of the value check, without that of the input
======================  ===========================================================================

One inference is under way at a time: the next input is taken when the answer is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from engine.backends.fpga.parallelism import choose_parallelism
from engine.backends.fpga.rtl_circuit import Circuit
from engine.backends.fpga.rtl_text import module, vector
from engine.backends.fpga.rtl_value import Lanes, Parallelism, Value
from engine.backends.fpga.rtl_wiring import TOP
from engine.backends.integer_graph import IntegerGraph

OUT_BITS: Final = 32
CODES_OF_A_COPY: Final = 16


@dataclass(frozen=True)
class Design:
    """A generated design.

    Attributes
    ----------
    top : str
        The top module.
    files : dict of str to str
        SystemVerilog by file name; constants stand in the text.
    cycles : int
        From the clock edge that takes the input to the one that takes the answer.
    lanes : dict of str to Lanes
        By layer.
    n_features, n_outputs : int
        Elements of ``in_data``, of 8 bits, and of ``out_data``, of 32.
    """

    top: str
    files: dict[str, str]
    cycles: int
    lanes: dict[str, Lanes]
    n_features: int
    n_outputs: int


def generate(graph: IntegerGraph, parallelism: Parallelism | None = None) -> Design:
    """The design of a graph.

    Parameters
    ----------
    graph : IntegerGraph
    parallelism : Parallelism, optional
        `engine.backends.fpga.parallelism.choose_parallelism` where nothing is said.

    Raises
    ------
    InputError
        Naming the first layer that has no place in a circuit.
    """
    circuit = Circuit(graph, parallelism or choose_parallelism(graph))
    lanes = {name: plan.lanes for name, plan in circuit.plans.items()}
    files = circuit.files() | {f"{TOP}.sv": _top(circuit)}
    return Design(TOP, files, circuit.due, lanes, graph.n_features, graph.n_outputs)


def _top(circuit: Circuit) -> str:
    graph, x, result = circuit.graph, circuit.x, circuit.result
    ports = [
        "input  logic clk",
        "input  logic rst",
        "input  logic in_valid",
        "(* keep *) output logic in_ready",
        "input  logic in_reset",
        f"input  logic {vector(x.width)} in_data",
        "output logic out_valid",
        "input  logic out_ready",
        f"output logic {vector(OUT_BITS * graph.n_outputs)} out_data",
        "output logic [31:0] out_violations",
    ]
    signed = graph.scores is not None
    waits = circuit.due - 1 - result.ahead
    done = f"{result.signal}_ahead" if waits == 0 else f"done[{waits}]"
    body = [
        "  // ---- one inference at a time: its input, and whether the state begins afresh",
        "  wire accept = in_valid && in_ready;",
        "  wire deliver = out_valid && out_ready;",
        f"  logic {vector(x.width)} {x.signal};",
        "  logic begun, fresh, start;",
        f"  wire {x.signal}_ahead = accept;",
        *circuit.wires,
        "  always_ff @(posedge clk) begin",
        "    if (rst || deliver) in_ready <= 1'b1;",
        "    else if (accept) in_ready <= 1'b0;",
        "    if (rst) begun <= 1'b0;",
        "    else if (accept) begun <= 1'b1;",
        "    start <= !rst && accept;",
        "    if (accept) fresh <= in_reset || !begun;",
        "  end",
        *_taken(x),
        "",
        "  // ---- layers",
        *circuit.body,
        "",
        *circuit.checks,
        "",
        "  // ---- the answer, until it is taken",
    ]
    if waits:
        more = (
            f"{{done[{waits - 1}:1], {result.signal}_ahead}}"
            if waits > 1
            else f"{result.signal}_ahead"
        )
        body += [
            f"  logic [{waits}:1] done;",
            f"  always_ff @(posedge clk) done <= rst ? '0 : {more};",
        ]
    body += [
        "  always_ff @(posedge clk) begin",
        "    if (rst || deliver) out_valid <= 1'b0;",
        f"    else if ({done}) out_valid <= 1'b1;",
        "  end",
        f"  for (genvar o = 0; o < {graph.n_outputs}; o = o + 1) begin : score",
        f"    wire {'signed ' if signed else ''}{vector(result.bits)} total =",
        f"        {result.signal}[{result.bits}*o +: {result.bits}];",
        f"    assign out_data[{OUT_BITS}*o +: {OUT_BITS}] = {OUT_BITS}'(total);",
        "  end",
        "  assign out_violations = violations;",
    ]
    return module(TOP, [f"Octick model {graph.where}"], ports, body)


def _taken(x: Value) -> Iterator[str]:
    """The input's registers: some share a copy of ``in_ready``, which would lie far from most."""
    copies = -(-x.size // CODES_OF_A_COPY)
    yield f"  (* keep *) logic {vector(copies)} in_open;"
    yield "  always_ff @(posedge clk) begin"
    for copy in range(copies):
        yield f"    if (rst || deliver) in_open[{copy}] <= 1'b1;"
        yield f"    else if (accept) in_open[{copy}] <= 1'b0;"
        low, high = (min(n * CODES_OF_A_COPY, x.size) * x.bits for n in (copy, copy + 1))
        part = f"[{high - 1}:{low}]"
        yield f"    if (in_open[{copy}]) {x.signal}{part} <= in_data{part};"
    yield "  end"
