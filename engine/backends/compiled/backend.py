"""The `compiled` backend: a whole step in one native call, from float32 inputs to float32 scores.

Devices are ``cpu`` (the fastest instruction set that is there) and ``cpu:vnni``, ``cpu:avxvnni``,
``cpu:avx2``, ``cpu:plain``; all give the same bits. Convolutions compute their newest column only,
from ring buffers. Nothing is allocated in a step, and nothing is compiled after opening.
"""

from __future__ import annotations

from typing import ClassVar

import numba
import numpy as np

from engine.backends.compiled.isa import DEVICE, available_isas, choose_isa
from engine.backends.compiled.native_step import native_step
from engine.backends.compiled.planning import Planner
from engine.backends.ends import Ends
from engine.backends.graph_backend import MAX_STREAMS, GraphBackend
from engine.backends.integer_graph import IntegerGraph
from engine.backends.interface import BackendInfo
from engine.backends.native_call import NativeModel, aligned_bytes
from engine.bundle import Bundle


class CompiledGraph:
    """A graph's native step with its memory; a `GraphDevice` where it runs from codes.

    Parameters
    ----------
    graph : IntegerGraph
    device : str
    from_codes : bool
        Whether a step takes codes and gives int32, or takes float32 and gives float32.

    Attributes
    ----------
    native : NativeStep
    run : callable
        One step between addresses: input, output, arena, state. Gives the value check's mask.
    arena : int
        Address of weights and values.
    states : list of int
        Address of each stream's state; 0 where it has not begun.
    """

    def __init__(self, graph: IntegerGraph, device: str, *, from_codes: bool) -> None:
        isa = choose_isa(device)
        planner = Planner(graph, isa, from_codes=from_codes)
        self.isa = isa.name
        self.library = f"numba {numba.__version__}"
        self.native = native_step(planner.plan)
        self.run = self.native.run
        self._block = planner.arena
        self.arena = int(planner.arena.ctypes.data)
        self._fresh = planner.state
        self._states: list[np.ndarray | None] = []
        self.states: list[int] = []

    def begin(self, stream: int) -> int:
        """Address of a stream's state, made fresh where it has not begun."""
        assert 0 <= stream < MAX_STREAMS, f"stream {stream} of at most {MAX_STREAMS}"
        missing = stream + 1 - len(self.states)
        self.states += [0] * missing
        self._states += [None] * missing
        if not self.states[stream]:
            block = aligned_bytes(len(self._fresh))
            block[:] = self._fresh
            self._states[stream] = block
            self.states[stream] = int(block.ctypes.data)
        return self.states[stream]

    def model(self, n_streams: int) -> NativeModel:
        """What a kernel calls for streams 0 to ``n_streams`` - 1."""
        states = np.array([self.begin(stream) for stream in range(n_streams)], dtype=np.int64)
        fresh = int(self._fresh.ctypes.data)
        return NativeModel(self.native.address, self.arena, fresh, len(self._fresh), states)

    def step(self, stream: int, codes: np.ndarray, out: np.ndarray) -> int:
        """One inference; see `engine.backends.graph_backend.GraphDevice.step`."""
        assert codes.flags.c_contiguous
        assert out.flags.c_contiguous
        state = self.begin(stream)
        return self.run(codes.ctypes.data, out.ctypes.data, self.arena, state)

    def reset(self, stream: int) -> None:
        """Start a stream afresh; nothing to do for one that has not begun."""
        block = self._states[stream] if stream < len(self._states) else None
        if block is not None:
            block[:] = self._fresh

    def close(self) -> None:
        """Let go of every stream."""
        self.states.clear()
        self._states.clear()


class CompiledBackend(GraphBackend):
    """One bundle's model as native code; see `engine.backends.interface.Backend`."""

    name: ClassVar[str] = "compiled"

    def __init__(
        self, bundle: Bundle, graph: IntegerGraph, device: CompiledGraph, info: BackendInfo
    ) -> None:
        super().__init__(bundle, graph, device, info)
        self._native = device
        # What a step needs, one look away.
        self._run, self._arena, self._states = device.run, device.arena, device.states
        self._ends = Ends(info)

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """What this CPU can run: the fastest of its instruction sets, and each by name."""
        return (DEVICE, *(f"{DEVICE}:{isa.name}" for isa in available_isas()))

    @classmethod
    def open_device(cls, graph: IntegerGraph, device: str) -> CompiledGraph:
        """A part of a model; see `GraphBackend.open_device`."""
        return CompiledGraph(graph, device, from_codes=True)

    @classmethod
    def open_model(cls, graph: IntegerGraph, device: str) -> CompiledGraph:
        """A whole model, with both of its ends in the native step."""
        return CompiledGraph(graph, device, from_codes=False)

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        """Run the model from ``x`` into ``out``; see `Backend.infer`."""
        ends = self._ends
        if x is not ends.x or out is not ends.out:
            ends.take(x, out)
        try:  # nothing is paid for it where the stream has begun
            state = self._states[stream] if stream >= 0 else 0
        except IndexError:
            state = 0
        if not state:
            state = self._native.begin(stream)
        return self._run(ends.x_at, ends.out_at, self._arena, state)

    def native_model(self, n_streams: int) -> NativeModel:
        """The model as `engine.answering.serve` calls it; good until this backend is closed."""
        return self._native.model(n_streams)

    def close(self) -> None:
        """Drop streams and the caller's arrays."""
        super().close()
        self._ends = Ends(self._info)
