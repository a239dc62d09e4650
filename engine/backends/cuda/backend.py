"""The `cuda` backend; what it is, and its two devices: see `engine.backends.cuda`."""

from __future__ import annotations

from typing import ClassVar, Self

from engine.backends.cuda.device import CapturedDevice
from engine.backends.cuda.gpu import find_gpu, parse_device
from engine.backends.cuda.loaded import LoadedGraph
from engine.backends.cuda.persistent import PersistentDevice
from engine.backends.cuda.prelude import SERVE_KERNEL, STEP_KERNEL
from engine.backends.cuda.source import generate
from engine.backends.graph_backend import GraphBackend, GraphDevice
from engine.backends.integer_graph import IntegerGraph
from engine.bundle import Bundle
from feeds.errors import InputError


class CudaBackend(GraphBackend):
    """A bundle on an NVIDIA GPU; devices ``cuda:0`` and ``cuda:0/persistent``."""

    name: ClassVar[str] = "cuda"

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """The first GPU, both ways."""
        return ("cuda:0", "cuda:0/persistent")

    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        """Open a bundle's model; see `Backend.open`. Where there is no GPU, says so at once."""
        find_gpu(parse_device(device)[0])
        return super().open(bundle, device, threads=threads, precision=precision)

    @classmethod
    def open_device(cls, graph: IntegerGraph, device: str) -> GraphDevice:
        """A device that runs this graph; see `GraphBackend.open_device`."""
        index, persistent = parse_device(device)
        gpu, source = find_gpu(index), generate(graph)
        try:
            if persistent:
                return PersistentDevice(LoadedGraph(gpu, source, SERVE_KERNEL))
            return CapturedDevice(LoadedGraph(gpu, source, STEP_KERNEL))
        except gpu.errors as error:
            raise InputError(
                "the GPU cannot take the model",
                where=f"model.device {device} ({gpu.name}, {gpu.library})",
                found=f"{type(error).__name__}: {error}",
                fix="bring CuPy, NVRTC and the driver to one CUDA version, or use another backend",
            ) from None
