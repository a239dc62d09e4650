"""Streams of a model with state in one ONNX Runtime session, in the host's memory or in a GPU's.

In the host's a stream is two sets of state arrays and two I/O bindings between them, made at its
first inference. One binding reads set A and writes set B, the other the reverse, and an inference
that succeeds swaps them. So a step copies nothing and allocates nothing, and one that fails leaves
the state as it was.

In a GPU's there is one binding for all streams, since a CUDA graph replays the addresses that it
was captured with. A stream's state lies there beside it, is copied in before a step and out after
it, and never crosses to the host.

Source: ONNX Runtime documentation, "I/O binding"; of the CUDA and TensorRT execution providers,
"CUDA graphs".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from engine.backends.ends import Ends, check_arrays
from engine.backends.interface import BackendInfo
from engine.bundle import Bundle
from engine.manifest import StateTensor

MAX_STREAMS: Final = 1 << 16

_State = tuple[np.ndarray, ...]


def bind_checked(binding: ort.IOBinding, checked: Mapping[str, np.ndarray]) -> None:
    """Let a session write what the value check needs into these arrays."""
    for name, array in checked.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


class BoundEnds(Ends):
    """`Ends` of a session in the host's memory, bound in each of its bindings.

    Parameters
    ----------
    info : BackendInfo
    bundle : Bundle
        For the names of input and output.
    bindings : sequence of onnxruntime.IOBinding

    Attributes
    ----------
    bindings : tuple of onnxruntime.IOBinding
    """

    __slots__ = ("_names", "bindings")

    def __init__(
        self, info: BackendInfo, bundle: Bundle, bindings: Sequence[ort.IOBinding]
    ) -> None:
        super().__init__(info)
        self._names = (bundle.input_name, bundle.output_name)
        self.bindings = tuple(bindings)

    def take(self, x: np.ndarray, out: np.ndarray) -> None:
        """Bind these two; see `Ends.take`."""
        super().take(x, out)
        self.x = None  # until both are bound
        for binding in self.bindings:
            binding.bind_input(self._names[0], "cpu", 0, np.float32, list(x.shape), self.x_at)
            binding.bind_output(self._names[1], "cpu", 0, np.float32, [1, *out.shape], self.out_at)
        self.x = x


class _Stream:
    """State arrays and bindings of one instrument; ``turn`` names the set that is read next."""

    __slots__ = ("ends", "sets", "turn")

    def __init__(self, sets: tuple[_State, _State], ends: BoundEnds) -> None:
        self.sets = sets
        self.ends = ends
        self.turn = 0


class StatefulRunner:
    """Runs a model with state in the host's memory, each stream from its own.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
    bundle : Bundle
    info : BackendInfo
    checked : mapping of str to ndarray
        Outputs for the value check, and where they are written; all streams share them, since
        they are read right after each step.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        bundle: Bundle,
        info: BackendInfo,
        checked: Mapping[str, np.ndarray],
    ) -> None:
        self._session = session
        self._info = info
        self._bundle = bundle
        self._state: tuple[StateTensor, ...] = bundle.state(info.precision)
        self._checked = checked
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
        ends = own.ends
        if x is not ends.x or out is not ends.out:
            ends.take(x, out)
        turn = own.turn
        try:
            self._session.run_with_iobinding(ends.bindings[turn])
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
        bindings = [self._bind(sets[turn], sets[1 - turn]) for turn in range(2)]
        own = _Stream((sets[0], sets[1]), BoundEnds(self._info, self._bundle, bindings))
        self._streams[stream] = own
        return own

    def _bind(self, read: _State, written: _State) -> ort.IOBinding:
        """A binding of all but the ends."""
        binding = self._session.io_binding()
        for tensor, before, after in zip(self._state, read, written, strict=True):
            dtype, shape = np.dtype(tensor.dtype).type, list(tensor.shape)
            binding.bind_input(tensor.input, "cpu", 0, dtype, shape, before.ctypes.data)
            binding.bind_output(tensor.output, "cpu", 0, dtype, shape, after.ctypes.data)
        bind_checked(binding, self._checked)
        return binding


class GpuRunner:
    """Runs a model in the memory of a GPU, with state or without.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
    bundle : Bundle
    info : BackendInfo
    checked : mapping of str to ndarray
        Outputs for the value check, and where they are copied to.
    gpu : int
        Its number.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        bundle: Bundle,
        info: BackendInfo,
        checked: Mapping[str, np.ndarray],
        gpu: int,
    ) -> None:
        self._session = session
        self._info = info
        self._gpu = gpu
        self._state: tuple[StateTensor, ...] = bundle.state(info.precision)
        self._x = self._placed(np.zeros(info.input_shape, dtype=np.float32))
        self._out = self._placed(np.zeros((1, *info.output_shape), dtype=np.float32))
        self._before = [self._placed(tensor.fresh()) for tensor in self._state]
        self._after = [self._placed(tensor.fresh()) for tensor in self._state]
        self._checked = [(array, self._placed(array)) for array in checked.values()]
        self._streams: dict[int, list[Any]] = {}
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(bundle.input_name, self._x)
        self._binding.bind_ortvalue_output(bundle.output_name, self._out)
        for tensor, before, after in zip(self._state, self._before, self._after, strict=True):
            self._binding.bind_ortvalue_input(tensor.input, before)
            self._binding.bind_ortvalue_output(tensor.output, after)
        for name, (_, value) in zip(checked, self._checked, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> None:
        """One step of a stream; see `StatefulRunner.infer`."""
        check_arrays(self._info, x, out)
        try:
            own = self._streams.get(stream)
            if own is None:
                own = self._make(stream)
            self._x.update_inplace(x)
            for before, kept in zip(self._before, own, strict=True):
                _copy(before, kept)
            self._session.run_with_iobinding(self._binding)
            scores = self._out.numpy()
            for array, value in self._checked:
                array[...] = value.numpy()
            for kept, after in zip(own, self._after, strict=True):
                _copy(kept, after)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise RuntimeError(f"inference failed: {error}") from None
        out[:] = scores[0]

    def reset(self, stream: int) -> None:
        """Start a stream afresh; nothing to do for one that has not begun."""
        for kept, tensor in zip(self._streams.get(stream, ()), self._state, strict=False):
            kept.update_inplace(tensor.fresh())

    def current(self, stream: int) -> dict[str, np.ndarray]:
        """What a stream's next inference reads, copied, by the graph input's name."""
        own = self._streams.get(stream)
        arrays = [t.fresh() for t in self._state] if own is None else [v.numpy() for v in own]
        return {t.input: array for t, array in zip(self._state, arrays, strict=True)}

    def forget(self) -> None:
        """Drop every stream."""
        self._streams.clear()

    def _make(self, stream: int) -> list[Any]:
        assert 0 <= stream < MAX_STREAMS, f"stream {stream} of at most {MAX_STREAMS}"
        own = [self._placed(tensor.fresh()) for tensor in self._state]
        if self._state:
            self._streams[stream] = own
        return own

    def _placed(self, array: np.ndarray) -> Any:
        """A copy of an array in the GPU's memory."""
        return ort.OrtValue.ortvalue_from_numpy(array, "cuda", self._gpu)


def _copy(to: Any, value: Any) -> None:
    """Copy within the GPU's memory."""
    try:
        to.update_inplace(value)
    except TypeError:  # this ONNX Runtime (1.24, for one) takes arrays only: by way of the host
        to.update_inplace(value.numpy())
