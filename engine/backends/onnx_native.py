# Hot path: `step`, a free @njit function.
"""A model in ONNX Runtime that a kernel runs by itself, with state or without.

`step` has the form of a compiled step (`engine.backends.native_call`), so the hot path
goes from message to signal without Python here as well. The session reads and writes memory of its
own, bound once; a step copies the input there and the scores back, a few hundred bytes.

What a stream remembers is two sets of state arrays and two bindings between them: one reads set A
and writes set B, the other the reverse. A step that succeeds changes turns, so one that fails
leaves the state as it was. The block of a stream is laid out so that the bytes of a fresh one,
copied onto it, begin it anew: the turn, and set A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numba import carray, cfunc, njit
from numba.extending import intrinsic

from engine.backends.ends import Ends
from engine.backends.interface import BackendInfo
from engine.backends.native_call import (
    ALIGNMENT,
    STEP_FAILED,
    NativeModel,
    aligned,
    aligned_bytes,
    copy_bytes,
)
from engine.backends.onnx_streams import MAX_STREAMS
from engine.backends.ort_api import OrtSession
from engine.bundle import Bundle
from engine.handles import pointer
from engine.manifest import StateTensor
from feeds.c_functions import WORD, c_function

# Columns of the arena, int64.
RUN: Final = 0  # address of the function that runs a binding
SESSION: Final = 1
OPTIONS: Final = 2
X_AT: Final = 3
X_BYTES: Final = 4
OUT_AT: Final = 5
OUT_BYTES: Final = 6
MASK_AT: Final = 7
STATUS: Final = 8  # of the last step, where it failed and nobody has asked why
ARENA_FIELDS: Final = 9

_BINDINGS: Final = 2  # int64, `ALIGNMENT` before a stream's state


@intrinsic
@c_function(WORD, [WORD] * 3)
def _run_binding(typingctx, function, session, options, binding):  # type: ignore[no-untyped-def]
    """``RunWithBinding``; gives a status, 0 for success."""


@njit("int64(int64, int64, int64, int64)", cache=True)
def step(x, out, arena, state):  # type: ignore[no-untyped-def]
    """One inference.

    Parameters
    ----------
    x, out : int
        Addresses of the input and the scores, float32.
    arena : int
        Address of `ARENA_FIELDS` numbers.
    state : int
        Address of a stream's state.

    Returns
    -------
    int
        The mask of the value check, or `STEP_FAILED`: then nothing was written to ``out``.
    """
    of = carray(pointer(arena, np.int64), (ARENA_FIELDS,))
    bindings = carray(pointer(state - ALIGNMENT, np.int64), (_BINDINGS,))
    turn = carray(pointer(state, np.int64), (1,))
    copy_bytes(of[X_AT], x, of[X_BYTES])
    status = _run_binding(of[RUN], of[SESSION], of[OPTIONS], bindings[turn[0]])
    if status != 0:
        of[STATUS] = status
        return STEP_FAILED
    turn[0] = 1 - turn[0]
    copy_bytes(out, of[OUT_AT], of[OUT_BYTES])
    return np.int64(carray(pointer(of[MASK_AT], np.uint32), (1,))[0])


@cfunc("int64(int64, int64, int64, int64)", cache=True)
def called(x, out, arena, state):  # type: ignore[no-untyped-def]
    """`step` as a C function."""
    return step(x, out, arena, state)


class NativeRunner:
    """Runs a model on the CPU, each stream from its own state.

    Parameters
    ----------
    session : OrtSession
        Closed with the runner.
    bundle : Bundle
    info : BackendInfo
    checked : mapping of str to ndarray
        The value check's output, if the model has one, and where it is written.
    """

    def __init__(
        self,
        session: OrtSession,
        bundle: Bundle,
        info: BackendInfo,
        checked: Mapping[str, np.ndarray],
    ) -> None:
        self._names = (bundle.input_name, bundle.output_name)
        self._tensors: tuple[StateTensor, ...] = bundle.state(info.precision)
        self._checked = dict(checked)
        self._session: OrtSession | None = session
        self._own_x = (
            aligned_bytes(4 * bundle.n_features).view(np.float32).reshape(info.input_shape)
        )
        self._own_out = aligned_bytes(4 * bundle.n_outputs).view(np.float32).reshape(1, -1)
        self._no_mask = np.zeros(1, dtype=np.int32)
        self._arena = np.zeros(ARENA_FIELDS, dtype=np.int64)
        self._arena[RUN], self._arena[SESSION], self._arena[OPTIONS] = session.run
        for column, array in ((X_AT, self._own_x), (OUT_AT, self._own_out)):
            self._arena[column : column + 2] = array.ctypes.data, array.nbytes
        mask = next(iter(self._checked.values()), self._no_mask)
        self._arena[MASK_AT] = mask.ctypes.data
        self._arena_at = int(self._arena.ctypes.data)
        self._told: Final = self._arena.data  # a number of it is read three times as fast
        self._sizes = [aligned(tensor.nbytes) for tensor in self._tensors]
        self._fresh = self._fresh_state()
        self._blocks: list[np.ndarray | None] = []
        self._states: list[int] = []
        self._info, self._ends = info, Ends(info)

    def _fresh_state(self) -> np.ndarray:
        """The turn, and set A of a fresh stream."""
        fresh = np.zeros(ALIGNMENT + sum(self._sizes), dtype=np.uint8)
        for tensor, array in zip(self._tensors, self._set(fresh, 0), strict=True):
            array.fill(tensor.initial)
        return fresh

    def _set(self, state: np.ndarray, turn: int) -> list[np.ndarray]:
        """The arrays of set A (0) or B (1) in a stream's state."""
        at = ALIGNMENT + turn * sum(self._sizes)
        found = []
        for tensor, size in zip(self._tensors, self._sizes, strict=True):
            flat = state[at : at + tensor.nbytes].view(tensor.dtype)
            found.append(flat.reshape(tensor.shape))
            at += size
        return found

    def _begin(self, stream: int) -> int:
        """Address of a stream's state, made fresh where it has not begun."""
        assert 0 <= stream < MAX_STREAMS, f"stream {stream} of at most {MAX_STREAMS}"
        assert self._session is not None, "this backend is closed"
        missing = stream + 1 - len(self._states)
        self._states += [0] * missing
        self._blocks += [None] * missing
        if not self._states[stream]:
            block = aligned_bytes(ALIGNMENT + len(self._fresh) + sum(self._sizes))
            state = block[ALIGNMENT:]
            state[: len(self._fresh)] = self._fresh
            sets = self._set(state, 0), self._set(state, 1)
            block[: 8 * _BINDINGS].view(np.int64)[:] = [
                self._bind(sets[turn], sets[1 - turn]) for turn in range(_BINDINGS)
            ]
            self._blocks[stream] = state
            self._states[stream] = int(state.ctypes.data)
        return self._states[stream]

    def _bind(self, read: list[np.ndarray], written: list[np.ndarray]) -> int:
        assert self._session is not None
        inputs = {self._names[0]: self._own_x}
        outputs = {self._names[1]: self._own_out, **self._checked}
        for tensor, before, after in zip(self._tensors, read, written, strict=True):
            inputs[tensor.input], outputs[tensor.output] = before, after
        return self._session.bind(inputs, outputs)

    def model(self, n_streams: int) -> NativeModel:
        """What a kernel calls for streams 0 to ``n_streams`` - 1."""
        states = np.array([self._begin(stream) for stream in range(n_streams)], dtype=np.int64)
        fresh = int(self._fresh.ctypes.data)
        return NativeModel(called.address, self._arena_at, fresh, len(self._fresh), states)

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
        ends = self._ends
        if x is not ends.x or out is not ends.out:
            ends.take(x, out)
        try:  # nothing is paid for it where the stream has begun
            state = self._states[stream] if stream >= 0 else 0
        except IndexError:
            state = 0
        if not state:
            state = self._begin(stream)
        if self._told[STATUS]:  # of a kernel's step that failed
            self._said()
        if step(ends.x_at, ends.out_at, self._arena_at, state) == STEP_FAILED:
            raise RuntimeError(f"inference failed: {self._said()}")

    def _said(self) -> str:
        """Why the last step failed, which is forgotten with it."""
        assert self._session is not None
        status, self._told[STATUS] = self._told[STATUS], 0
        return self._session.said(status)

    def reset(self, stream: int) -> None:
        """Start a stream afresh; nothing to do for one that has not begun."""
        block = self._blocks[stream] if stream < len(self._blocks) else None
        if block is not None:
            block[: len(self._fresh)] = self._fresh

    def current(self, stream: int) -> dict[str, np.ndarray]:
        """What a stream's next inference reads, copied, by the graph input's name."""
        block = self._blocks[stream] if stream < len(self._blocks) else None
        state = self._fresh if block is None else block
        arrays = self._set(state, int(state[:8].view(np.int64)[0]))
        return {t.input: a.copy() for t, a in zip(self._tensors, arrays, strict=True)}

    def forget(self) -> None:
        """Begin every stream afresh."""
        for stream in range(len(self._blocks)):
            self.reset(stream)

    def close(self) -> None:
        """Let go of the session; the addresses of `model` are good no more."""
        if self._session is not None:
            self._session.close()
            self._session = None
        self._states.clear()
        self._blocks.clear()
        self._ends = Ends(self._info)
