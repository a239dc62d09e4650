"""The MAC engine: sums of products on time-multiplexed lanes, for dense layers, conv1d and cells.

It has ``inputs * outputs`` lanes: in each step every one of ``outputs`` sums takes ``inputs`` more
products, through a tree of adders. A step passes these registers, `Sums.latency` in all::

    weight ROM, weight, (operands, product) in the lane, [product], tree ..., accumulator, code

Where the lanes take all outputs at once, a source may come beat by beat, each used as it arrives.
Otherwise the outputs are computed group by group, and the sources must be there as a whole. Layers
that alternate between the two overlap: one brings few codes a cycle, the next one takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.backends.fpga.rtl_library import LOOKAHEAD, MULT_CYCLES, REQUANTISE_CYCLES
from engine.backends.fpga.rtl_value import Lanes, Value
from engine.backends.integer_graph import CODE_MAX, Dense

WEIGHT_BITS: Final = 8
OPERAND_BITS: Final = 9  # a code with a sign
PRODUCT_BITS: Final = 16  # 255 * -128 still fits
OPERAND_AT: Final = LOOKAHEAD  # cycles after its issue, a step's codes and weights are there
PRODUCT_AT: Final = OPERAND_AT + MULT_CYCLES  # likewise, its products
PAD_SHIFT: Final = 14
PAD_CODE: Final = 128  # of rows that only fill a group: neither end


@dataclass(frozen=True)
class Shape:
    """As much of rows as it takes to plan them.

    Attributes
    ----------
    rows : int
    align : bool
        Whether sources are shifted to the left, each by its own number of bits.
    codes : bool
        Whether codes leave, not sums.
    """

    rows: int
    align: bool
    codes: bool


@dataclass(frozen=True, eq=False)
class Rows:
    """What a MAC engine computes, row by row: ``(sum of products << up) + bias``, requantised.

    Attributes
    ----------
    weights : tuple of ndarray of int8, shape (rows, inputs)
        One for each source.
    ups : tuple of ndarray of int, shape (rows,)
    bias : ndarray of int64, shape (rows,)
    shift, zero : ndarray of int, shape (rows,)
        Both empty where the sums leave as they are.
    """

    weights: tuple[np.ndarray, ...]
    ups: tuple[np.ndarray, ...]
    bias: np.ndarray
    shift: np.ndarray
    zero: np.ndarray

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.bias)

    @property
    def codes(self) -> bool:
        """Whether codes leave, not sums."""
        return len(self.shift) > 0

    def bound(self) -> int:
        """Greatest magnitude of any sum on its way."""
        total = np.abs(self.bias.astype(np.int64))
        for weight, up in zip(self.weights, self.ups, strict=True):
            total = total + (CODE_MAX * np.abs(weight.astype(np.int64)).sum(axis=1) << up)
        return int(total.max())

    def padded(self, size: int) -> Rows:
        """With rows of no weight behind, whose codes are `PAD_CODE` and saturate nothing."""
        more = size - self.size
        if more == 0:
            return self
        shift = np.concatenate([self.shift, np.repeat(self.shift[-1:], more)])
        zero = np.concatenate([self.zero, np.repeat(self.zero[-1:], more)])
        fill = 0
        if self.codes:
            by = min(max(int(shift[-1]), 0), PAD_SHIFT)
            shift[self.size :] = by
            fill = PAD_CODE - int(zero[-1]) << by
        return Rows(
            tuple(np.pad(weight, ((0, more), (0, 0))) for weight in self.weights),
            tuple(np.pad(up, (0, more)) for up in self.ups),
            np.concatenate([self.bias, np.full(more, fill)]),
            shift if self.codes else self.shift,
            zero if self.codes else self.zero,
        )

    def chosen(self, order: np.ndarray) -> Rows:
        """Some rows, in an order."""
        return Rows(
            tuple(weight[order] for weight in self.weights),
            tuple(up[order] for up in self.ups),
            self.bias[order],
            self.shift[order] if self.codes else self.shift,
            self.zero[order] if self.codes else self.zero,
        )


def rows_of(layer: Dense, zero: np.ndarray | None = None) -> Rows:
    """A dense layer's rows; ``zero`` where they are requantised without a point of the layer's."""
    none = np.zeros(0, dtype=np.int64)
    if zero is None and layer.point is not None:
        zero = np.full(layer.outputs, layer.point.zero_point)
    bias = sum(p.bias.astype(np.int64) << p.up.astype(np.int64) for p in layer.products)
    return Rows(
        tuple(product.weight for product in layer.products),
        tuple(product.up.astype(np.int64) for product in layer.products),
        np.asarray(bias, dtype=np.int64),
        none if zero is None else layer.shift.astype(np.int64),
        none if zero is None else zero.astype(np.int64),
    )


@dataclass(frozen=True)
class Sums:
    """How an engine goes through its rows.

    Attributes
    ----------
    lanes : Lanes
    rows, groups : int
        A group's rows are summed up together.
    slices : tuple of int
        Steps that each source takes in a group.
    chosen : tuple of bool
        Whether a source's slices are chosen from the whole of it, one cycle after it is there.
    starts : tuple of int
        Cycle of each source's first step.
    complete : int
        Cycle of the first group's last step.
    waits : tuple of int
        Cycles that each source waits for, beyond what it takes to choose.
    levels : int
        Of the adder tree.
    biased : int
        Level at which the bias is added; -1 where that takes an adder of its own.
    align : bool
        Whether sources are shifted to the left by `Rows.ups`.
    codes : bool
    """

    lanes: Lanes
    rows: int
    groups: int
    slices: tuple[int, ...]
    chosen: tuple[bool, ...]
    starts: tuple[int, ...]
    complete: int
    waits: tuple[int, ...]
    levels: int
    biased: int
    align: bool
    codes: bool

    @property
    def group_steps(self) -> int:
        """Steps of one group."""
        return sum(self.slices)

    @property
    def steps(self) -> int:
        """Steps of one inference."""
        return self.groups * self.group_steps

    @property
    def tree_at(self) -> int:
        """Cycles after its issue, a step's products are at the tree.

        Multiplier blocks lie far from it: there is one more register between them.
        """
        return PRODUCT_AT + (self.lanes.dsp > 0)

    @property
    def root_at(self) -> int:
        """Cycles after its issue, a step's tree is added up."""
        return self.tree_at + self.levels

    @property
    def total_at(self) -> int:
        """Cycles after its last step's issue, a group's sums are there."""
        return self.root_at + self.align + (self.biased < 0)

    @property
    def latency(self) -> int:
        """Cycles after its last step's issue, a group's codes are there, or its sums."""
        return self.total_at + (REQUANTISE_CYCLES if self.codes else 0)

    def result(self, name: str, signal: str, bits: int) -> Value:
        """The value that comes out."""
        return Value(
            name=name,
            signal=signal,
            size=self.rows,
            bits=bits,
            beat=self.lanes.outputs,
            ahead=self.complete + self.latency - LOOKAHEAD,
            interval=self.group_steps if self.groups > 1 else 1,
        )


def tree_counts(inputs: int) -> list[int]:
    """Terms at each level of an adder tree, from all to one."""
    counts = [inputs]
    while counts[-1] > 1:
        counts.append((counts[-1] + 1) // 2)
    return counts


def takes_beats(value: Value, rows: int, lanes: Lanes) -> bool:
    """Whether an engine of these lanes can use a source's beats as they arrive."""
    return lanes.outputs >= rows and value.beat == lanes.inputs and not value.whole


def plan_sums(shape: Shape, sources: Sequence[Value], lanes: Lanes) -> Sums | None:
    """How lanes go through rows, and when.

    Every source is whole, but for one that `takes_beats`. None where that one's beats come before
    the lanes are done with the sources in front of it.
    """
    widest = max(source.size for source in sources)
    inputs, outputs = min(lanes.inputs, widest), min(lanes.outputs, shape.rows)
    lanes = Lanes(inputs, outputs, min(lanes.dsp, inputs * outputs))
    groups = -(-shape.rows // lanes.outputs)
    slices = tuple(-(-source.size // lanes.inputs) for source in sources)
    counts = tree_counts(lanes.inputs)
    odd = [level for level, count in enumerate(counts) if count % 2 and count > 1]
    biased = odd[-1] if odd and sum(slices) == 1 else -1
    if groups > 1:
        choose = sum(slices) > 1
        start = max(source.ahead for source in sources) + choose
        chosen, starts = (choose,) * len(sources), (start,) * len(sources)
        waits = (0,) * len(sources)
        complete = start + sum(slices) - 1
    else:
        chosen = tuple(n > 1 and s.whole for n, s in zip(slices, sources, strict=True))
        free, begun, waited = -(10**9), [], []
        for source, count, choose in zip(sources, slices, chosen, strict=True):
            earliest = source.ahead + choose
            start = max(earliest, free)
            if start > earliest and not source.whole:
                return None
            begun.append(start)
            waited.append(start - earliest)
            free = start + (count if source.whole else (count - 1) * source.interval + 1)
        starts, waits, complete = tuple(begun), tuple(waited), free - 1
    return Sums(
        lanes=lanes,
        rows=shape.rows,
        groups=groups,
        slices=slices,
        chosen=chosen,
        starts=starts,
        complete=complete,
        waits=waits,
        levels=len(counts) - 1,
        biased=biased,
        align=shape.align,
        codes=shape.codes,
    )
