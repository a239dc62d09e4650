"""Streams of a model with state in one ONNX Runtime session.

A stream is one instrument: two sets of state arrays and two I/O bindings between them, made at its
first inference. One binding reads set A and writes set B, the other the reverse, and an inference
that succeeds swaps them. So a step copies nothing and allocates nothing, and one that fails leaves
the state as it was.

Source: ONNX Runtime documentation, "I/O binding".
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnxruntime as ort

from engine.backends.interface import BackendInfo
from engine.bundle import Bundle
from engine.manifest import StateTensor

MAX_STREAMS: Final = 1 << 16

_State = tuple[np.ndarray, ...]


def check_arrays(info: BackendInfo, x: np.ndarray, out: np.ndarray) -> None:
    """Whether these arrays can be bound: what is bound is read and written without a look."""
    for array, shape in ((x, info.input_shape), (out, info.output_shape)):
        assert array.shape == shape, f"shape {array.shape} instead of {shape}"
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
    assert out.flags.writeable


class _Stream:
    """State arrays and bindings of one instrument; ``turn`` names the set that is read next."""

    __slots__ = ("bindings", "out", "sets", "turn", "x")

    def __init__(self, sets: tuple[_State, _State], bindings: tuple[ort.IOBinding, ...]) -> None:
        self.sets = sets
        self.bindings = bindings
        self.turn = 0
        self.x: np.ndarray | None = None
        self.out: np.ndarray | None = None


class StatefulRunner:
    """Runs a model with state, each stream from its own.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
    bundle : Bundle
    info : BackendInfo
    copies_input : bool
        Whether this execution provider copies an input when it is bound, not when it is run.
    check : (str or None, ndarray of int32, shape (1,))
        Output of the value check, and where it is written; all streams share it, since it is
        read right after each step.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        bundle: Bundle,
        info: BackendInfo,
        copies_input: bool,
        check: tuple[str | None, np.ndarray],
    ) -> None:
        self._session = session
        self._info = info
        self._input_name = bundle.input_name
        self._output_name = bundle.output_name
        self._state: tuple[StateTensor, ...] = bundle.state(info.precision)
        self._copies_input = copies_input
        self._check_name, self._mask = check
        self._streams: dict[int, _Stream] = {}

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> None:
        """One step of a stream, from ``x`` into ``out``.

        Parameters
        ----------
        stream : int
        x : ndarray of float32, shape (1, features), C order
        out : ndarray of float32, shape (classes,), C order

        Raises
        ------
        RuntimeError
            If ONNX Runtime failed; the stream's state is then unchanged.
        """
        own = self._streams.get(stream)
        if own is None:
            own = self._make(stream)
        if x is not own.x or out is not own.out or self._copies_input:
            self._bind(own, x, out)
        turn = own.turn
        try:
            self._session.run_with_iobinding(own.bindings[turn])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise RuntimeError(f"inference failed: {error}") from None
        own.turn = 1 - turn

    def reset(self, stream: int) -> None:
        """Start a stream afresh; nothing to do for one that has not begun."""
        own = self._streams.get(stream)
        if own is not None:
            for array, tensor in zip(own.sets[own.turn], self._state, strict=True):
                array.fill(tensor.initial)

    def current(self, stream: int) -> dict[str, np.ndarray]:
        """What a stream's next inference reads, copied, by the graph input's name."""
        own = self._streams.get(stream)
        arrays = [t.fresh() for t in self._state] if own is None else own.sets[own.turn]
        return {t.input: array.copy() for t, array in zip(self._state, arrays, strict=True)}

    def forget(self) -> None:
        """Drop every stream."""
        self._streams.clear()

    def _make(self, stream: int) -> _Stream:
        assert 0 <= stream < MAX_STREAMS, f"stream {stream} of at most {MAX_STREAMS}"
        sets = tuple(tuple(t.fresh() for t in self._state) for _ in range(2))
        own = _Stream((sets[0], sets[1]), tuple(self._session.io_binding() for _ in range(2)))
        self._bind_state(own)
        self._streams[stream] = own
        return own

    def _bind_state(self, own: _Stream) -> None:
        for turn, binding in enumerate(own.bindings):
            for i, tensor in enumerate(self._state):
                dtype, shape = np.dtype(tensor.dtype).type, list(tensor.shape)
                read, written = own.sets[turn][i], own.sets[1 - turn][i]
                binding.bind_input(tensor.input, "cpu", 0, dtype, shape, read.ctypes.data)
                binding.bind_output(tensor.output, "cpu", 0, dtype, shape, written.ctypes.data)
            if self._check_name is not None:
                binding.bind_output(
                    self._check_name, "cpu", 0, np.int32, [1], self._mask.ctypes.data
                )

    def _bind(self, own: _Stream, x: np.ndarray, out: np.ndarray) -> None:
        check_arrays(self._info, x, out)
        for binding in own.bindings:
            binding.bind_input(self._input_name, "cpu", 0, np.float32, list(x.shape), x.ctypes.data)
            binding.bind_output(
                self._output_name, "cpu", 0, np.float32, [1, *out.shape], out.ctypes.data
            )
        if self._copies_input:
            self._bind_state(own)
        own.x, own.out = x, out
