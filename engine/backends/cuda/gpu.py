"""Finding CuPy and a GPU, or saying in one line why not.

Source: CuPy documentation, "cupy.cuda.Device" and "CUDA runtime API"; CUDA C++ Programming Guide,
"Compute Capabilities".
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Any, Final

from feeds.errors import InputError

MIN_CAPABILITY: Final = (7, 0)  # dp4a since 6.1; a memory model for what the host writes since 7.0
PERSISTENT: Final = "/persistent"
_DEVICE: Final = re.compile(rf"cuda:(\d{{1,3}})({PERSISTENT})?")
_WHERE: Final = "model.backend cuda"
_OTHER: Final = "or use another backend"


@dataclass(frozen=True)
class Gpu:
    """One GPU, found and fit.

    Attributes
    ----------
    cupy : module
    index : int
    name : str
        As its driver calls it.
    capability : tuple of int
        Major and minor.
    shared_bytes : int
        Shared memory that one block can have.
    ends_long_kernels : bool
        Whether the driver ends kernels that run for long, as on a GPU with a display.
    cuda : str
        Version of the CUDA runtime.
    """

    cupy: Any = field(repr=False)
    index: int
    name: str
    capability: tuple[int, int]
    shared_bytes: int
    ends_long_kernels: bool
    cuda: str

    @property
    def library(self) -> str:
        """What builds and launches kernels, with versions."""
        return f"CuPy {self.cupy.__version__}, CUDA {self.cuda}"

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What building, uploading and capturing may raise; they have no common base."""
        return (RuntimeError, MemoryError, OSError, self.cupy.cuda.compiler.CompileException)


def parse_device(device: str) -> tuple[int, bool]:
    """Index of the GPU of a device name, and whether the kernel is to stay on it.

    Raises
    ------
    InputError
        If there is no such name.
    """
    found = _DEVICE.fullmatch(device)
    if found is None:
        raise InputError(
            "unknown device of the cuda backend",
            where="model.device",
            expected=f"cuda:0, or cuda:0{PERSISTENT}, or another GPU's number",
            found=repr(device),
        )
    return int(found[1]), found[2] is not None


def find_gpu(index: int) -> Gpu:
    """A GPU by its number.

    Raises
    ------
    InputError
        If CuPy, a driver or the GPU is missing, or the GPU is too old.
    """
    cupy = _import_cupy()
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except RuntimeError as error:  # no driver, or one that is too old
        raise InputError(
            "no CUDA GPU can be used",
            where=_WHERE,
            found=str(error),
            fix=f"install a driver that fits CuPy's CUDA version, {_OTHER}",
        ) from None
    if index >= count:
        raise InputError(
            "no such GPU",
            where=f"model.device cuda:{index}",
            expected=f"one of {count}, counted from 0",
            found=str(index),
            fix=_OTHER.removeprefix("or "),
        )
    attributes = cupy.cuda.Device(index).attributes
    capability = tuple(attributes[f"ComputeCapability{part}"] for part in ("Major", "Minor"))
    if capability < MIN_CAPABILITY:
        raise InputError(
            "the GPU is too old",
            where=f"model.device cuda:{index}",
            expected="compute capability {}.{} or newer".format(*MIN_CAPABILITY),
            found="{}.{}".format(*capability),
            fix=_OTHER.removeprefix("or "),
        )
    version = runtime.runtimeGetVersion()
    return Gpu(
        cupy=cupy,
        index=index,
        name=runtime.getDeviceProperties(index)["name"].decode(),
        capability=(capability[0], capability[1]),
        shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
        ends_long_kernels=bool(attributes["KernelExecTimeout"]),
        cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


def _import_cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        raise InputError(
            "the cuda backend needs CuPy" if missing else "CuPy cannot be imported",
            where=_WHERE,
            found="" if missing else str(error),
            fix=f"install it with pip install 'octick[gpu]', {_OTHER}",
        ) from None
