"""What else runs the same step graphs on this CPU: ONNX Runtime and OpenVINO, FP32 and INT8.

Each is given its best: one thread, one stream, the latency hint, the graph without value-check
nodes, every input and output bound once, a synchronous call of the bound request, and state that is
read where the step before wrote it. Two requests with the two sets of state arrays exchanged are
called in turn, so that no state is ever copied.

Source: ONNX Runtime documentation, "I/O binding"; OpenVINO documentation, "OpenVINO Runtime API
tutorial" (tensors shared with numpy) and "High-level performance hints".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.contest import Lane
from engine.backends.onnx_providers import session_options
from engine.backends.qdq_graph import without_checks
from engine.bundle import Bundle
from engine.manifest import StateTensor
from feeds.errors import InputError

PRECISIONS: Final = ("fp32", "int8")
CLIPPED: Final = "x.clipped"  # the float twin's own clip, which came with its value check


@dataclass(frozen=True)
class Rival:
    """One library running one precision of a bundle.

    Attributes
    ----------
    name : str
        As "openvino-int8".
    precision : str
    library : str
        With its version.
    size_bytes : int
        Of the graph that it was given.
    lane_of : callable
        The lane of a stream, from 0.
    """

    name: str
    precision: str
    library: str
    size_bytes: int
    lane_of: Callable[[int], Lane]


def model_alone(bundle: Bundle, precision: str) -> bytes:
    """A bundle's step graph without its value check and what came with that."""
    model = without_checks(onnx.load_model_from_string(bundle.model_bytes(precision)))
    graph = model.graph
    for node in [node for node in graph.node if node.name == CLIPPED and node.op_type == "Clip"]:
        for other in graph.node:
            for place, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[place] = node.input[0]
        for item in [item for item in graph.initializer if item.name in node.input]:
            graph.initializer.remove(item)
        graph.node.remove(node)
    return bytes(model.SerializeToString())


class _Arrays:
    """What a lane's two requests are bound to: one reads the state that the other wrote."""

    def __init__(self, bundle: Bundle, precision: str) -> None:
        self.state: tuple[StateTensor, ...] = bundle.state(precision)
        self.x = np.zeros((1, bundle.n_features), dtype=np.float32)
        self.out = np.zeros((1, bundle.n_outputs), dtype=np.float32)
        self._sets = [[tensor.fresh() for tensor in self.state] for _ in range(2)]
        self._ends = (bundle.input_name, bundle.output_name)

    def bound(self, turn: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Inputs and outputs of a request, by name."""
        read, written = self._sets[turn], self._sets[1 - turn]
        inputs, outputs = {self._ends[0]: self.x}, {self._ends[1]: self.out}
        for tensor, before, after in zip(self.state, read, written, strict=True):
            inputs[tensor.input], outputs[tensor.output] = before, after
        return inputs, outputs

    def lane(self, calls: tuple[Callable[[], object], ...]) -> Lane:
        """The lane of two such requests."""

        def reset() -> None:
            for arrays in self._sets:
                for tensor, array in zip(self.state, arrays, strict=True):
                    array.fill(tensor.initial)

        return Lane(self.x, self.out, calls, reset)


def onnx_runtime(bundle: Bundle, precision: str) -> Rival:
    """ONNX Runtime's CPU provider, as the engine's own backend tunes it."""
    data = model_alone(bundle, precision)
    session = ort.InferenceSession(data, session_options(1), providers=["CPUExecutionProvider"])

    def lane_of(_stream: int) -> Lane:
        arrays, calls = _Arrays(bundle, precision), []
        for turn in range(2):
            binding = session.io_binding()
            inputs, outputs = arrays.bound(turn)
            for bind, ends in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
                for name, array in ends.items():
                    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
            calls.append(partial(session.run_with_iobinding, binding))
        return arrays.lane(tuple(calls))

    library = f"onnxruntime {ort.__version__}"
    return Rival(f"ort-{precision}", precision, library, len(data), lane_of)


def openvino(bundle: Bundle, precision: str) -> Rival:
    """OpenVINO's CPU plugin.

    float32 stays float32: on some CPUs the plugin would compute in bfloat16 unasked.

    Raises
    ------
    InputError
        If it is not installed, or cannot compile the model.
    """
    try:
        import openvino as ov
    except ImportError as error:
        raise InputError(
            "OpenVINO is not installed",
            where=f"openvino-{precision}",
            expected="the package openvino",
            found=str(error),
            fix="pip install openvino",
        ) from None
    data = model_alone(bundle, precision)
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = ov.Core()
    try:
        compiled = core.compile_model(core.read_model(data), "CPU", config)
    except RuntimeError as error:
        raise InputError(
            f"OpenVINO cannot compile the {precision} model",
            where=str(bundle.path),
            found=str(error)[:300],
        ) from None

    def lane_of(_stream: int) -> Lane:
        arrays, calls = _Arrays(bundle, precision), []
        for turn in range(2):
            request = compiled.create_infer_request()
            for ends in arrays.bound(turn):
                for name, array in ends.items():
                    request.set_tensor(name, ov.Tensor(array, shared_memory=True))
            calls.append(_bound_call(ov, request))
        return arrays.lane(tuple(calls))

    library = f"openvino {version('openvino')}"
    return Rival(f"openvino-{precision}", precision, library, len(data), lane_of)


def _bound_call(ov: Any, request: Any) -> Callable[[], object]:
    """The shortest way to run a bound request: past the wrapper that looks for inputs to copy."""
    infer = super(ov.InferRequest, request).infer
    return partial(infer, {}, True, False)  # outputs shared, no strings among them


RIVALS: Final[dict[str, Callable[[Bundle, str], Rival]]] = {
    "ort": onnx_runtime,
    "openvino": openvino,
}


def open_rivals(bundle: Bundle) -> tuple[list[Rival], dict[str, str]]:
    """Every rival that runs here, and of the others, by name, why not."""
    found, refused = [], {}
    for library, make in RIVALS.items():
        for precision in PRECISIONS:
            try:
                found.append(make(bundle, precision))
            except InputError as error:
                refused[f"{library}-{precision}"] = str(error)
    return found, refused
