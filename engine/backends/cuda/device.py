"""``cuda:0``: the kernel of one step, captured in a CUDA graph and launched for each.

Source: CuPy documentation, "Stream.begin_capture" and "cuda.Graph"; CUDA C++ Programming Guide,
"CUDA Graphs".
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from engine.backends.cuda.loaded import LoadedGraph
from engine.backends.cuda.mailbox import PENDING, collect, post
from engine.backends.cuda.source import STEP

POLLS: Final = 1 << 16  # about 0.1 ms; then the driver is asked how the launch went


class CapturedDevice:
    """A graph whose kernel is launched at every step; see `engine.backends.graph_backend`.

    Parameters
    ----------
    loaded : LoadedGraph
        With the kernel of one step.
    """

    def __init__(self, loaded: LoadedGraph) -> None:
        self._loaded = loaded
        self.isa, self.library = loaded.isa, loaded.gpu.library
        with loaded.device, loaded.stream:
            loaded.stream.begin_capture()
            loaded.launch()
            self._graph: Any = loaded.stream.end_capture()
            self._graph.upload(loaded.stream)

    def step(self, stream: int, codes: np.ndarray, out: np.ndarray) -> int:
        """One inference; see `GraphDevice.step`."""
        loaded = self._loaded
        own = loaded.find_stream(stream)
        sequence = loaded.next_sequence()
        post(loaded.request, codes, sequence, STEP, own.position, own.address)
        with loaded.device:
            self._graph.launch(loaded.stream)
        mask = collect(loaded.reply, out, sequence, 0, POLLS)
        if mask == PENDING:
            loaded.stream.synchronize()  # raises what went wrong on the GPU
            mask = collect(loaded.reply, out, sequence, 0, POLLS)
        if mask < 0:
            raise RuntimeError("the kernel ended without an answer")
        own.advance()
        return mask

    def reset(self, stream: int) -> None:
        """Start a stream afresh."""
        self._loaded.streams.reset(stream)

    def close(self) -> None:
        """Give the GPU back."""
        del self._graph, self._loaded
