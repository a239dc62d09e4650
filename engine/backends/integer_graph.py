"""The integer graph: an `exact-int8` model as a few typed layers, from which every backend lowers.

It says in integers what the QDQ graph of the bundle says in float32: uint8 codes between layers,
int8 weights, int32 accumulators, shifts for scales. `engine.backends.lowering` reads it from the
ONNX file, `engine.backends.graph_reference` interprets it in numpy.

Values are uint8 codes ``q`` that stand for ``(q - zero_point) * 2**exponent``, kept as one row of
``size`` codes and named after the layer that makes them; the first is `INPUT`, the codes of the
model input. A value of several rows holds them one after the other.

=============  ==================================================================================
`Dense`        one or more products, added up; requantised, or the accumulators of the scores
`Delay`        a value as it was some steps ago, from a ring buffer; a conv1d is a `Dense` on it
`Add`          sum of two values
`Table`        each code looked up: LeakyReLU, other scales
`Maximum`      greatest code of each channel over some rows
`Columns`      some columns of a value
`Concat`       values side by side
`LstmCell`     with its hidden state in codes and its cell in integers
`GruCell`      with its state in integers
=============  ==================================================================================

Accumulators are requantised by one rule, `round_shift`: divided by a power of two, half to even.
A layer's products leave out the input's zero point: it is folded into the bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from engine.manifest import StateTensor

INPUT: Final = "x"
CODE_MAX: Final = 255
MAX_SHIFT: Final = 30  # more would give the same codes: accumulators are below 2**24
MIN_SHIFT: Final = -16  # likewise: any accumulator but 0 saturates
PRE_CLIP: Final = 512  # beyond it, a shift to the left saturates a code anyway


@dataclass(frozen=True)
class Point:
    """Where numbers become uint8 codes, and whether the value check counts saturated ones.

    Attributes
    ----------
    name : str
        Of the layer in the bundle's manifest and reports.
    exponent : int
        The scale is ``2**exponent``.
    zero_point : int
    group : int
        Index into `IntegerGraph.checks`; -1 where its codes are not counted.
    low, high : bool
        Whether a code of 0, and of 255, counts as saturated.
    """

    name: str
    exponent: int
    zero_point: int
    group: int = -1
    low: bool = False
    high: bool = False


@dataclass(frozen=True)
class CheckGroup:
    """Saturated codes that are counted together: more than ``limit`` of them set ``mask``."""

    mask: int
    limit: int


@dataclass(frozen=True, eq=False)
class Product:
    """``q weight' + bias`` on each row of a value.

    Attributes
    ----------
    source : str
        A value of ``rows * weight.shape[1]`` codes.
    weight : ndarray of int8, shape (outputs, inputs)
    bias : ndarray of int32, shape (outputs,)
        With what the source's zero point adds.
    up : ndarray of int32, shape (outputs,)
        How far its accumulators are shifted to the left before they are added to those of the
        layer's other products: 0 where there is only one.
    """

    source: str
    weight: np.ndarray = field(repr=False)
    bias: np.ndarray = field(repr=False)
    up: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class Dense:
    """``sum of products``, requantised: ``round_shift(acc, shift) + zero_point``, saturating.

    Attributes
    ----------
    name : str
    rows : int
    products : tuple of Product
        All of the same number of outputs.
    exponent : ndarray of int32, shape (outputs,)
        An accumulator of output ``j`` stands for ``acc * 2**exponent[j]``.
    point : Point or None
        None: these are the scores, and the accumulators leave as they are.
    shift : ndarray of int32, shape (outputs,)
        From `MIN_SHIFT` to `MAX_SHIFT`; to the left where negative.
    """

    name: str
    rows: int
    products: tuple[Product, ...]
    exponent: np.ndarray = field(repr=False)
    point: Point | None
    shift: np.ndarray = field(repr=False)

    @property
    def outputs(self) -> int:
        """Outputs of each row."""
        return len(self.exponent)


@dataclass(frozen=True, eq=False)
class Delay:
    """A value as it was ``lags`` steps ago: ``state`` keeps at least its last ``max(lags)`` steps.

    Several delays of one value may keep the same state.

    Attributes
    ----------
    name, source : str
    rows : int
        Of the source.
    lags : tuple of int
        In the order of the output; 0 is now.
    by_row : bool
        Whether each row has all its lags side by side; else all rows of a lag stand together.
    state : StateTensor
        Of shape (steps, ...), oldest first, as the bundle keeps it.
    """

    name: str
    source: str
    rows: int
    lags: tuple[int, ...]
    by_row: bool
    state: StateTensor

    @property
    def steps(self) -> int:
        """Steps that are remembered."""
        return self.state.shape[0]


@dataclass(frozen=True, eq=False)
class Add:
    """``((a - zero) << up_a) + ((b - zero) << up_b)``, requantised by ``shift``.

    Attributes
    ----------
    name, a, b : str
    zero_a, zero_b, up_a, up_b, shift : int
    point : Point
    """

    name: str
    a: str
    b: str
    zero_a: int
    zero_b: int
    up_a: int
    up_b: int
    shift: int
    point: Point


@dataclass(frozen=True, eq=False)
class Table:
    """``entries[q]``; ``point`` only where the value check counts its codes."""

    name: str
    source: str
    entries: np.ndarray = field(repr=False)
    point: Point | None = None


@dataclass(frozen=True)
class Maximum:
    """Greatest of ``rows`` rows, channel by channel."""

    name: str
    source: str
    rows: int


@dataclass(frozen=True)
class Columns:
    """Columns ``start`` to ``stop`` of each of ``rows`` rows."""

    name: str
    source: str
    rows: int
    start: int
    stop: int


@dataclass(frozen=True)
class Concat:
    """Values of ``rows`` rows each, side by side."""

    name: str
    sources: tuple[str, ...]
    rows: int


@dataclass(frozen=True, eq=False)
class LstmCell:
    """An LSTM cell of ``units``; outputs of `sums` are the gates i, f, o and the candidate g.

    In integers, for each unit, with codes of the state's last step where said::

        i, f, o = sigmoid[requantise(sums)], each minus gates_zero
        g       = tanh[requantise(sums)] minus candidate_zero
        c'      = clip(round_shift((f * c << up_kept) + (i * g << up_added), cell_shift), ±limit)
        s       = cell_tanh[requantise(c')] minus shown_zero
        h'      = round_shift(o * s, out_shift) + out.zero_point, saturating

    Attributes
    ----------
    name : str
    sums : Dense
        Without a point: of [x, h], 4 * units outputs; its ``shift`` requantises, by
        ``gates_in.zero_point`` up to output 3 * units, and by ``candidate_in.zero_point`` behind.
    hidden, cell : StateTensor
        uint8 codes and whole numbers. The source of the second product is ``hidden.input``.
    gates_in, candidate_in, shown_in, out : Point
        Where sums, c' and h' become codes.
    sigmoid, tanh, cell_tanh : ndarray of uint8, shape (256,)
    gates_zero, candidate_zero, shown_zero : int
    up_kept, up_added, cell_shift, shown_shift, out_shift, low, high : int
    """

    name: str
    sums: Dense
    hidden: StateTensor
    cell: StateTensor
    gates_in: Point
    candidate_in: Point
    shown_in: Point
    out: Point
    sigmoid: np.ndarray = field(repr=False)
    tanh: np.ndarray = field(repr=False)
    cell_tanh: np.ndarray = field(repr=False)
    gates_zero: int
    candidate_zero: int
    shown_zero: int
    up_kept: int
    up_added: int
    cell_shift: int
    shown_shift: int
    out_shift: int
    low: int
    high: int

    @property
    def units(self) -> int:
        """Hidden units."""
        return self.sums.outputs // 4


@dataclass(frozen=True, eq=False)
class GruCell:
    """A GRU cell of ``units``, reset after the product; gates r, z and the candidate n.

    In integers, for each unit::

        q       = round_shift(h, out_shift) + out.zero_point, saturating: what the products take
        r, z    = sigmoid[requantise(gates)], each minus gates_zero
        own     = requantise(new_h) minus its zero point, given = requantise(new_x) likewise
        n       = tanh[requantise((given << up_given) + (r * own << up_reset))] - candidate_zero
        total   = ((one - z) * n << up_added) + (z * h << up_kept)
        h'      = clip(round_shift(total, state_shift), low, high)
        output  = round_shift(h', out_shift) + out.zero_point, saturating

    Attributes
    ----------
    name : str
    gates : Dense
        Of [x, h], 2 * units outputs, requantised at its point.
    new_x, new_h : Dense
        Of x and of h alone, units outputs, requantised at their points.
    hidden : StateTensor
        Whole numbers. Products of h have ``hidden.input`` as source: the codes ``q``.
    candidate_in, out : Point
    sigmoid, tanh : ndarray of uint8, shape (256,)
    gates_zero, candidate_zero, one : int
        ``one`` is 1 in the unit of the gates.
    up_given, up_reset, candidate_shift, up_added, up_kept, state_shift, out_shift : int
    low, high : int
    """

    name: str
    gates: Dense
    new_x: Dense
    new_h: Dense
    hidden: StateTensor
    candidate_in: Point
    out: Point
    sigmoid: np.ndarray = field(repr=False)
    tanh: np.ndarray = field(repr=False)
    gates_zero: int
    candidate_zero: int
    one: int
    up_given: int
    up_reset: int
    candidate_shift: int
    up_added: int
    up_kept: int
    state_shift: int
    out_shift: int
    low: int
    high: int

    @property
    def units(self) -> int:
        """Hidden units."""
        return self.new_x.outputs


Layer = Dense | Delay | Add | Table | Maximum | Columns | Concat | LstmCell | GruCell


@dataclass(frozen=True, eq=False)
class IntegerGraph:
    """A model.

    Attributes
    ----------
    where : str
        The model's name, for errors.
    n_features : int
    point : Point
        Where the model input becomes codes.
    layers : tuple of Layer
        In an order of computing; the last one gives the output: the scores, or, in the front part
        of a model that is split, codes.
    sizes : dict of str to int
        Codes of each value, by name.
    state : tuple of StateTensor
        In the bundle's order.
    checks : tuple of CheckGroup
        Of the value check.
    input_limit : float
        An input beyond it, or NaN, sets `engine.trust.CHECK_INPUT`; infinite where the bundle has
        no value check (then nothing is ever set).
    """

    where: str
    n_features: int
    point: Point
    layers: tuple[Layer, ...]
    sizes: dict[str, int]
    state: tuple[StateTensor, ...]
    checks: tuple[CheckGroup, ...]
    input_limit: float

    @property
    def scores(self) -> Dense | None:
        """The last layer where it gives scores; None where it gives codes."""
        last = self.layers[-1]
        return last if isinstance(last, Dense) and last.point is None else None

    @property
    def n_outputs(self) -> int:
        """Number of scores, or of codes."""
        scores = self.scores
        return self.sizes[self.layers[-1].name] if scores is None else scores.outputs

    def quantise(self, x: np.ndarray) -> np.ndarray:
        """Codes of a model input: uint8 of the same shape; see `quantise_input`."""
        return quantise_input(x, self.point)

    def dequantise(self, acc: np.ndarray) -> np.ndarray:
        """Scores of int32 accumulators (…, classes): float32, exact."""
        assert self.scores is not None, "this part of a model gives codes"
        return np.ldexp(acc.astype(np.float32), self.scores.exponent)

    def products(self) -> Iterator[tuple[Dense, Product]]:
        """Every product with the layer that adds it up, cells' too."""
        for layer in self.layers:
            for dense in denses(layer):
                for product in dense.products:
                    yield dense, product

    @property
    def macs(self) -> int:
        """Multiplications of one inference."""
        return sum(dense.rows * product.weight.size for dense, product in self.products())

    @property
    def weight_bytes(self) -> int:
        """Size of weights, biases and tables."""
        tables = 0
        for layer in self.layers:
            tables += sum(array.nbytes for array in tables_of(layer))
        return tables + sum(p.weight.nbytes + p.bias.nbytes for _, p in self.products())


def denses(layer: Layer) -> tuple[Dense, ...]:
    """The sums of products in a layer."""
    if isinstance(layer, Dense):
        return (layer,)
    if isinstance(layer, LstmCell):
        return (layer.sums,)
    if isinstance(layer, GruCell):
        return (layer.gates, layer.new_x, layer.new_h)
    return ()


def tables_of(layer: Layer) -> tuple[np.ndarray, ...]:
    """The tables in a layer."""
    if isinstance(layer, Table):
        return (layer.entries,)
    if isinstance(layer, LstmCell):
        return (layer.sigmoid, layer.tanh, layer.cell_tanh)
    if isinstance(layer, GruCell):
        return (layer.sigmoid, layer.tanh)
    return ()


def round_shift(acc: np.ndarray, shift: np.ndarray | int) -> np.ndarray:
    """``acc / 2**shift`` as integers, half to even; the rule of every requantisation.

    ``(acc + 2**(shift - 1) - 1 + acc[shift]) >> shift`` where shift is positive; where it is
    negative, ``acc`` is held within `PRE_CLIP` and shifted to the left.

    Parameters
    ----------
    acc : ndarray of integers
    shift : ndarray of int or int
        Of ``acc``'s shape, or one that broadcasts to it; `MIN_SHIFT` to `MAX_SHIFT`.

    Returns
    -------
    ndarray of int64
    """
    acc, shift = np.asarray(acc, dtype=np.int64), np.asarray(shift, dtype=np.int64)
    right, left = np.maximum(shift, 0), np.maximum(-shift, 0)
    half = np.where(right > 0, (np.int64(1) << right >> 1) - 1 + (acc >> right & 1), 0)
    return np.where(left > 0, np.clip(acc, -PRE_CLIP, PRE_CLIP) << left, acc + half >> right)


def requantise(acc: np.ndarray, shift: np.ndarray | int, zero_point: int) -> np.ndarray:
    """uint8 codes of accumulators."""
    codes = round_shift(acc, shift) + zero_point
    return np.asarray(np.clip(codes, 0, CODE_MAX)).astype(np.uint8)


def quantise_input(x: np.ndarray, point: Point) -> np.ndarray:
    """QuantizeLinear of float32 at a power-of-two scale: half to even, saturating.

    NaN gets the lowest code, as on x86; the value check has seen it by then.
    """
    steps = np.rint(np.ldexp(x.astype(np.float64), -point.exponent)) + point.zero_point
    return np.asarray(np.nan_to_num(np.clip(steps, 0, CODE_MAX), nan=0.0)).astype(np.uint8)
