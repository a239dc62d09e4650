"""What ONNX Runtime makes of a graph, and how fast it runs it.

Sources: ONNX Runtime documentation, "Graph optimizations" and "I/O binding".
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnxruntime as ort

from engine.backends.onnx import WARM_UP_RUNS
from engine.backends.onnx_providers import session_options
from engine.backends.qdq_graph import without_checks
from feeds.errors import InputError

INT8_OPS: Final = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMatMul",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
    }
)


def opened(
    model: onnx.ModelProto, options: ort.SessionOptions | None = None
) -> ort.InferenceSession:
    """A session of a model, as serving opens it."""
    return ort.InferenceSession(
        model.SerializeToString(),
        options or session_options(1),
        providers=["CPUExecutionProvider"],
    )


def fused_nodes(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes of each operator ONNX Runtime runs, as a serving session optimises them."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        opened(model, options)
        optimised = onnx.load(options.optimized_model_filepath)
    return dict(sorted(Counter(node.op_type for node in optimised.graph.node).items()))


def int8_nodes(model: onnx.ModelProto) -> int:
    """How many of them compute on integers of 8 or 4 bits; a value check does not count."""
    found = fused_nodes(without_checks(model))
    return sum(count for op, count in found.items() if op in INT8_OPS)


def latency(
    model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], runs: int
) -> tuple[float, float]:
    """Time of one inference with bound inputs and outputs, after a warm-up.

    Parameters
    ----------
    model : ModelProto
    feeds : mapping of str to ndarray
        One call's inputs, the same ones every time.
    runs : int

    Returns
    -------
    p50, p99 : float
        Median and 99th percentile in microseconds, by the clock of this process.

    Raises
    ------
    InputError
        For no run.
    """
    if runs < 1:
        raise InputError("nothing to time", where="runs", expected="1 or more", found=str(runs))
    session = opened(model)
    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        # A fixed buffer: an output that is bound by device alone is allocated at every run.
        shape = [size if isinstance(size, int) else 1 for size in output.shape]
        dtype = {"tensor(uint8)": np.uint8, "tensor(int32)": np.int32}.get(output.type, np.float32)
        values[output.name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype)
        binding.bind_ortvalue_output(output.name, values[output.name])
    for _ in range(WARM_UP_RUNS):
        session.run_with_iobinding(binding)
    times_ns = np.empty(runs, dtype=np.int64)
    for number in range(runs):
        start_ns = time.perf_counter_ns()
        session.run_with_iobinding(binding)
        times_ns[number] = time.perf_counter_ns() - start_ns
    p50, p99 = np.percentile(times_ns, (50, 99)) / 1e3
    return float(p50), float(p99)
