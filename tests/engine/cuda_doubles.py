"""As much of CuPy as the `cuda` backend uses, over kernels that g++ compiles for this CPU.

The generated source is the one that a GPU would get; `cuda_on_cpu.h` makes C++ of it. A stream is
a thread that runs what is launched, in order, so launches return before their kernels end, a
kernel may stay while the host goes on, and what a capture records runs only when its graph is
launched.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

SHIM = Path(__file__).with_name("cuda_on_cpu.h")
KERNEL = re.compile(r"extern \"C\" __global__ void [^(]*\([^)]*\)\s*(\w+)\(")
NOT_READY = 600
LAUNCH_FAILURE = 719
RUBBISH = 0x5A


class CUDARuntimeError(RuntimeError):
    """An error of the CUDA runtime."""


class CompileException(Exception):  # noqa: N818 (CuPy's name)
    """What NVRTC has against a source."""


@dataclass
class Circumstances:
    """What a test may set.

    Attributes
    ----------
    backwards : bool
        Whether the threads of a block run from the last to the first.
    refused_launches : int
        How many launches to refuse.
    lost_launches : int
        How many to accept and never run.
    failing_kernels : int
        How many to end with an error and no work done.
    devices : int
    attributes : dict
        Of each device.
    launches : int
        Kernels that were started.
    """

    backwards: bool = False
    refused_launches: int = 0
    lost_launches: int = 0
    failing_kernels: int = 0
    devices: int = 1
    attributes: dict[str, int] = field(
        default_factory=lambda: {
            "ComputeCapabilityMajor": 9,
            "ComputeCapabilityMinor": 0,
            "MaxSharedMemoryPerBlockOptin": 227 << 10,
            "KernelExecTimeout": 0,
        }
    )
    launches: int = 0

    def take(self, name: str) -> bool:
        """One of a number of troubles, where any is left."""
        left = getattr(self, name)
        setattr(self, name, max(left - 1, 0))
        return bool(left > 0)


_built: dict[str, ctypes.CDLL] = {}


def build(code: str, folder: Path) -> ctypes.CDLL:
    """The kernels of a source as functions ``run_NAME(threads, shared, backwards, words)``."""
    found = _built.get(code)
    if found is None:
        name = hashlib.sha256(code.encode()).hexdigest()[:16]
        source, library = folder / f"{name}.cpp", folder / f"{name}.so"
        ends = "".join(
            f'extern "C" int run_{kernel}(unsigned threads, unsigned shared, int backwards,'
            f" const uint64_t* words)\n"
            f"{{ return launch({kernel}, threads, shared, backwards, words); }}\n"
            for kernel in KERNEL.findall(code)
        )
        source.write_text(f'#include "{SHIM}"\n{code}\n{ends}')
        options = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC"]
        done = subprocess.run(
            [shutil.which("g++") or "g++", *options, str(source), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CompileException(done.stderr)
        found = _built[code] = ctypes.CDLL(str(library))
    return found


class _Thread(threading.local):
    device: int
    streams: list[Stream]

    def __init__(self) -> None:
        self.device = 0
        self.streams = []


class Memory:
    """A `cupy.ndarray`: only its address is used."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.data = SimpleNamespace(ptr=array.ctypes.data)


class Stream:
    """A thread that does one thing after the other."""

    _pointers = itertools.count(1)

    def __init__(self, gpu: FakeGpu, non_blocking: bool) -> None:
        assert non_blocking, "a stream that waits for the default one"
        self._gpu = gpu
        self.ptr = next(self._pointers)
        self.device_id = gpu.thread.device
        self.error = 0
        self.captured: list[Callable[[], int]] | None = None
        self._work: queue.SimpleQueue[Callable[[], int] | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._left = 0
        gpu.streams[self.ptr] = self
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if not self.error:
                self.error = work()
            with self._idle:
                self._left -= 1
                self._idle.notify_all()

    def put(self, work: Callable[[], int]) -> None:
        """Record, or queue."""
        if self.captured is not None:
            self.captured.append(work)
            return
        if self.error:
            raise CUDARuntimeError(f"error {self.error}")
        if self._gpu.circumstances.take("refused_launches"):
            raise CUDARuntimeError("the launch was refused")
        if self._gpu.circumstances.take("lost_launches"):
            return
        with self._idle:
            self._left += 1
        self._work.put(work)

    def end(self) -> None:
        """Let the thread end, behind what it has to do."""
        self._work.put(None)

    def query(self) -> int:
        """Status, as cudaStreamQuery; lets the kernel have the core that its host waits on."""
        os.sched_yield()
        with self._idle:
            return self.error or (NOT_READY if self._left else 0)

    def synchronize(self) -> None:
        """Wait for all of it."""
        with self._idle:
            self._idle.wait_for(lambda: not self._left)
        if self.error:
            raise CUDARuntimeError(f"error {self.error}")

    def begin_capture(self) -> None:
        """Record what comes."""
        assert self.captured is None
        self.captured = []

    def end_capture(self) -> Graph:
        """What was recorded."""
        assert self.captured is not None
        graph, self.captured = Graph(self.captured), None
        return graph

    def __enter__(self) -> Stream:
        assert self.device_id == self._gpu.thread.device, "a stream of another device"
        self._gpu.thread.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._gpu.thread.streams.pop() is self


class Graph:
    """A captured graph."""

    def __init__(self, work: list[Callable[[], int]]) -> None:
        self._work = work

    def upload(self, stream: Stream) -> None:
        """Nothing that could be seen."""

    def launch(self, stream: Stream) -> None:
        """Queue all of it."""
        stream.put(lambda: next((status for work in self._work if (status := work())), 0))


class Device:
    """One of the devices, current within ``with``."""

    def __init__(self, gpu: FakeGpu, index: int) -> None:
        assert 0 <= index < gpu.circumstances.devices
        self._gpu, self.id = gpu, index
        self._before: list[int] = []

    @property
    def attributes(self) -> dict[str, int]:
        """As CUDA tells them."""
        return self._gpu.circumstances.attributes

    def __enter__(self) -> Device:
        self._before.append(self._gpu.thread.device)
        self._gpu.thread.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        self._gpu.thread.device = self._before.pop()


class Kernel:
    """A `cupy.RawKernel`."""

    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, gpu: FakeGpu, function: Any) -> None:
        self._gpu, self._function = gpu, function

    def __call__(
        self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        assert grid == (1,), "one block"
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        words = np.zeros(len(args), dtype=np.uint64)
        for i, arg in enumerate(args):
            if isinstance(arg, Memory):
                words[i] = arg.data.ptr
            else:
                assert isinstance(arg, np.generic), f"{arg!r} has no size"
                words[i : i + 1].view(np.uint8)[: arg.itemsize] = np.frombuffer(arg, np.uint8)

        def run() -> int:
            circumstances = self._gpu.circumstances
            if circumstances.take("failing_kernels"):
                return LAUNCH_FAILURE
            circumstances.launches += 1
            pointer = words.ctypes.data_as(ctypes.c_void_p)
            status = self._function(block[0], shared_mem, circumstances.backwards, pointer)
            return LAUNCH_FAILURE if status else 0

        self._gpu.thread.streams[-1].put(run)


class FakeGpu:
    """One process's view of its GPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.circumstances = Circumstances()
        self.thread = _Thread()
        self.streams: dict[int, Stream] = {}

    def end(self) -> None:
        """Let all threads end."""
        for stream in self.streams.values():
            stream.end()

    def cupy(self) -> ModuleType:
        """A module that stands in for CuPy."""
        module = ModuleType("cupy")
        runtime = SimpleNamespace(
            getDeviceCount=lambda: self.circumstances.devices,
            getDeviceProperties=lambda index: {"name": b"g++"},
            runtimeGetVersion=lambda: 12090,
            streamQuery=lambda pointer: self.streams[pointer].query(),
        )
        cuda = SimpleNamespace(
            Device=lambda index: Device(self, index),
            Stream=lambda non_blocking: Stream(self, non_blocking),
            alloc_pinned_memory=pinned,
            compiler=SimpleNamespace(CompileException=CompileException),
            runtime=runtime,
        )
        offered = {
            "__version__": "0",
            "RawModule": self._module,
            "asarray": self._upload,
            "cuda": cuda,
            "empty": self._allocate,
        }
        for name, value in offered.items():
            setattr(module, name, value)
        return module

    def _allocate(self, size: int, dtype: Any) -> Memory:
        assert self.thread.streams, "memory of the default stream"
        return Memory(np.full(size, RUBBISH, dtype=dtype))

    def _upload(self, array: np.ndarray) -> Memory:
        memory = self._allocate(array.size, array.dtype)

        def copy() -> int:
            memory.array[:] = array
            return 0

        self.thread.streams[-1].put(copy)
        return memory

    def _module(self, *, code: str, options: tuple[str, ...], backend: str) -> SimpleNamespace:
        assert backend == "nvrtc"
        library = build(code, self.folder)
        return SimpleNamespace(
            get_function=lambda name: Kernel(self, getattr(library, f"run_{name}"))
        )


def pinned(size: int) -> Any:
    """A `PinnedMemoryPointer`: a buffer of bytes with its address."""
    address = {"ptr": property(ctypes.addressof)}
    return type("PinnedMemoryPointer", (ctypes.c_byte * size,), address)()
