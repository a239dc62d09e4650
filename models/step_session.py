"""A step graph in ONNX Runtime, run row after row: for evaluation, verification and timing.

The engine's backend serves bundles; this runs any step graph before there is a bundle, with the
same session options, and can watch tensors inside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort

from engine.backends.onnx_providers import session_options
from engine.manifest import VIOLATIONS, StateTensor
from models.step_graph import INPUT_NAME, OUTPUT_NAME

WARM_UP_RUNS: Final = 200


class StepSession:
    """One graph with its state.

    Parameters
    ----------
    model : ModelProto or bytes
    state : sequence of StateTensor
    threads : int
        Of ONNX Runtime, within an operator.
    optimise : bool
        False runs the graph as it is written, node by node.
    watch : sequence of str
        Tensors inside the graph that `run` returns too.
    """

    def __init__(
        self,
        model: onnx.ModelProto | bytes,
        state: Sequence[StateTensor],
        *,
        threads: int = 1,
        optimise: bool = True,
        watch: Sequence[str] = (),
    ) -> None:
        options = session_options(threads)
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if watch:
            parsed = onnx.load_from_string(model) if isinstance(model, bytes) else model
            model = watched(parsed, watch)
        data = model if isinstance(model, bytes) else model.SerializeToString()
        self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._state = tuple(state)
        self._watch = tuple(watch)
        self._names = [OUTPUT_NAME, *(item.output for item in state), *watch]
        self._now: list[np.ndarray] = []
        self.reset()

    def reset(self) -> None:
        """A fresh stream."""
        self._now = [item.fresh() for item in self._state]

    def state(self) -> list[np.ndarray]:
        """What the next step starts from."""
        return self._now

    def step(self, row: np.ndarray) -> list[np.ndarray]:
        """One row, float32 of shape (features,): scores, then the watched tensors."""
        feeds = {INPUT_NAME: row[None]}
        for item, value in zip(self._state, self._now, strict=True):
            feeds[item.input] = value
        found = self._session.run(self._names, feeds)
        n = 1 + len(self._state)
        self._now = found[1:n]
        return [found[0][0], *found[n:]]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Scores float32 of shape (n, classes) of rows float32 of shape (n, features)."""
        rows = [self.step(row)[0] for row in np.ascontiguousarray(x, dtype=np.float32)]
        return np.array(rows)

    def stream(self, x: np.ndarray) -> np.ndarray:
        """Scores of rows from a fresh stream; see `run`, which goes on where it stands."""
        self.reset()
        return self.run(x)

    def watched(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """The watched tensors of each row, stacked."""
        rows = [self.step(row)[1:] for row in np.ascontiguousarray(x, dtype=np.float32)]
        return {name: np.stack([row[i] for row in rows]) for i, name in enumerate(self._watch)}

    def latency(self, x: np.ndarray, runs: int) -> tuple[float, float]:
        """p50 and p99 of `latencies`, in microseconds."""
        p50, p99 = np.percentile(self.latencies(x, runs), (50, 99))
        return float(p50), float(p99)

    def latencies(self, x: np.ndarray, runs: int) -> np.ndarray:
        """Microseconds of single inferences, state carried on, buffers bound; warmed up.

        Parameters
        ----------
        x : ndarray of float32, shape (n, features)
            Rows taken in turn.
        """
        rows = np.ascontiguousarray(x, dtype=np.float32)
        entry = np.zeros((1, rows.shape[1]), dtype=np.float32)
        pair = [[item.fresh() for item in self._state] for _ in range(2)]
        bindings = []
        mask = np.zeros(1, dtype=np.int32)
        checked = any(output.name == VIOLATIONS for output in self._session.get_outputs())
        for way in range(2):
            binding = self._session.io_binding()
            _bind(binding.bind_input, INPUT_NAME, entry)
            for item, before, after in zip(self._state, pair[way], pair[1 - way], strict=True):
                _bind(binding.bind_input, item.input, before)
                _bind(binding.bind_output, item.output, after)
            if checked:
                _bind(binding.bind_output, VIOLATIONS, mask)
            binding.bind_output(OUTPUT_NAME, "cpu")
            bindings.append(binding)
        took = np.empty(runs)
        call, clock = self._session.run_with_iobinding, time.perf_counter_ns
        for i in range(-WARM_UP_RUNS, runs):
            entry[0] = rows[i % len(rows)]
            begin = clock()
            call(bindings[i & 1])
            took[max(i, 0)] = clock() - begin
        return took / 1e3


def _bind(bind: Any, name: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)


def watched(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The same graph with further outputs, of whatever type they have inside."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(copy)
    known = {value.name: value for value in inferred.graph.value_info}
    have = {value.name for value in copy.graph.output}
    copy.graph.output.extend(known[name] for name in names if name not in have)
    return copy
