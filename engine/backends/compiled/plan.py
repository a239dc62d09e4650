"""The operations of one step over memory: sizes and offsets, and nothing else.

One block of memory, the **arena**, holds weights, parameters, tables and the values between
layers; another, one for each stream, holds its state (`engine.backends.compiled.planning` fills
both). Two models of one shape have the same plan, so that the code compiled for one
(`engine.backends.compiled.emission`) serves the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from engine.backends.compiled.isa import Isa

MAX_BLOCKS: Final = 8  # of outputs that are accumulated side by side

Region = Literal["arena", "state"]


@dataclass(frozen=True)
class Place:
    """An offset in one of both blocks."""

    region: Region
    offset: int


@dataclass(frozen=True)
class Count:
    """A point's part in the value check."""

    group: int
    low: bool
    high: bool


@dataclass(frozen=True)
class Rescale:
    """How accumulators become codes: offsets of int32 vectors, one element an output.

    ``codes = ((hold(acc) << left) + half + (acc >> shift & odd)) >> shift + zero``; ``left`` is -1
    where no output is shifted to the left.
    """

    shift: int
    half: int
    odd: int
    left: int
    zero: int
    count: Count | None


@dataclass(frozen=True)
class Dot:
    """One product: ``groups`` of inputs from a place, and its packed weights."""

    source: Place
    row_bytes: int
    groups: int
    weight: int


@dataclass(frozen=True)
class QuantiseStep:
    """The model input becomes codes; its limit is checked."""

    n: int
    steps_per_unit: int
    zero: int
    limit: int
    out: int


@dataclass(frozen=True)
class LoadStep:
    """The model input is codes already."""

    n: int
    out: int


@dataclass(frozen=True)
class DenseStep:
    """Sums of products; requantised, or out of the graph.

    Attributes
    ----------
    rows, outputs : int
    dots : tuple of Dot
    bias : tuple of int
        One for all dots together, or one for each where ``up`` is given.
    up : tuple of int
        Offsets of shifts to the left, one for each dot; empty where all are 0.
    rescale : Rescale or None
    out : int
        Codes, or int32 accumulators.
    """

    rows: int
    outputs: int
    dots: tuple[Dot, ...]
    bias: tuple[int, ...]
    up: tuple[int, ...]
    rescale: Rescale | None
    out: int


@dataclass(frozen=True)
class DelayStep:
    """A ring of ``steps`` values in the state, behind the position of the oldest (int32)."""

    source: Place
    rows: int
    row_bytes: int
    steps: int
    lags: tuple[int, ...]
    by_row: bool
    position: int
    ring: int
    out: int


@dataclass(frozen=True)
class AddStep:
    """Two values; ``parameters`` are six int32: zero_a, up_a, zero_b, up_b, and two to spare."""

    n: int
    a: Place
    b: Place
    parameters: int
    rescale: Rescale
    out: int


@dataclass(frozen=True)
class TableStep:
    """Each code looked up."""

    n: int
    source: Place
    entries: int
    count: Count | None
    out: int


@dataclass(frozen=True)
class MaximumStep:
    """Greatest of rows."""

    rows: int
    row_bytes: int
    source: Place
    out: int


@dataclass(frozen=True)
class CopyStep:
    """``row_bytes`` of each row from one place to another."""

    rows: int
    row_bytes: int
    source: Place
    source_stride: int
    out: int
    out_stride: int


@dataclass(frozen=True)
class LstmStep:
    """What follows the sums of an LSTM cell.

    ``gates`` are codes behind their table (3 * units: i, f, o), ``fresh`` likewise; ``scratch`` has
    room for ``units`` codes. ``parameters``: gates_zero, candidate_zero, shown_zero, up_kept,
    up_added, low, high.
    """

    units: int
    gates: int
    fresh: int
    scratch: int
    parameters: int
    cell: int
    cell_rescale: Rescale
    shown: Rescale
    entries: int
    out_rescale: Rescale
    hidden: int


@dataclass(frozen=True)
class GruStep:
    """What follows the reset gate's table of a GRU cell.

    ``parameters``: gates_zero, candidate_zero, own_zero, given_zero, one, up_given, up_reset,
    up_added, up_kept, low, high.
    """

    units: int
    gates: int
    own: int
    given: int
    scratch: int
    parameters: int
    candidate: Rescale
    entries: int
    state: int
    state_rescale: Rescale
    out_rescale: Rescale
    hidden: int


@dataclass(frozen=True)
class ScoresStep:
    """Accumulators leave as float32, times their scales."""

    n: int
    acc: int
    scale: int


@dataclass(frozen=True)
class AccumulatorsStep:
    """Accumulators leave as they are."""

    n: int
    acc: int


@dataclass(frozen=True)
class CodesStep:
    """Codes leave as int32, from a graph that is the front of a split one."""

    n: int
    source: Place


Step = (
    QuantiseStep
    | LoadStep
    | DenseStep
    | DelayStep
    | AddStep
    | TableStep
    | MaximumStep
    | CopyStep
    | LstmStep
    | GruStep
    | ScoresStep
    | AccumulatorsStep
    | CodesStep
)


@dataclass(frozen=True)
class Plan:
    """One graph for one instruction set; its text names the code that is compiled for it.

    Attributes
    ----------
    isa : Isa
    steps : tuple of Step
    groups : int
        Of the value check.
    checks : int
        Offset of their limits and masks: two int32 a group.
    checked : bool
        Whether the input's limit is looked at.
    """

    isa: Isa
    steps: tuple[Step, ...]
    groups: int
    checks: int
    checked: bool
