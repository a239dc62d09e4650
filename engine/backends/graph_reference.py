"""The integer graph, interpreted in numpy: the specification of every backend that lowers from it.

Each layer is a function of codes, written as `engine.backends.integer_graph` says it. Nothing here
is fast; everything is meant to be read.
"""

from __future__ import annotations

import numpy as np

from engine.backends.check_groups import input_mask
from engine.backends.integer_graph import (
    CODE_MAX,
    INPUT,
    Add,
    Columns,
    Concat,
    Delay,
    Dense,
    GruCell,
    IntegerGraph,
    LstmCell,
    Maximum,
    Point,
    Table,
    requantise,
    round_shift,
)

Values = dict[str, np.ndarray]


class GraphReference:
    """One graph and one stream of it.

    Parameters
    ----------
    graph : IntegerGraph

    Attributes
    ----------
    state : dict of str to ndarray
        What the next step reads, by the graph input's name, as the bundle keeps it.
    values : dict of str to ndarray of uint8
        All values of the last step, by name.
    counts : ndarray of int64
        Saturated codes of the last step, by group of the value check.
    """

    def __init__(self, graph: IntegerGraph) -> None:
        self._graph = graph
        self.state: Values = {}
        self.values: Values = {}
        self.counts = np.zeros(len(graph.checks), dtype=np.int64)
        self.reset()

    def reset(self) -> None:
        """Start the stream afresh."""
        self.state = {tensor.input: tensor.fresh() for tensor in self._graph.state}

    def step(self, x: np.ndarray) -> tuple[np.ndarray, int]:
        """One inference.

        Parameters
        ----------
        x : ndarray of float32, shape (features,) or (1, features)

        Returns
        -------
        scores : ndarray of float32, shape (classes,)
        violations : int
            The mask of the value check.
        """
        x = np.asarray(x, dtype=np.float32).reshape(self._graph.n_features)
        acc, mask = self.step_codes(self._graph.quantise(x))
        return self._graph.dequantise(acc), mask | input_mask(x, self._graph.input_limit)

    def step_codes(self, codes: np.ndarray) -> tuple[np.ndarray, int]:
        """One inference between the quantised input and the accumulators of the scores.

        Parameters
        ----------
        codes : ndarray of uint8, shape (features,)

        Returns
        -------
        out : ndarray of int32, shape (outputs,)
            Accumulators of the scores; codes, where the graph ends in codes.
        violations : int
            Without the check of the input.
        """
        self.values = {INPUT: codes}
        self.counts[:] = 0
        after: Values = {}
        acc = np.zeros(0, dtype=np.int64)
        for layer in self._graph.layers:
            if isinstance(layer, Dense):
                acc = self._sums(layer)
                if layer.point is not None:
                    out = requantise(acc, layer.shift, layer.point.zero_point)
                    self._keep(layer.name, out, layer.point)
            elif isinstance(layer, Delay):
                self._delay(layer, after)
            elif isinstance(layer, Add):
                self._add(layer)
            elif isinstance(layer, Table):
                self._keep(layer.name, layer.entries[self.values[layer.source]], layer.point)
            elif isinstance(layer, Maximum):
                rows = self.values[layer.source].reshape(layer.rows, -1)
                self._keep(layer.name, rows.max(axis=0), None)
            elif isinstance(layer, Columns):
                rows = self.values[layer.source].reshape(layer.rows, -1)
                self._keep(layer.name, rows[:, layer.start : layer.stop], None)
            elif isinstance(layer, Concat):
                parts = [self.values[name].reshape(layer.rows, -1) for name in layer.sources]
                self._keep(layer.name, np.concatenate(parts, axis=1), None)
            elif isinstance(layer, LstmCell):
                self._lstm(layer, after)
            else:
                self._gru(layer, after)
        self.state.update(after)
        if self._graph.scores is None:
            acc = self.values[self._graph.layers[-1].name]
        return acc.reshape(-1).astype(np.int32), self._violations()

    def _sums(self, layer: Dense) -> np.ndarray:
        """Accumulators, int64 of shape (rows, outputs)."""
        total = np.zeros((layer.rows, layer.outputs), dtype=np.int64)
        for product in layer.products:
            q = self.values[product.source].reshape(layer.rows, -1).astype(np.int64)
            total += (q @ product.weight.T.astype(np.int64) + product.bias) << product.up
        return total

    def _keep(self, name: str, codes: np.ndarray, point: Point | None) -> np.ndarray:
        """Name a value, and count its saturated codes where the value check does."""
        self.values[name] = codes.reshape(-1).astype(np.uint8)
        if point is not None and point.group >= 0:
            saturated = int((codes == 0).sum()) if point.low else 0
            saturated += int((codes == CODE_MAX).sum()) if point.high else 0
            self.counts[point.group] += saturated
        return self.values[name]

    def _codes(self, acc: np.ndarray, shift: np.ndarray | int, point: Point) -> np.ndarray:
        """Accumulators as codes of a point inside a cell, int64."""
        codes = requantise(acc, shift, point.zero_point)
        return self._keep(point.name, codes, point).astype(np.int64)

    def _violations(self) -> int:
        mask = 0
        for group, count in zip(self._graph.checks, self.counts, strict=True):
            mask |= group.mask if count > group.limit else 0
        return mask

    def _delay(self, layer: Delay, after: Values) -> None:
        now = self.values[layer.source].reshape(layer.rows, -1)
        past = self.state[layer.state.input].reshape(layer.steps, *now.shape)
        whole = np.concatenate([past, now[None]])  # oldest first
        lagged = whole[[layer.steps - lag for lag in layer.lags]]
        self._keep(layer.name, lagged.transpose(1, 0, 2) if layer.by_row else lagged, None)
        after[layer.state.input] = whole[1:].reshape(layer.state.shape)

    def _add(self, layer: Add) -> None:
        a, b = (self.values[name].astype(np.int64) for name in (layer.a, layer.b))
        acc = ((a - layer.zero_a) << layer.up_a) + ((b - layer.zero_b) << layer.up_b)
        self._keep(layer.name, requantise(acc, layer.shift, layer.point.zero_point), layer.point)

    def _lstm(self, cell: LstmCell, after: Values) -> None:
        units, hidden, memory = cell.units, cell.hidden.input, cell.cell.input
        self.values[hidden] = self.state[hidden].reshape(units)
        c = self.state[memory].reshape(units).astype(np.int64)
        sums, shift = self._sums(cell.sums)[0], cell.sums.shift
        gates = self._codes(sums[: 3 * units], shift[: 3 * units], cell.gates_in)
        fresh = self._codes(sums[3 * units :], shift[3 * units :], cell.candidate_in)
        i, f, o = (cell.sigmoid[gates].astype(np.int64) - cell.gates_zero).reshape(3, units)
        g = cell.tanh[fresh].astype(np.int64) - cell.candidate_zero
        total = ((f * c) << cell.up_kept) + ((i * g) << cell.up_added)
        c = np.clip(round_shift(total, cell.cell_shift), cell.low, cell.high)
        shown = self._codes(c, cell.shown_shift, cell.shown_in)
        s = cell.cell_tanh[shown].astype(np.int64) - cell.shown_zero
        h = requantise(o * s, cell.out_shift, cell.out.zero_point)
        self._keep(cell.name, h, cell.out)
        after[hidden] = h.reshape(cell.hidden.shape)
        after[memory] = c.reshape(cell.cell.shape).astype(np.float32)

    def _gru(self, cell: GruCell, after: Values) -> None:
        units, hidden = cell.units, cell.hidden.input
        h = self.state[hidden].reshape(units).astype(np.int64)
        self.values[hidden] = requantise(h, cell.out_shift, cell.out.zero_point)
        gates, own, given = (
            self._codes(self._sums(dense)[0], dense.shift, dense.point)
            for dense in (cell.gates, cell.new_h, cell.new_x)
            if dense.point is not None
        )
        r, z = (cell.sigmoid[gates].astype(np.int64) - cell.gates_zero).reshape(2, units)
        own, given = own - _zero(cell.new_h), given - _zero(cell.new_x)
        inner = (given << cell.up_given) + ((r * own) << cell.up_reset)
        fresh = self._codes(inner, cell.candidate_shift, cell.candidate_in)
        n = cell.tanh[fresh].astype(np.int64) - cell.candidate_zero
        total = (((cell.one - z) * n) << cell.up_added) + ((z * h) << cell.up_kept)
        h = np.clip(round_shift(total, cell.state_shift), cell.low, cell.high)
        self._keep(cell.name, requantise(h, cell.out_shift, cell.out.zero_point), cell.out)
        after[hidden] = h.reshape(cell.hidden.shape).astype(np.float32)


def _zero(layer: Dense) -> int:
    assert layer.point is not None
    return layer.point.zero_point


def run_codes(graph: IntegerGraph, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (steps, outputs) and masks (steps,) of one stream from a fresh state, from codes."""
    stream = GraphReference(graph)
    found = [stream.step_codes(row) for row in codes]
    acc = np.array([acc for acc, _ in found], dtype=np.int32).reshape(len(codes), graph.n_outputs)
    return acc, np.array([mask for _, mask in found], dtype=np.uint32)
