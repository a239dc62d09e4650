"""How much of each quantised layer saturates: a copy of the INT8 model with its insides shown.

The copy runs unoptimised, since an optimised graph has no insides; it belongs beside the hot path.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from engine.backends.onnx_providers import session_options
from engine.bundle import Bundle

LEAST: Final = 0
GREATEST: Final = 255


class SaturationProbe:
    """Shares of saturated codes, layer by layer.

    Parameters
    ----------
    bundle : Bundle

    Attributes
    ----------
    names : tuple of str
        Of the layers: the nodes that quantise to uint8, the model's input left out.
    """

    def __init__(self, bundle: Bundle) -> None:
        model = onnx.load_from_string(bundle.model_bytes("int8"))
        constants = {item.name: item for item in model.graph.initializer}
        taps = [
            node
            for node in model.graph.node
            if node.op_type == "QuantizeLinear"
            and node.input[0] not in (bundle.input_name, *constants)
            and not node.name.startswith("check/")
        ]
        self.names = tuple((node.name or node.output[0]).removesuffix(".quantise") for node in taps)
        # Where the zero point is the lowest code, that code is a plain zero and no saturation.
        self._low_counts = [
            len(node.input) > 2
            and node.input[2] in constants
            and bool(numpy_helper.to_array(constants[node.input[2]]).max() > LEAST)
            for node in taps
        ]
        shown = {value.name for value in model.graph.output}
        for node in taps:
            if node.output[0] not in shown:
                tensor = onnx.helper.make_tensor_value_info(
                    node.output[0], onnx.TensorProto.UINT8, None
                )
                model.graph.output.append(tensor)
        options = session_options(1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._input = bundle.input_name
        self._state = bundle.state("int8")
        self._wanted = [node.output[0] for node in taps]
        self._wanted += [tensor.output for tensor in self._state]
        self._streams: dict[int, dict[str, np.ndarray]] = {}

    def reset(self, slot: int) -> None:
        """Start a stream afresh."""
        self._streams.pop(slot, None)

    def shares(self, slot: int, x: np.ndarray) -> np.ndarray:
        """One step of a stream: the share of saturated codes of each layer, 0 to 1."""
        if not self._wanted:
            return np.zeros(0)
        state = self._streams.get(slot)
        if state is None:
            state = {tensor.input: tensor.fresh() for tensor in self._state}
        found = self._session.run(self._wanted, {self._input: x, **state})
        n = len(self.names)
        self._streams[slot] = {
            tensor.input: array for tensor, array in zip(self._state, found[n:], strict=True)
        }
        shares = np.zeros(n)
        for i, codes in enumerate(found[:n]):
            full = np.count_nonzero(codes == GREATEST)
            if self._low_counts[i]:
                full += np.count_nonzero(codes == LEAST)
            shares[i] = full / max(codes.size, 1)
        return shares
