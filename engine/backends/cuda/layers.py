"""Each layer of an integer graph as operations of a block of threads, in CUDA C.

The functions that the statements call are in `engine.backends.cuda.prelude`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from engine.backends.cuda.layout import Blob, PackedWeights, Places, pack_weights, ring_slots
from engine.backends.cuda.schedule import Operation, Read
from engine.backends.integer_graph import (
    CODE_MAX,
    Add,
    Columns,
    Concat,
    Delay,
    Dense,
    IntegerGraph,
    Maximum,
    Point,
    Product,
    Table,
)
from feeds.errors import InputError

INT_MAX: Final = (1 << 31) - 1
COUNTS: Final = "counts"  # of saturated codes, by check group
_VECTORS: Final = {4: "uint4", 2: "uint2", 1: "u32"}


class Memory:
    """What the operations of one graph are written into.

    Attributes
    ----------
    graph : IntegerGraph
    blob : Blob
        Weights and tables, read by ``weights + offset``.
    values : Places
        In shared memory, read by ``values + offset``.
    state : Places
        One stream's, in global memory, read by ``state + offset``.
    """

    def __init__(self, graph: IntegerGraph) -> None:
        self.graph = graph
        self.blob = Blob()
        self.values = Places()
        self.state = Places()

    def new(self, name: str, size: int) -> str:
        """A new value's expression."""
        self.values.add(name, size)
        return self.at(name)

    def at(self, name: str) -> str:
        """A value's expression."""
        return f"(values + {self.values[name]})"

    def weights(self, array: np.ndarray) -> str:
        """An array's expression in the blob."""
        return f"(weights + {self.blob.add(array)})"

    def by_output(self, array: np.ndarray, output: str) -> str:
        """One of several int32 constants; the number itself where all are the same."""
        if (array == array[0]).all():
            return str(int(array[0]))
        return f"load_int({self.weights(array.astype(np.int32))}, {output})"


def integer_type(*bounds: int) -> str:
    """The C type that holds all numbers up to these magnitudes, with what rounding adds."""
    assert max(bounds) < 1 << 62, "numbers beyond 64 bits"
    return "int" if 2 * max(bounds) <= INT_MAX else "s64"


def linear(values: Sequence[int], index: str) -> str:
    """An expression of ``values[index]``."""
    step = values[1] - values[0] if len(values) > 1 else 0
    if all(value == values[0] + i * step for i, value in enumerate(values)):
        return f"({values[0]} + {index} * {step})" if step else str(values[0])
    chosen = str(values[-1])
    for i in range(len(values) - 2, -1, -1):
        chosen = f"({index} == {i} ? {values[i]} : {chosen})"
    return chosen


class Tally:
    """Counts a point's saturated codes in a register, then once a thread in shared memory."""

    def __init__(self, point: Point | None, name: str) -> None:
        self.counts = point is not None and point.group >= 0 and (point.low or point.high)
        self._point, self._name = point, name

    @property
    def before(self) -> str:
        """Statement in front of the loop."""
        return f"u32 {self._name} = 0;" if self.counts else ""

    def count(self, code: str, where: str = "") -> str:
        """Statement behind one code; ``where``: a condition."""
        if not self.counts or self._point is None:
            return ""
        tests = [f"{code} == 0"] * self._point.low + [f"{code} == {CODE_MAX}"] * self._point.high
        found = " || ".join(tests)
        return f"{self._name} += {f'{where} && ' if where else ''}({found});"

    @property
    def after(self) -> str:
        """Statement behind the loop."""
        if not self.counts or self._point is None:
            return ""
        counter = f"(u32*)(values + COUNTS_AT) + {self._point.group}"
        return f"if ({self._name}) atomicAdd({counter}, {self._name});"

    @property
    def writes(self) -> tuple[str, ...]:
        """What an operation with this tally writes beside its values."""
        return (COUNTS,) if self.counts else ()


def joined(*statements: str) -> str:
    """Statements one after the other."""
    return "\n".join(statement for statement in statements if statement)


def dot_call(memory: Memory, product: Product, rows: int, row: str, output: str) -> str:
    """The expression of one product of one row and output, without its bias."""
    outputs, inputs = product.weight.shape
    packed: PackedWeights = pack_weights(product.weight, rows)
    weights = memory.weights(packed.data)
    codes = memory.at(product.source)
    if rows > 1:
        codes = f"{codes} + {row} * {inputs}"
    if packed.vector == 0:
        return f"dot_bytes<{inputs}, {outputs}>({codes}, {weights}, {output})"
    vector = _VECTORS[packed.vector]
    return f"dot<{vector}, {packed.count}, {outputs}>({codes}, {weights}, {output})"


def sums(memory: Memory, layer: Dense) -> tuple[str, np.ndarray]:
    """Statements that leave an accumulator in ``acc``, and the greatest magnitude of each output.

    Raises
    ------
    InputError
        If an accumulator may leave int32.
    """
    bias = np.zeros(layer.outputs, dtype=np.int64)
    reach = np.zeros(layer.outputs, dtype=np.int64)
    row, output = ("i / OUT", "i % OUT") if layer.rows > 1 else ("0", "i")
    parts = []
    for product in layer.products:
        up = product.up.astype(np.int64)
        bias += product.bias.astype(np.int64) << up
        weight = np.abs(product.weight.astype(np.int64)).sum(axis=1)
        reach += (np.abs(product.bias.astype(np.int64)) + CODE_MAX * weight) << up
        part = dot_call(memory, product, layer.rows, "row", "j")
        if up.any():
            part = f"{part} * (1 << {memory.by_output(up, 'j')})"
        parts.append(part)
    if (found := int(reach.max())) > INT_MAX:
        raise InputError(
            "accumulators beyond int32",
            where=f"{memory.graph.where}: {layer.name}",
            expected=f"at most {INT_MAX}",
            found=str(found),
            fix="serve this bundle with the onnx backend",
        )
    row, output = (part.replace("OUT", str(layer.outputs)) for part in (row, output))
    lines = [f"const int row = {row}, j = {output};"] if layer.rows > 1 else ["const int j = i;"]
    lines.append(f"int acc = {memory.by_output(bias, 'j')};")
    lines += [f"acc += {part};" for part in parts]
    return joined(*lines), reach


def dense_codes(
    memory: Memory, layer: Dense, name: str, points: Sequence[tuple[int, Point]]
) -> Operation:
    """Sums requantised into a new value; ``points``: (first output, point), in order."""
    items = layer.rows * layer.outputs
    body, reach = sums(memory, layer)
    kind = integer_type(*(int(reach.max()), 1 << int(max(layer.shift.max(), 0))))
    zero = str(points[-1][1].zero_point)
    tallies = [Tally(point, f"saturated{n}") for n, (_, point) in enumerate(points)]
    counted = []
    for n, (begin, point) in reversed(list(enumerate(points))):
        end = points[n + 1][0] if n + 1 < len(points) else layer.outputs
        if end < layer.outputs:
            zero = f"(j < {end} ? {point.zero_point} : {zero})"
        bounds = [f"j >= {begin}"] * (begin > 0) + [f"j < {end}"] * (end < layer.outputs)
        counted.append(tallies[n].count("code", " && ".join(bounds)))
    shift = memory.by_output(layer.shift, "j")
    out = memory.new(name, items)
    return Operation(
        note=f"dense {layer.name}: {layer.rows} x {layer.outputs}",
        items=items,
        body=joined(
            body,
            f"const int code = to_code<{kind}>(acc, {shift}, {zero});",
            f"{out}[i] = (u8)code;",
            *counted,
        ),
        reads=tuple(Read(product.source) for product in layer.products),
        writes=(name, *{write for tally in tallies for write in tally.writes}),
        own=True,
        before=joined(*(tally.before for tally in tallies)),
        after=joined(*(tally.after for tally in tallies)),
    )


def dense_scores(memory: Memory, layer: Dense) -> Operation:
    """Sums as they are, int32, into the value of the layer's name."""
    items = layer.rows * layer.outputs
    body, _ = sums(memory, layer)
    out = memory.new(layer.name, 4 * items)
    return Operation(
        note=f"scores {layer.name}: {layer.outputs}",
        items=items,
        body=joined(body, f"((int*){out})[i] = acc;"),
        reads=tuple(Read(product.source) for product in layer.products),
        writes=(layer.name,),
    )


def delay(memory: Memory, layer: Delay) -> list[Operation]:
    """Past steps out of the ring, all at once; then the present one, into the ring as well."""
    size = memory.graph.sizes[layer.source]
    columns, lags, slots = size // layer.rows, layer.lags, ring_slots(layer)
    if layer.state.input not in memory.state:  # two delays of one value may share a ring
        memory.state.add(layer.state.input, slots * size)
    ring = f"(state + {memory.state[layer.state.input]})"
    out = memory.new(layer.name, size * len(lags))

    def target(slot: str, element: str, width: int) -> str:
        if layer.by_row:
            within = f"{element} / {width} * {len(lags)}" if layer.rows > 1 else "0"
            return f"({within} + {slot}) * {width} + {element} % {width}"
        return f"{slot} * {width * layer.rows} + {element}"

    wide = columns % 4 == 0
    kind, unit = ("u32", 4) if wide else ("u8", 1)
    initial = int(layer.state.initial) * (0x01010101 if wide else 1)
    past = [(slot, lag) for slot, lag in enumerate(lags) if lag > 0]
    operations = []
    if past:
        count = size // unit
        index = "k" if len(past) > 1 else "0"
        slot = linear([slot for slot, _ in past], index)
        operations.append(
            Operation(
                note=f"delay {layer.name}: {len(past)} past steps of {layer.source}",
                items=len(past) * count,
                body=joined(
                    f"const int k = i / {count}, e = i % {count};"
                    if len(past) > 1
                    else "const int e = i;",
                    f"const u32 lag = {linear([lag for _, lag in past], index)};",
                    f"const {kind}* ring = (const {kind}*){ring};",
                    f"const u32 slot = (position - lag) & {slots - 1};",
                    f"(({kind}*){out})[{target(slot, 'e', columns // unit)}] ="
                    f" position >= lag ? ring[slot * {count} + e] : ({kind}){initial}u;",
                ),
                reads=(),
                writes=(layer.name,),
            )
        )
    now = [str(slot) for slot, lag in enumerate(lags) if lag == 0]
    operations.append(
        Operation(
            note=f"delay {layer.name}: the present step",
            items=size,
            body=joined(
                f"const u8 code = {memory.at(layer.source)}[i];",
                f"{ring}[(position & {slots - 1}) * {size} + i] = code;",
                *(f"{out}[{target(slot, 'i', columns)}] = code;" for slot in now),
            ),
            reads=(Read(layer.source, own=True),),
            writes=(layer.name,),
        )
    )
    return operations


def add(memory: Memory, layer: Add) -> Operation:
    """Sum of two values."""
    size = memory.graph.sizes[layer.name]
    bound = (CODE_MAX << layer.up_a) + (CODE_MAX << layer.up_b)
    kind = integer_type(bound, 1 << max(layer.shift, 0))
    tally = Tally(layer.point, "saturated")
    a, b = (
        f"(({kind}){memory.at(name)}[i] - {zero}) * (({kind})1 << {up})"
        for name, zero, up in (
            (layer.a, layer.zero_a, layer.up_a),
            (layer.b, layer.zero_b, layer.up_b),
        )
    )
    out = memory.new(layer.name, size)
    return Operation(
        note=f"add {layer.name}",
        items=size,
        body=joined(
            f"const {kind} acc = {a} + {b};",
            f"const int code = to_code<{kind}>(acc, {layer.shift}, {layer.point.zero_point});",
            f"{out}[i] = (u8)code;",
            tally.count("code"),
        ),
        reads=(Read(layer.a, own=True), Read(layer.b, own=True)),
        writes=(layer.name, *tally.writes),
        own=True,
        before=tally.before,
        after=tally.after,
    )


def table(memory: Memory, layer: Table) -> Operation:
    """Codes looked up."""
    size = memory.graph.sizes[layer.name]
    tally = Tally(layer.point, "saturated")
    entries = memory.weights(layer.entries)
    out = memory.new(layer.name, size)
    return Operation(
        note=f"table {layer.name}",
        items=size,
        body=joined(
            f"const int code = look_up({entries}, {memory.at(layer.source)}[i]);",
            f"{out}[i] = (u8)code;",
            tally.count("code"),
        ),
        reads=(Read(layer.source, own=True),),
        writes=(layer.name, *tally.writes),
        own=True,
        before=tally.before,
        after=tally.after,
    )


def maximum(memory: Memory, layer: Maximum) -> Operation:
    """Greatest code of each channel."""
    size = memory.graph.sizes[layer.name]
    source = memory.at(layer.source)
    return Operation(
        note=f"maximum {layer.name}: of {layer.rows} rows",
        items=size,
        body=joined(
            "int top = 0;",
            f"for (int row = 0; row < {layer.rows}; ++row)",
            f"    top = {source}[row * {size} + i] > top ? {source}[row * {size} + i] : top;",
            f"{memory.new(layer.name, size)}[i] = (u8)top;",
        ),
        reads=(Read(layer.source),),
        writes=(layer.name,),
        own=True,
    )


def columns(memory: Memory, layer: Columns) -> Operation:
    """Some columns of each row."""
    width = layer.stop - layer.start
    across = memory.graph.sizes[layer.source] // layer.rows
    source = memory.at(layer.source)
    out = memory.new(layer.name, layer.rows * width)
    return Operation(
        note=f"columns {layer.name}: {layer.start} to {layer.stop} of {across}",
        items=layer.rows * width,
        body=f"{out}[i] = {source}[i / {width} * {across} + {layer.start} + i % {width}];",
        reads=(Read(layer.source),),
        writes=(layer.name,),
        own=True,
    )


def concat(memory: Memory, layer: Concat) -> list[Operation]:
    """Values side by side, each put in its place by who made it."""
    sizes = [memory.graph.sizes[name] for name in layer.sources]
    across = sum(sizes) // layer.rows
    out = memory.new(layer.name, sum(sizes))
    operations, begin = [], 0
    for name, size in zip(layer.sources, sizes, strict=True):
        width = size // layer.rows
        operations.append(
            Operation(
                note=f"concat {layer.name}: {name}",
                items=size,
                body=f"{out}[i / {width} * {across} + {begin} + i % {width}] ="
                f" {memory.at(name)}[i];",
                reads=(Read(name, own=True),),
                writes=(layer.name,),
            )
        )
        begin += width
    return operations
