"""The SystemVerilog of a MAC engine: its module, the sequence of its steps, and their codes.

A step's way is counted in cycles after its issue: what is registered at the end of cycle ``k`` is
enabled by ``stage[k]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.backends.fpga.rtl_dense import OPERAND_AT, Sums
from engine.backends.fpga.rtl_engine import Engine
from engine.backends.fpga.rtl_lanes import lanes_and_tree, weights_module
from engine.backends.fpga.rtl_library import CODE_BITS, REQUANTISE_CYCLES
from engine.backends.fpga.rtl_sums import accumulators, biases, requantisers, sums_out
from engine.backends.fpga.rtl_text import constant, module, unsigned_bits, vector


def engine_files(engine: Engine) -> dict[str, str]:
    """An engine's module and that of its weights, by file name."""
    weights = f"{engine.name}_weights"
    return {
        f"{engine.name}.sv": _module(engine),
        f"{weights}.sv": weights_module(engine, weights),
    }


def _module(engine: Engine) -> str:
    plan, lanes, name = engine.plan, engine.plan.lanes, engine.name
    bits = CODE_BITS if plan.codes else engine.acc_bits
    ports = ["input  logic clk", "input  logic rst"]
    for port, source in zip(engine.ports_in, engine.sources, strict=True):
        ports += [f"input  logic {port}_ahead", f"input  logic {vector(source.width)} {port}"]
    ports += [
        f"output logic {name}_ahead",
        f"output logic {vector(bits * lanes.outputs)} {name}",
    ]
    said = [
        f"{' + '.join(str(s.size) for s in engine.sources)} codes to {plan.rows} outputs: "
        f"{lanes.inputs} x {lanes.outputs} lanes, {lanes.dsp} of them multiplier blocks, "
        f"{plan.steps} steps.",
    ]
    body = [
        *_sequence(engine),
        *_operands(engine),
        *biases(engine),
        *lanes_and_tree(engine),
        *accumulators(engine),
        *(requantisers(engine) if plan.codes else sums_out(engine)),
    ]
    return module(name, said, ports, body)


def _last_stage(plan: Sums) -> int:
    return plan.total_at + (REQUANTISE_CYCLES - 1 if plan.codes else 0)


def _sequence(engine: Engine) -> Iterator[str]:
    """Which step is under way: issues by source, and how long ago they were."""
    plan = engine.plan
    yield "  // ---- steps: a source's first one is issued when it is announced"
    issues = []
    for at, port in enumerate(engine.ports_in):
        if plan.groups > 1 and at != _latest(engine):
            continue
        length = plan.steps if plan.groups > 1 else plan.slices[at]
        yield from _issue(engine, at, port, length)
        issues.append(f"issue_{port}")
    depth = _last_stage(plan)
    yield f"  wire issue = {' || '.join(issues)};"
    yield f"  logic [{depth}:1] stage;"
    yield f"  always_ff @(posedge clk) stage <= rst ? '0 : {{stage[{depth - 1}:1], issue}};"
    steps = plan.group_steps
    if steps > 1:
        bits = unsigned_bits(steps - 1)
        top = constant(bits, steps - 1)
        yield ""
        yield "  // ---- slices of a group: the first one begins its sums, the last one ends them"
        yield f"  logic {vector(bits)} slice;"
        yield f"  logic [{depth}:1] first, last;"
        yield "  always_ff @(posedge clk) begin"
        yield "    if (rst) slice <= '0;"
        yield f"    else if (issue) slice <= slice == {top} ? '0 : slice + 1'b1;"
        yield f"    first <= rst ? '0 : {{first[{depth - 1}:1], issue && slice == '0}};"
        yield f"    last <= rst ? '0 : {{last[{depth - 1}:1], issue && slice == {top}}};"
        yield "  end"
    yield ""


def _latest(engine: Engine) -> int:
    aheads = [source.ahead for source in engine.sources]
    return aheads.index(max(aheads))


def _issue(engine: Engine, at: int, port: str, length: int) -> Iterator[str]:
    plan, start = engine.plan, f"{port}_ahead"
    wait = plan.waits[at]
    if wait:
        yield f"  // {port} waits for its turn"
        yield f"  logic [{wait}:1] {port}_wait;"
        before = f"{{{port}_wait[{wait - 1}:1], {start}}}" if wait > 1 else start
        yield f"  always_ff @(posedge clk) {port}_wait <= rst ? '0 : {before};"
        start = f"{port}_wait[{wait}]"
    more = length if plan.chosen[at] else length - 1
    if more == 0 or not engine.sources[at].whole:
        yield f"  wire issue_{port} = {start};"
        return
    bits = unsigned_bits(more - 1)
    now = "" if plan.chosen[at] else f"{start} || "
    yield f"  logic run_{port};"
    yield f"  logic {vector(bits)} left_{port};"
    yield f"  wire issue_{port} = {now}run_{port};"
    yield "  always_ff @(posedge clk) begin"
    yield f"    if (rst) run_{port} <= 1'b0;"
    yield f"    else if ({start}) run_{port} <= 1'b1;"
    yield f"    else if (left_{port} == '0) run_{port} <= 1'b0;"
    yield f"    left_{port} <= {start} ? {constant(bits, more - 1)} : left_{port} - 1'b1;"
    yield "  end"


def _operands(engine: Engine) -> Iterator[str]:
    """The codes of a step, there at `OPERAND_AT`: ``codes``."""
    plan, inputs = engine.plan, engine.plan.lanes.inputs
    width = inputs * CODE_BITS
    taken = []
    if any(plan.chosen):
        yield "  // ---- the codes of a step, chosen from the whole"
    if plan.groups > 1 and plan.chosen[0]:
        parts = [
            part
            for port, source, slices in zip(
                engine.ports_in, engine.sources, plan.slices, strict=True
            )
            for part in _slices(port, source.width, slices, width)
        ]
        yield from _choice("chosen", parts, width, plan.group_steps)
        taken.append("chosen")
    else:
        before = 0
        for at, (port, source) in enumerate(zip(engine.ports_in, engine.sources, strict=True)):
            slices = plan.slices[at]
            if plan.chosen[at]:
                parts = _slices(port, source.width, slices, width)
                yield from _choice(f"chosen_{port}", parts, width, plan.group_steps, before)
                taken.append(f"chosen_{port}")
            else:
                taken.append(_extended(port, source.width, width))
            before += slices
    if len(taken) == 1 or plan.groups > 1:
        yield f"  wire {vector(width)} codes = {taken[0]};"
    else:
        yield "  // ---- of the source whose turn it is"
        choice = taken[-1]
        for port, codes in reversed(list(zip(engine.ports_in, taken, strict=True))[:-1]):
            yield f"  logic [{OPERAND_AT}:1] turn_{port};"
            turns = f"{{turn_{port}[{OPERAND_AT - 1}:1], issue_{port}}}"
            yield f"  always_ff @(posedge clk) turn_{port} <= rst ? '0 : {turns};"
            choice = f"turn_{port}[{OPERAND_AT}] ? {codes} : {choice}"
        yield f"  wire {vector(width)} codes = {choice};"
    yield ""


def _extended(port: str, bits: int, width: int) -> str:
    assert bits <= width
    return port if bits == width else f"{{{width - bits}'b0, {port}}}"


def _slices(port: str, bits: int, slices: int, width: int) -> list[str]:
    parts = []
    for low in range(0, slices * width, width):
        high = min(bits, low + width)
        part = f"{port}[{high - 1}:{low}]"
        parts.append(part if high == low + width else f"{{{low + width - high}'b0, {part}}}")
    return parts


def _choice(
    name: str, parts: Sequence[str], width: int, steps: int, before: int = 0
) -> Iterator[str]:
    bits = unsigned_bits(steps - 1)
    yield f"  logic {vector(bits)} slice_{name};"
    yield f"  logic {vector(width)} {name};"
    yield "  always_ff @(posedge clk) begin"
    yield f"    slice_{name} <= slice;"
    yield f"    if (!HOLD || stage[{OPERAND_AT - 1}]) case (slice_{name})"
    for at, part in enumerate(parts):
        key = f"{bits}'d{before + at}" if at + 1 < len(parts) else "default"
        yield f"      {key}: {name} <= {part};"
    yield "    endcase"
    yield "  end"
