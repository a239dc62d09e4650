"""What every backend that lowers from the integer graph shares: all but the step itself.

A `GraphDevice` takes codes and gives accumulators. Here stand both ends of it (quantisation and
its check, dequantisation), streams, the queue of answers, and the proof at opening that the device
gives the bits of the bundle's own graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final, Protocol, Self

import numpy as np
from numba import njit

from engine.backends.answers import AnswerQueue
from engine.backends.exact_proof import prove_backend
from engine.backends.integer_graph import IntegerGraph
from engine.backends.interface import BackendInfo
from engine.backends.lowering import lower_bundle
from engine.bundle import Bundle
from engine.trust import CHECK_INPUT
from feeds.errors import InputError

MAX_STREAMS: Final = 1 << 16


class GraphDevice(Protocol):
    """What runs an integer graph for any number of streams.

    Attributes
    ----------
    isa : str
        What computes: an instruction set, a GPU, a design.
    library : str
        What built it, with its version.
    """

    isa: str
    library: str

    def step(self, stream: int, codes: np.ndarray, out: np.ndarray) -> int:
        """One inference.

        Parameters
        ----------
        stream : int
            From 0 to `MAX_STREAMS` - 1; fresh at its first step.
        codes : ndarray of uint8, shape (features,), C order
        out : ndarray of int32, shape (outputs,), C order
            Overwritten: accumulators of the scores, or codes where the graph ends in codes.

        Returns
        -------
        int
            Mask of the value check, without that of the input.

        Raises
        ------
        RuntimeError
            If the device failed.
        """
        ...

    def reset(self, stream: int) -> None:
        """Start a stream afresh."""
        ...

    def close(self) -> None:
        """Give the device back."""
        ...


@njit("int64(float32[:,::1], uint8[::1], float32, int64, float32)", cache=True)
def quantise_row(
    x: np.ndarray, codes: np.ndarray, steps_per_unit: float, zero_point: int, limit: float
) -> int:
    """Codes of one input row; `CHECK_INPUT` where one is beyond ``limit`` or no number."""
    wrong = 0
    for i in range(len(codes)):
        value = x[0, i]
        if not abs(value) <= limit:
            wrong = CHECK_INPUT
        step = np.rint(value * steps_per_unit) + np.float32(zero_point)
        if not step >= np.float32(0.0):
            codes[i] = 0
        elif step > np.float32(255.0):
            codes[i] = 255
        else:
            codes[i] = np.uint8(step)
    return wrong


@njit("void(int32[::1], float32[::1], float32[::1])", cache=True)
def dequantise_row(acc: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Scores of one row of accumulators."""
    for j in range(len(out)):
        out[j] = np.float32(acc[j]) * scale[j]


class GraphBackend(ABC):
    """A bundle on a `GraphDevice`; see `engine.backends.interface.Backend`.

    Parameters
    ----------
    bundle : Bundle
    graph : IntegerGraph
    device : GraphDevice
    info : BackendInfo
    """

    name: ClassVar[str]

    def __init__(
        self, bundle: Bundle, graph: IntegerGraph, device: GraphDevice, info: BackendInfo
    ) -> None:
        assert graph.scores is not None
        self._bundle, self._graph, self._info = bundle, graph, info
        self._device: GraphDevice = device
        self._codes = np.zeros(graph.n_features, dtype=np.uint8)
        self._acc = np.zeros(graph.n_outputs, dtype=np.int32)
        self._scale = np.ldexp(np.float32(1.0), graph.scores.exponent).astype(np.float32)
        self._steps_per_unit = np.float32(np.ldexp(1.0, -graph.point.exponent))
        # Without a value check nothing is ever wrong, not even NaN.
        self._limit = np.float32(graph.input_limit)
        self._checked = bool(np.isfinite(self._limit))
        self._answers = AnswerQueue(graph.n_outputs)

    @classmethod
    @abstractmethod
    def open_device(cls, graph: IntegerGraph, device: str) -> GraphDevice:
        """A device that runs this graph, or this part of one.

        Raises
        ------
        InputError
            If the device is unknown or absent, or cannot run the graph.
        """

    @classmethod
    def open_model(cls, graph: IntegerGraph, device: str) -> GraphDevice:
        """The device that `infer` runs a whole model on."""
        return cls.open_device(graph, device)

    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        """Open a bundle's model; see `Backend.open`."""
        if precision != "int8":
            raise InputError(
                f"the {cls.name} backend runs integers only",
                where="model.precision",
                expected="int8",
                found=repr(precision),
                fix="serve fp32 with the onnx backend",
            )
        if threads != 1:
            raise InputError(
                f"the {cls.name} backend runs one step on one thread",
                where="model.threads",
                expected="1",
                found=str(threads),
            )
        graph = lower_bundle(bundle)
        opened = cls.open_model(graph, device)
        info = BackendInfo(
            name=cls.name,
            device=device,
            precision=precision,
            numerics="exact-int8",
            input_shape=(1, graph.n_features),
            input_dtype="float32",
            output_shape=(graph.n_outputs,),
            output_dtype="float32",
            model_hash=bundle.model_hash,
            isa=opened.isa,
            threads=1,
            library=opened.library,
        )
        backend = cls(bundle, graph, opened, info)
        try:
            prove_backend(backend, bundle, float(np.ldexp(1.0, graph.point.exponent)))
        except InputError:
            backend.close()
            raise
        return backend

    def info(self) -> BackendInfo:
        """What was opened."""
        return self._info

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        """Run the model from ``x`` into ``out``; see `Backend.infer`."""
        assert 0 <= stream < MAX_STREAMS, f"stream {stream} of at most {MAX_STREAMS}"
        point = self._graph.point
        wrong = quantise_row(x, self._codes, self._steps_per_unit, point.zero_point, self._limit)
        mask = self._device.step(stream, self._codes, self._acc)
        dequantise_row(self._acc, self._scale, out)
        return mask | wrong if self._checked else mask

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        """Answer at once and keep the answer for `poll`; False where too many wait."""
        slot = self._answers.next_slot()
        if slot is None:
            return False
        self.infer(stream, x, slot)
        self._answers.put(ticket)
        return True

    def poll(self, out: np.ndarray) -> int:
        """The oldest answer not yet taken; see `Backend.poll`."""
        return self._answers.take(out)

    def reset(self, stream: int) -> None:
        """Start a stream afresh."""
        self._device.reset(stream)

    def close(self) -> None:
        """Give the device back."""
        self._device.close()
