"""The proof at opening: a backend gives the bits of the bundle's graph as it is written.

The graph runs unfused in ONNX Runtime on the CPU, in sequences from a fresh state, over
`engine.backends.hard_inputs`.
"""

from __future__ import annotations

from itertools import islice
from typing import Final, Protocol

import numpy as np
import onnxruntime as ort

from engine.backends.hard_inputs import hard_inputs
from engine.bundle import Bundle
from feeds.errors import InputError

SEQUENCES: Final = 3
STEPS: Final = 64  # of each sequence: past the memory of a TCN of four dilations


class Inferring(Protocol):
    """As much of a backend as is held against the graph."""

    def info(self) -> object:
        """What was opened."""
        ...

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        """One inference."""
        ...

    def reset(self, stream: int) -> None:
        """Start a stream afresh."""
        ...


def plain_session(data: bytes) -> ort.InferenceSession:
    """The graph as it is written, nothing fused, on the CPU."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def prove_backend(backend: Inferring, bundle: Bundle, input_step: float) -> None:
    """Hold a backend's INT8 answers, and its value check, against the graph.

    The stream that it runs on, 0, is fresh again afterwards.

    Parameters
    ----------
    backend : Inferring
    bundle : Bundle
    input_step : float
        Scale at which the graph quantises its input.

    Raises
    ------
    InputError
        Naming the first score, or the mask, that differs.
    """
    plain = plain_session(bundle.model_bytes("int8"))
    tensors = bundle.state("int8")
    names = [bundle.output_name, *(tensor.output for tensor in tensors)]
    if bundle.checks is not None:
        names.append(bundle.checks.output)
    x = np.zeros((1, bundle.n_features), dtype=np.float32)
    out = np.zeros(bundle.n_outputs, dtype=np.float32)
    rows = hard_inputs(np.random.default_rng(0), x.shape, bundle.clip, (input_step,))
    for _ in range(SEQUENCES):
        backend.reset(0)
        state = {tensor.input: tensor.fresh() for tensor in tensors}
        for row in islice(rows, STEPS):
            x[:] = row
            found = backend.infer(0, x, out)
            expected, *after = plain.run(names, {bundle.input_name: x, **state})
            if out.tobytes() != expected.tobytes():
                at = int(np.flatnonzero(out != expected[0])[0])
                raise _inexact(backend, bundle, f"score {at}", expected[0, at], out[at])
            if bundle.checks is not None:
                mask = int(after.pop().view(np.uint32)[0])
                if mask != found:
                    raise _inexact(backend, bundle, "value check", f"{mask:#x}", f"{found:#x}")
            state = {t.input: array for t, array in zip(tensors, after, strict=True)}
    backend.reset(0)


def _inexact(
    backend: Inferring, bundle: Bundle, what: str, expected: object, found: object
) -> InputError:
    info = backend.info()
    name, device, isa = (getattr(info, key, "?") for key in ("name", "device", "isa"))
    return InputError(
        "this backend does not give the bits of the bundle's graph on this machine",
        where=f"{bundle.path} on {name} {device} ({isa}): {what}",
        expected=f"{expected}, as the unfused graph computes",
        found=str(found),
        fix="use the onnx backend, or rebuild the bundle",
    )
