"""A graph on a GPU: kernels built, weights uploaded, a mailbox, the states of its streams.

Source: CuPy documentation, "User-defined kernels" (raw modules) and "Memory management" (pinned
memory); CUDA runtime API, "Unified addressing": memory from cudaHostAlloc has one address, on the
host and in kernels.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from engine.backends.cuda.gpu import Gpu
from engine.backends.cuda.mailbox import MAX_SEQUENCE
from engine.backends.cuda.source import CudaSource
from engine.backends.cuda.streams import Stream, Streams
from feeds.errors import InputError

OPTIONS: Final = ("--std=c++17",)
NO_CODES: Final = np.zeros(0, dtype=np.uint8)


class LoadedGraph:
    """What both ways of launching a graph's kernels share.

    Parameters
    ----------
    gpu : Gpu
    source : CudaSource
    kernel : str
        Which of its kernels.

    Attributes
    ----------
    device, stream
        CuPy's, to be current where anything is launched.
    request, reply : ndarray of uint64
        In pinned memory.
    streams : Streams

    Raises
    ------
    InputError
        If the graph needs more shared memory than a block of this GPU has.
    """

    def __init__(self, gpu: Gpu, source: CudaSource, kernel: str) -> None:
        if source.shared_bytes > gpu.shared_bytes:
            raise InputError(
                "the model's values do not fit into the shared memory of one block",
                where=f"model.device cuda:{gpu.index} ({gpu.name})",
                expected=f"at most {gpu.shared_bytes} bytes",
                found=f"{source.shared_bytes} bytes",
                fix="use another backend, or a smaller model",
            )
        cupy = gpu.cupy
        self.gpu, self._source = gpu, source
        self.device = cupy.cuda.Device(gpu.index)
        self._sequence = 0
        with self.device:
            module = cupy.RawModule(code=source.code, options=OPTIONS, backend="nvrtc")
            self._kernel = module.get_function(kernel)
            # Also loads it, which nothing may have to do while a kernel stays on the GPU.
            self._kernel.max_dynamic_shared_size_bytes = source.shared_bytes
            self.stream = cupy.cuda.Stream(non_blocking=True)
            with self.stream:  # in order with the kernels: this stream waits for no other one
                self._weights = cupy.asarray(source.weights)
            self.stream.synchronize()
            self.request, self._request_at = self._pinned(source.request_words)
            self.reply, self._reply_at = self._pinned(source.reply_words)
        self.streams = Streams(source.state_bytes, self._allocate)

    @property
    def isa(self) -> str:
        """What computes."""
        return "sm_{}{} dp4a".format(*self.gpu.capability) + f" ({self.gpu.name})"

    def next_sequence(self) -> int:
        """The number of the next request."""
        self._sequence = (self._sequence + 1) & MAX_SEQUENCE
        return self._sequence

    def launch(self, *more: np.generic) -> None:
        """Launch the kernel, or let it be captured.

        Parameters
        ----------
        *more : numpy scalars
            Behind the request, the answer and the weights.

        Raises
        ------
        RuntimeError
            If CUDA refuses.
        """
        with self.device, self.stream:
            self._kernel(
                (1,),
                (self._source.threads,),
                (np.uint64(self._request_at), np.uint64(self._reply_at), self._weights, *more),
                shared_mem=self._source.shared_bytes,
            )

    def find_stream(self, stream: int) -> Stream:
        """A stream, made where it is new."""
        return self.streams.find(stream) or self.streams.begin(stream)

    def _pinned(self, words: int) -> tuple[np.ndarray, int]:
        """An array of 64-bit words of 0 that the GPU sees, and its address."""
        memory = self.gpu.cupy.cuda.alloc_pinned_memory(8 * words)
        array = np.frombuffer(memory, dtype=np.uint64, count=words)
        array[:] = 0
        return array, memory.ptr

    def _allocate(self, size: int) -> Any:
        with self.device, self.stream:
            return self.gpu.cupy.empty(size, dtype=np.uint8)
