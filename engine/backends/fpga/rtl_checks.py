"""The value check in hardware: saturated codes counted, point by point, and held against limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.backends.fpga.rtl_library import COUNT_RADIX, LOOKAHEAD
from engine.backends.fpga.rtl_text import constant, module, unsigned_bits, vector
from engine.backends.fpga.rtl_value import Value
from engine.backends.integer_graph import CODE_MAX, CheckGroup


@dataclass(frozen=True)
class Count:
    """A saturation count that leaves a module.

    Attributes
    ----------
    signal : str
    bits : int
    group : int
        Index into the graph's checks.
    ready : int
        Cycle from which it is final.
    """

    signal: str
    bits: int
    group: int
    ready: int


def radix_counts(terms: int) -> list[int]:
    """Terms at each level of a tree of sums of `COUNT_RADIX`."""
    counts = [terms]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // COUNT_RADIX))
    return counts


def counter_name(codes: int) -> str:
    """Module that counts so many codes a beat."""
    return f"saturation_count_{codes}"


def counter_ready(value: Value) -> int:
    """Cycle from which a value's count is final."""
    return value.last_ahead + LOOKAHEAD + 1 + len(radix_counts(value.beat))


def counter_module(codes: int) -> str:
    """A counter of saturated codes, so many a beat."""
    counts = radix_counts(codes)
    depth = LOOKAHEAD + len(counts)
    ports = [
        "input  logic clk",
        "input  logic rst",
        "input  logic start",
        "input  logic codes_ahead",
        f"input  logic {vector(8 * codes)} codes",
        "output logic [COUNT_BITS-1:0] count",
    ]
    body = [
        f"  logic [{depth}:1] stage;",
        f"  always_ff @(posedge clk) stage <= rst ? '0 : {{stage[{depth - 1}:1], codes_ahead}};",
    ]
    for level, count in enumerate(counts):
        body += _level(level, count, counts[level + 1 :])
    body += [
        "  always_ff @(posedge clk) begin",
        "    if (start) count <= '0;",
        f"    else if (stage[{depth}]) count <= count + level{len(counts) - 1}[0].sum;",
        "  end",
    ]
    parameters = ["bit LOW = 0", "bit HIGH = 1", "int COUNT_BITS = 8"]
    said = ["Counts codes at the ends (0 where LOW, 255 where HIGH) since `start`."]
    return module(counter_name(codes), said, ports, body, parameters)


def _level(level: int, count: int, above: Sequence[int]) -> Iterator[str]:
    """One level of the tree of sums, filled up with zeros."""
    padded = COUNT_RADIX * above[0] if above else 1
    clock = f"always_ff @(posedge clk) if (!HOLD || stage[{LOOKAHEAD + level}])"
    yield f"  for (genvar i = 0; i < {padded}; i = i + 1) begin : level{level}"
    yield "    logic [COUNT_BITS-1:0] sum;"
    yield f"    if (i < {count}) begin : term"
    if level == 0:
        yield "      wire [7:0] code = codes[8*i +: 8];"
        yield f"      wire saturated = (LOW && code == 8'd0) || (HIGH && code == 8'd{CODE_MAX});"
        yield f"      {clock} sum <= COUNT_BITS'(saturated);"
    else:
        terms = [f"level{level - 1}[{COUNT_RADIX}*i+{n}].sum" for n in range(COUNT_RADIX)]
        yield f"      {clock} sum <= {' + '.join(terms)};"
    yield "    end else begin : none"
    yield "      assign sum = '0;"
    yield "    end"
    yield "  end"


def verdict(counts: Sequence[Count], checks: Sequence[CheckGroup]) -> tuple[list[str], int]:
    """The mask ``violations`` from the counts of all points: text, and the cycle it is final."""
    lines = ["  // ---- the value check: what is counted together, and up to how many"]
    ready, terms = 0, []
    for at, group in enumerate(checks):
        members = [count for count in counts if count.group == at]
        if not members:
            continue
        limit = group.limit
        names, when = [count.signal for count in members], max(count.ready for count in members)
        bits = unsigned_bits(max(limit, sum((1 << count.bits) - 1 for count in members)))
        level = 0
        while len(names) > 1:
            parts = [names[i : i + COUNT_RADIX] for i in range(0, len(names), COUNT_RADIX)]
            names = [f"group{at}_sum{level}_{n}" for n in range(len(parts))]
            lines.append(f"  logic {vector(bits)} {', '.join(names)};")
            lines.append("  always_ff @(posedge clk) begin")
            for name, part in zip(names, parts, strict=True):
                added = " + ".join(f"{bits}'({term})" for term in part)
                lines.append(f"    {name} <= {added};")
            lines.append("  end")
            when, level = when + 1, level + 1
        lines.append(f"  logic group{at}_over;")
        over = f"{bits}'({names[0]}) > {constant(bits, limit)}"
        lines.append(f"  always_ff @(posedge clk) group{at}_over <= {over};")
        terms.append(f"(group{at}_over ? {constant(32, group.mask)} : 32'd0)")
        ready = max(ready, when + 1)
    mask = " | ".join(terms) or "32'd0"
    lines.append(f"  wire [31:0] violations = {mask};")
    return lines, ready
