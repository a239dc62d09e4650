"""The value check of a model that runs on another device: its nodes on the CPU, beside it.

The check is made of integer operators that hardly any execution provider has, and its mask must
be the same whichever answers. So the device hands out the codes that the check looks at, as outputs
of its own, and the check's very nodes run on them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from engine.backends.onnx_providers import session_options
from engine.manifest import CHECK_PREFIX
from feeds.errors import InputError

TAP: Final = "tap/"  # of what is handed out although it is an output already
DTYPES: Final = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8}


def with_taps(plain: bytes, checked: bytes) -> tuple[bytes, dict[str, str]]:
    """The model with every tensor that its value check looks at as an output.

    Parameters
    ----------
    plain, checked : bytes
        The ONNX model without its value check, and with it.

    Returns
    -------
    data : bytes
    taps : dict of str to str
        The name of each such output by that of the tensor. The input is not among them.
    """
    import onnx

    model = onnx.load_model_from_string(plain)
    graph = model.graph
    known = {value.name for value in graph.input} | {item.name for item in graph.initializer}
    made = {name for node in graph.node for name in node.output}
    ends = {value.name for value in graph.output}
    taps: dict[str, str] = {}
    for node in onnx.load_model_from_string(checked).graph.node:
        if not node.name.startswith(CHECK_PREFIX):
            continue
        for name in node.input:
            if name in taps or name in known or name not in made:
                continue
            taps[name] = f"{TAP}{name}" if name in ends else name
            if name in ends:
                graph.node.append(
                    onnx.helper.make_node("Identity", [name], [taps[name]], name=taps[name])
                )
            # ONNX Runtime finds type and shape out itself.
            graph.output.append(onnx.helper.make_empty_tensor_value_info(taps[name]))
    return bytes(model.SerializeToString()), taps


class ValueCheck:
    """The nodes of a value check, in a session of their own.

    Parameters
    ----------
    checked : bytes
        The ONNX model with its value check.
    taps : mapping of str to str
        From `with_taps`.
    session : onnxruntime.InferenceSession
        Of the model with taps, on its device.
    ends : (str, str)
        Names of the model's input and of the check's output.
    mask : ndarray of int32, shape (1,)
        Where `look` writes.

    Raises
    ------
    InputError
        If a tap has a type or shape that cannot be handed over.
    """

    def __init__(
        self,
        checked: bytes,
        taps: Mapping[str, str],
        session: ort.InferenceSession,
        ends: tuple[str, str],
        mask: np.ndarray,
    ) -> None:
        import onnx

        found = {end.name: end for end in session.get_outputs()}
        self.taps = {tap: _array(found[tap]) for tap in taps.values()}
        given = {name: self.taps[tap] for name, tap in taps.items()}
        x = next(end for end in session.get_inputs() if end.name == ends[0])
        given[ends[0]] = self._x = _array(x)
        infos = [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in given.items()
        ]
        whole = onnx.load_model_from_string(checked)
        graph = whole.graph
        own = onnx.helper.make_graph(
            [node for node in graph.node if node.name.startswith(CHECK_PREFIX)],
            "value check",
            infos,
            [value for value in graph.output if value.name == ends[1]],
            [item for item in graph.initializer if item.name.startswith(CHECK_PREFIX)],
        )
        model = onnx.helper.make_model(
            own, opset_imports=whole.opset_import, ir_version=whole.ir_version
        )
        self._session = ort.InferenceSession(
            model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        for name, array in given.items():
            _bind(self._binding.bind_input, name, array)
        _bind(self._binding.bind_output, ends[1], mask)
        self._bound = (given, mask)  # what is bound is kept alive

    def look(self, x: np.ndarray) -> None:
        """Write the mask of an inference whose taps have been read into ``taps``."""
        self._x[...] = x
        self._session.run_with_iobinding(self._binding)


def _array(end: Any) -> np.ndarray:
    """An array of the type and shape of a session's input or output."""
    dtype = DTYPES.get(end.type)
    if dtype is None or not all(isinstance(size, int) for size in end.shape):
        raise InputError(
            "the value check looks at a tensor that cannot be handed over from another device",
            where=f"tensor {end.name}",
            expected="a fixed shape of " + ", ".join(DTYPES),
            found=f"{end.type} {end.shape}",
            fix="use cpu",
        )
    return np.zeros(end.shape, dtype=dtype)


def _bind(bind: Any, name: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
