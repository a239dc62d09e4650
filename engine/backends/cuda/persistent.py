"""``cuda:0/persistent``: one kernel that stays on the GPU and serves requests as they come.

It leaves when it is told to, or when no request came for long, and says so in the last word of the
answer: the number of its launch, and that of the request it no longer waited for. A request that
it missed by that is served by the next one.
"""

from __future__ import annotations

from typing import Final, NoReturn

import numpy as np

from engine.backends.cuda.loaded import NO_CODES, LoadedGraph
from engine.backends.cuda.mailbox import MAX_SEQUENCE, RETIRED, collect, post
from engine.backends.cuda.source import STEP, STOP
from feeds.errors import InputError

IDLE_POLLS: Final = 1 << 21  # a poll is a read over the bus, about 1 µs: a few seconds
LOOK_POLLS: Final = 1 << 14  # of memory, about 20 µs, between two looks at the kernel itself
MAX_LOOKS: Final = 1 << 17  # a few seconds; then it is taken for dead
_SUCCESS: Final = 0  # cudaSuccess
_NOT_READY: Final = 600  # cudaErrorNotReady

# Of devices whose kernel does not end: what it may still touch is kept.
_abandoned: list[LoadedGraph] = []


class PersistentDevice:
    """A graph whose kernel stays; see `engine.backends.graph_backend.GraphDevice`.

    Parameters
    ----------
    loaded : LoadedGraph
        With the kernel that serves.
    idle_polls : int
        How often the kernel looks in vain before it leaves.
    max_looks : int
        How often the host looks in vain, `LOOK_POLLS` reads each, before it gives up.

    Raises
    ------
    InputError
        If the driver would end such a kernel.
    """

    def __init__(
        self, loaded: LoadedGraph, *, idle_polls: int = IDLE_POLLS, max_looks: int = MAX_LOOKS
    ) -> None:
        gpu = loaded.gpu
        if gpu.ends_long_kernels:
            raise InputError(
                "this GPU's driver ends kernels that run for long, as it drives a display",
                where=f"model.device cuda:{gpu.index}/persistent ({gpu.name})",
                fix=f"use cuda:{gpu.index}, or a GPU without a display",
            )
        self._loaded = loaded
        self._idle_polls, self._max_looks = np.uint32(idle_polls), max_looks
        self._launches = 0
        self._serving = False
        self._failed = ""
        self.isa, self.library = loaded.isa, gpu.library

    def step(self, stream: int, codes: np.ndarray, out: np.ndarray) -> int:
        """One inference; see `GraphDevice.step`."""
        if self._failed:
            raise RuntimeError(self._failed)
        loaded = self._loaded
        own = loaded.streams.find(stream)
        if own is None:
            if loaded.streams.full:
                self._pause()  # allocation would wait for the kernel
            own = loaded.streams.begin(stream)
        sequence = loaded.next_sequence()
        if not self._serving:
            self._launch(sequence)
        post(loaded.request, codes, sequence, STEP, own.position, own.address)
        for _ in range(self._max_looks):
            mask = collect(loaded.reply, out, sequence, self._launches, LOOK_POLLS)
            if mask >= 0:
                own.advance()
                return mask
            if mask == RETIRED:
                self._end()
                self._launch(sequence)
            else:
                self._check()
        self._fail("the kernel gives no answer")

    def reset(self, stream: int) -> None:
        """Start a stream afresh."""
        self._loaded.streams.reset(stream)

    def close(self) -> None:
        """Let the kernel leave, and give the GPU back."""
        try:
            if not self._failed:
                self._pause()
        except RuntimeError:
            pass
        if self._failed:
            _abandoned.append(self._loaded)
        del self._loaded

    def _launch(self, sequence: int) -> None:
        """Let a kernel serve from this request on."""
        self._launches = (self._launches + 1) & MAX_SEQUENCE
        launch = np.uint32(self._launches)
        self._loaded.launch(np.uint32(sequence), launch, self._idle_polls)
        self._serving = True

    def _pause(self) -> None:
        """Let the kernel leave, until the next step."""
        if not self._serving:
            return
        loaded = self._loaded
        sequence = loaded.next_sequence()
        post(loaded.request, NO_CODES, sequence, STOP, 0, 0)
        nothing = np.zeros(len(loaded.reply) - 2, dtype=np.int32)
        for _ in range(self._max_looks):
            if collect(loaded.reply, nothing, sequence, self._launches, LOOK_POLLS) == RETIRED:
                self._end()
                return
            self._check()
        self._fail("the kernel does not stop")

    def _end(self) -> None:
        """A kernel that said it leaves has left."""
        self._serving = False
        self._loaded.stream.synchronize()

    def _check(self) -> None:
        """Whether the kernel runs, or ran to its end."""
        status = self._loaded.gpu.cupy.cuda.runtime.streamQuery(self._loaded.stream.ptr)
        if status not in (_SUCCESS, _NOT_READY):
            self._fail(f"the kernel failed with CUDA error {status}")

    def _fail(self, what: str) -> NoReturn:
        self._failed = what
        raise RuntimeError(what)
