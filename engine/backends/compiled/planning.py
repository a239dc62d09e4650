"""From an integer graph to its plan: where everything lies in memory.

Weights are packed by blocks of `Isa.lanes` outputs: for each group of `Isa.group` inputs one
vector, in which each output's weights of the group lie side by side.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from engine.backends.compiled.isa import Isa
from engine.backends.compiled.plan import (
    MAX_BLOCKS,
    AccumulatorsStep,
    AddStep,
    CodesStep,
    CopyStep,
    Count,
    DelayStep,
    DenseStep,
    Dot,
    GruStep,
    LoadStep,
    LstmStep,
    MaximumStep,
    Place,
    Plan,
    QuantiseStep,
    Rescale,
    ScoresStep,
    Step,
    TableStep,
)
from engine.backends.integer_graph import (
    INPUT,
    Add,
    Columns,
    Concat,
    Delay,
    Dense,
    GruCell,
    IntegerGraph,
    Layer,
    LstmCell,
    Maximum,
    Point,
    Product,
    Table,
    requantise,
)
from engine.backends.native_call import ALIGNMENT, aligned, aligned_bytes
from feeds.errors import InputError

PADDING: Final = 64  # behind each block: vectors may reach over its end
MAX_ARENA_BYTES: Final = 1 << 30


class Block:
    """Memory that grows while a plan is made."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, np.ndarray]] = []
        self.size = 0

    def put(self, array: np.ndarray) -> int:
        """Room for an array, with its content; its offset."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        offset = self.reserve(len(data))
        self._parts.append((offset, data))
        return offset

    def reserve(self, n_bytes: int) -> int:
        """Room for so many bytes, zero at first; their offset."""
        offset = self.size
        self.size += aligned(n_bytes + PADDING)
        if self.size > MAX_ARENA_BYTES:
            raise InputError(
                "the model is too large for the compiled backend",
                where="model.backend",
                expected=f"at most {MAX_ARENA_BYTES} bytes of weights and values",
                found=f"more than {offset}",
                fix="use the onnx backend",
            )
        return offset

    def content(self) -> np.ndarray:
        """The block, uint8, aligned."""
        block = aligned_bytes(max(self.size, ALIGNMENT))
        for offset, data in self._parts:
            block[offset : offset + len(data)] = data
        return block


def pack_weights(weight: np.ndarray, isa: Isa) -> np.ndarray:
    """int8 weights (outputs, inputs), zeros at their ends, in the order in which they are read.

    Of every `MAX_BLOCKS` blocks, group after group, block after block: (groups, blocks, lanes,
    group).
    """
    outputs, inputs = weight.shape
    blocks, groups = -(-outputs // isa.lanes), -(-inputs // isa.group)
    padded = np.zeros((blocks * isa.lanes, groups * isa.group), dtype=np.int8)
    padded[:outputs, :inputs] = weight
    split = padded.reshape(blocks, isa.lanes, groups, isa.group).transpose(2, 0, 1, 3)
    parts = [split[:, at : at + MAX_BLOCKS].reshape(-1) for at in range(0, blocks, MAX_BLOCKS)]
    return np.concatenate(parts)


class Planner:
    """Makes the plan of one graph.

    Attributes
    ----------
    plan : Plan
    arena, state : ndarray of uint8
        The arena, and the state of a fresh stream.
    """

    def __init__(self, graph: IntegerGraph, isa: Isa, *, from_codes: bool) -> None:
        self._isa = isa
        self._arena, self._state = Block(), Block()
        self._places: dict[str, Place] = {}
        self._steps: list[Step] = []
        checks = [(group.limit, group.mask) for group in graph.checks]
        table = np.array(checks, dtype=np.uint32).reshape(-1, 2)
        offset = self._arena.put(table)
        self._read_input(graph, from_codes)
        for layer in graph.layers:
            self._read(layer, graph)
        self._write_output(graph, from_codes)
        checked = bool(np.isfinite(graph.input_limit)) and not from_codes
        self.plan = Plan(isa, tuple(self._steps), len(graph.checks), offset, checked)
        self.arena, self.state = self._arena.content(), self._state.content()

    def _read_input(self, graph: IntegerGraph, from_codes: bool) -> None:
        n, point = graph.n_features, graph.point
        out = self._value(INPUT, n)
        if from_codes:
            self._steps.append(LoadStep(n, out))
            return
        self._steps.append(
            QuantiseStep(
                n,
                self._arena.put(np.full(1, np.ldexp(1.0, -point.exponent), np.float32)),
                self._arena.put(np.full(1, point.zero_point, np.int32)),
                self._arena.put(np.full(1, graph.input_limit, np.float32)),
                out,
            )
        )

    def _write_output(self, graph: IntegerGraph, from_codes: bool) -> None:
        n = graph.n_outputs
        if graph.scores is None:
            self._steps.append(CodesStep(n, self._places[graph.layers[-1].name]))
            return
        last = self._steps[-1]
        assert isinstance(last, DenseStep)
        if from_codes:
            self._steps.append(AccumulatorsStep(n, last.out))
        else:
            scale = np.ldexp(np.float32(1.0), graph.scores.exponent).astype(np.float32)
            self._steps.append(ScoresStep(n, last.out, self._vector(scale)))

    def _value(self, name: str, size: int) -> int:
        offset = self._arena.reserve(size)
        self._places[name] = Place("arena", offset)
        return offset

    def _vector(self, values: np.ndarray) -> int:
        """A vector with zeros up to whole lanes, and lanes of the widest set to spare."""
        return self._arena.put(np.concatenate([values, np.zeros(16, values.dtype)]))

    def _count(self, point: Point | None) -> Count | None:
        if point is None or point.group < 0:
            return None
        return Count(point.group, point.low, point.high)

    def _rescale(
        self, shift: np.ndarray | int, n: int, zero: np.ndarray | int, point: Point | None
    ) -> Rescale:
        shifts = np.broadcast_to(np.asarray(shift, dtype=np.int32), n)
        right, left = np.maximum(shifts, 0), np.maximum(-shifts, 0)
        half = np.where(right > 0, (1 << np.maximum(right, 1) >> 1) - 1, 0)
        zeros = np.broadcast_to(np.asarray(zero, dtype=np.int32), n)
        return Rescale(
            self._vector(right.astype(np.int32)),
            self._vector(half.astype(np.int32)),
            self._vector((right > 0).astype(np.int32)),
            self._vector(left.astype(np.int32)) if left.any() else -1,
            self._vector(zeros),
            self._count(point),
        )

    def _dot(self, product: Product, rows: slice = slice(None)) -> Dot:
        weight = product.weight[rows]
        packed = pack_weights(weight, self._isa)
        source, groups = self._places[product.source], -(-weight.shape[1] // self._isa.group)
        return Dot(source, weight.shape[1], groups, self._arena.put(packed))

    def _dense(
        self, layer: Dense, rescale: Rescale | None, out: int, chosen: slice = slice(None)
    ) -> None:
        dots = tuple(self._dot(product, chosen) for product in layer.products)
        bias = [product.bias[chosen].astype(np.int32) for product in layer.products]
        up: tuple[int, ...] = ()
        if any(product.up[chosen].any() for product in layer.products):
            up = tuple(self._vector(product.up[chosen]) for product in layer.products)
        else:
            bias = [np.sum(bias, axis=0, dtype=np.int32)]
        offsets = tuple(self._vector(values) for values in bias)
        outputs = len(layer.exponent[chosen])
        self._steps.append(DenseStep(layer.rows, outputs, dots, offsets, up, rescale, out))

    def _read(self, layer: Layer, graph: IntegerGraph) -> None:
        if isinstance(layer, Dense):
            n = layer.outputs
            if layer.point is None:
                # A device that is asked for accumulators reads them where they are.
                out = self._arena.reserve(4 * n)
                self._places[layer.name] = Place("arena", out)
                self._dense(layer, None, out)
                return
            rescale = self._rescale(layer.shift, n, layer.point.zero_point, layer.point)
            self._dense(layer, rescale, self._value(layer.name, graph.sizes[layer.name]))
        elif isinstance(layer, Delay):
            self._delay(layer, graph)
        elif isinstance(layer, Add):
            self._add(layer, graph)
        elif isinstance(layer, Table):
            n = graph.sizes[layer.name]
            source, entries = self._places[layer.source], self._arena.put(layer.entries)
            out = self._value(layer.name, n)
            self._steps.append(TableStep(n, source, entries, self._count(layer.point), out))
        elif isinstance(layer, Maximum):
            n = graph.sizes[layer.name]
            source, out = self._places[layer.source], self._value(layer.name, n)
            self._steps.append(MaximumStep(layer.rows, n, source, out))
        elif isinstance(layer, Columns):
            self._columns(layer, graph)
        elif isinstance(layer, Concat):
            self._concat(layer, graph)
        elif isinstance(layer, LstmCell):
            self._lstm(layer)
        else:
            assert isinstance(layer, GruCell)
            self._gru(layer)

    def _delay(self, layer: Delay, graph: IntegerGraph) -> None:
        size = graph.sizes[layer.source]
        position = self._state.put(np.zeros(1, dtype=np.int32))
        ring = np.full(layer.steps * size, int(layer.state.initial), dtype=np.uint8)
        source = self._places[layer.source]
        self._steps.append(
            DelayStep(
                source,
                layer.rows,
                size // layer.rows,
                layer.steps,
                layer.lags,
                layer.by_row,
                position,
                self._state.put(ring),
                self._value(layer.name, graph.sizes[layer.name]),
            )
        )

    def _add(self, layer: Add, graph: IntegerGraph) -> None:
        n = graph.sizes[layer.name]
        parameters = [layer.zero_a, layer.up_a, layer.zero_b, layer.up_b]
        rescale = self._rescale(layer.shift, n, layer.point.zero_point, layer.point)
        self._steps.append(
            AddStep(
                n,
                self._places[layer.a],
                self._places[layer.b],
                self._arena.put(np.array(parameters, dtype=np.int32)),
                rescale,
                self._value(layer.name, n),
            )
        )

    def _columns(self, layer: Columns, graph: IntegerGraph) -> None:
        source, width = self._places[layer.source], graph.sizes[layer.source] // layer.rows
        kept = layer.stop - layer.start
        start = Place(source.region, source.offset + layer.start)
        if layer.rows == 1:
            self._places[layer.name] = start
            return
        out = self._value(layer.name, layer.rows * kept)
        self._steps.append(CopyStep(layer.rows, kept, start, width, out, kept))

    def _concat(self, layer: Concat, graph: IntegerGraph) -> None:
        widths = [graph.sizes[name] // layer.rows for name in layer.sources]
        out, total, at = self._value(layer.name, graph.sizes[layer.name]), sum(widths), 0
        for name, width in zip(layer.sources, widths, strict=True):
            source = self._places[name]
            self._steps.append(CopyStep(layer.rows, width, source, width, out + at, total))
            at += width

    def _looked_up(self, codes: int, n: int, entries: np.ndarray) -> None:
        """Codes replaced by what a table says of them."""
        place = Place("arena", codes)
        self._steps.append(TableStep(n, place, self._arena.put(entries), None, codes))

    def _lstm(self, cell: LstmCell) -> None:
        units, sums = cell.units, cell.sums
        hidden = self._state.put(np.full(units, int(cell.hidden.initial), dtype=np.uint8))
        memory = self._state.put(np.full(units, int(cell.cell.initial), dtype=np.int32))
        self._places[cell.hidden.input] = Place("state", hidden)
        codes = []
        for chosen, point, entries in (
            (slice(0, 3 * units), cell.gates_in, cell.sigmoid),
            (slice(3 * units, 4 * units), cell.candidate_in, cell.tanh),
        ):
            n = len(sums.exponent[chosen])
            codes.append(self._arena.reserve(n))
            rescale = self._rescale(sums.shift[chosen], n, point.zero_point, point)
            self._dense(sums, rescale, codes[-1], chosen)
            self._looked_up(codes[-1], n, entries)
        parameters = [cell.gates_zero, cell.candidate_zero, cell.shown_zero]
        parameters += [cell.up_kept, cell.up_added, cell.low, cell.high]
        self._steps.append(
            LstmStep(
                units,
                codes[0],
                codes[1],
                self._arena.reserve(units),
                self._arena.put(np.array(parameters, dtype=np.int32)),
                memory,
                self._rescale(cell.cell_shift, units, 0, None),
                self._rescale(cell.shown_shift, units, cell.shown_in.zero_point, cell.shown_in),
                self._arena.put(cell.cell_tanh),
                self._rescale(cell.out_shift, units, cell.out.zero_point, cell.out),
                hidden,
            )
        )
        self._places[cell.name] = Place("state", hidden)

    def _gru(self, cell: GruCell) -> None:
        units = cell.units
        zero = cell.out.zero_point
        start = np.full(units, int(cell.hidden.initial))
        hidden = self._state.put(requantise(start, cell.out_shift, zero))
        wide = self._state.put(start.astype(np.int32))
        self._places[cell.hidden.input] = Place("state", hidden)
        codes = []
        for dense in (cell.gates, cell.new_h, cell.new_x):
            assert dense.point is not None
            codes.append(self._arena.reserve(dense.outputs))
            point, n = dense.point, dense.outputs
            rescale = self._rescale(dense.shift, n, point.zero_point, point)
            self._dense(dense, rescale, codes[-1])
        self._looked_up(codes[0], 2 * units, cell.sigmoid)
        assert cell.new_h.point is not None
        assert cell.new_x.point is not None
        parameters = [cell.gates_zero, cell.candidate_zero]
        parameters += [cell.new_h.point.zero_point, cell.new_x.point.zero_point, cell.one]
        parameters += [cell.up_given, cell.up_reset, cell.up_added, cell.up_kept]
        parameters += [cell.low, cell.high]
        inner = cell.candidate_in
        self._steps.append(
            GruStep(
                units,
                codes[0],
                codes[1],
                codes[2],
                self._arena.reserve(units),
                self._arena.put(np.array(parameters, dtype=np.int32)),
                self._rescale(cell.candidate_shift, units, inner.zero_point, inner),
                self._arena.put(cell.tanh),
                wide,
                self._rescale(cell.state_shift, units, 0, None),
                self._rescale(cell.out_shift, units, zero, cell.out),
                hidden,
            )
        )
        self._places[cell.name] = Place("state", hidden)
