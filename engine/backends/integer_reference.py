"""The reference interpreter of an `exact-int8` graph: what every backend must compute, bit for bit.

It needs numpy alone and knows no float32 arithmetic but one correctly rounded square root and one
division: every other float32 tensor is integers at a power of two (`engine.backends.dyadic`), and
a graph in which float32 would round is refused by the node's name. `engine.backends.exactness`
proves the same without running anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from engine.backends.dyadic import Dyadic, InexactError, from_float, to_float
from engine.backends.qdq_graph import End, Graph, Node, Value, check_state, read_graph, read_model
from engine.backends.reference_operations import check_known, compute
from engine.manifest import StateTensor
from feeds.errors import InputError

BATCH_ROWS: Final = 4096
ROW_WISE: Final = frozenset(
    {"Add", "Cast", "Clip", "DequantizeLinear", "Div", "Gather", "Gemm", "Identity", "Max", "Mul"}
    | {"QuantizeLinear", "Relu", "Round", "Sqrt", "Sub"}
)


def fold_constants(graph: Graph) -> tuple[dict[str, Value], tuple[Node, ...], tuple[Node, ...]]:
    """Compute what depends on no input.

    Returns
    -------
    constants : dict of str to Value
        The graph's, and the outputs of the nodes that were computed.
    folded, live : tuple of Node
        Those nodes, and the others, in order.
    """
    constants = dict(graph.constants)
    folded, live = [], []
    for node in graph.nodes:
        check_known(node)
        if all(name in constants for name in node.inputs if name):
            constants.update(zip(node.outputs, run_node(node, constants), strict=False))
            folded.append(node)
        else:
            live.append(node)
    return constants, tuple(folded), tuple(live)


def run_node(node: Node, values: Mapping[str, Value]) -> list[Value]:
    """Run one node on the tensors known so far, by name."""
    return compute(node, [values[name] if name else None for name in node.inputs])


class IntegerReference:
    """One graph, interpreted.

    Parameters
    ----------
    model : bytes, str or Path
        An ONNX file or its bytes, in QDQ form, operator set 19 to 21.
    state : sequence of StateTensor
        What the graph remembers, as its bundle's manifest says.

    Raises
    ------
    InputError
        Naming the node: an operation that is not known, a scale that is no power of two, weights
        or biases that float32 cannot hold.
    """

    def __init__(self, model: bytes | str | Path, state: Sequence[StateTensor] = ()) -> None:
        proto, where = read_model(model)
        graph = read_graph(proto, where)
        check_state(graph, state)
        self._graph = graph
        self._state = tuple(state)
        self._constants, self._folded, self._live = fold_constants(graph)
        self._row_wise = not state and all(self._keeps_rows(node) for node in self._live)

    def fresh_state(self) -> dict[str, np.ndarray]:
        """What a fresh stream remembers, by the graph input's name."""
        return {tensor.input: tensor.fresh() for tensor in self._state}

    def step(
        self, x: np.ndarray, state: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """One inference.

        Parameters
        ----------
        x : ndarray of float32
            The model input, finite; of the graph's shape, or one that reshapes to it.
        state : mapping of str to ndarray, optional
            By the graph input's name; a fresh stream's where left out.

        Returns
        -------
        outputs : dict of str to ndarray
            float32 or integers, by the graph output's name, without the state.
        state : dict of str to ndarray
            What the next step reads.
        """
        values = self._evaluate(x, state)
        remembered = {tensor.output: tensor.input for tensor in self._state}
        found = {end.name: _array(values[end.name]) for end in self._graph.outputs}
        outputs = {name: array for name, array in found.items() if name not in remembered}
        return outputs, {remembered[name]: found[name] for name in remembered}

    def run(self, x: np.ndarray) -> np.ndarray:
        """Steps of one stream, from a fresh state.

        Parameters
        ----------
        x : ndarray of float32, shape (steps, features)

        Returns
        -------
        ndarray of float32, shape (steps, classes)
            The first output of each step.
        """
        name = self._graph.outputs[0].name
        out = []
        if self._row_wise:
            for start in range(0, len(x), BATCH_ROWS):
                out.append(_array(self._evaluate(x[start : start + BATCH_ROWS], None)[name]))
        else:
            state = self.fresh_state()
            for row in x:
                outputs, state = self.step(row, state)
                out.append(outputs[name].reshape(1, -1))
        return np.concatenate(out) if out else np.zeros((0, self._graph.outputs[0].shape[-1]), "f4")

    def tensors(
        self, x: np.ndarray, state: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Every tensor of one inference by its name, float32 or integers; see `step`."""
        values = self._evaluate(x, state)
        names = [end.name for end in self._graph.inputs]
        names += [name for node in self._graph.nodes for name in node.outputs if name]
        return {name: _array(values[name]) for name in names}

    def _evaluate(self, x: np.ndarray, state: Mapping[str, np.ndarray] | None) -> dict[str, Value]:
        first, *rest = self._graph.inputs
        rows = -1 if self._row_wise else first.shape[0]
        assert x.shape[-1:] == first.shape[-1:], f"{x.shape} for rows of {first.shape[-1]}"
        values = dict(self._constants)
        values[first.name] = _input(first, x.reshape(rows, *first.shape[1:]), self._graph.where)
        given = self.fresh_state() if state is None else state
        for end in rest:
            array = given[end.name]
            assert (array.dtype.name, array.shape) == (end.dtype, end.shape), f"state {end.name}"
            values[end.name] = _input(end, array, self._graph.where)
        for node in self._live:
            values.update(zip(node.outputs, run_node(node, values), strict=False))
        return values

    def _keeps_rows(self, node: Node) -> bool:
        """Whether rows can go through a node together: no row of a result sees another's."""
        if node.op not in ROW_WISE:
            return False
        constants = [self._constants.get(name) for name in node.inputs]
        if node.op == "Gather":
            table = constants[0]
            return table is not None and len(table.shape) == 1
        if node.op == "Gemm":
            if constants[0] is not None or constants[1] is None:
                return False
            constants = constants[2:]
        return all(
            value is None or len(value.shape) < 2 or value.shape[0] == 1 for value in constants
        )


def _input(end: End, array: np.ndarray, where: str) -> Value:
    if end.dtype != "float32":
        return array
    try:
        return from_float(array)
    except InexactError as error:
        raise InputError(
            str(error), where=f"{where}: {end.name}", expected="finite numbers"
        ) from None


def _array(value: Value) -> np.ndarray:
    return to_float(value) if isinstance(value, Dyadic) else value
