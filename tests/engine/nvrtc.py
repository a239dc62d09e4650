"""NVRTC by ctypes: CUDA C++ to PTX, with no GPU and no driver.

Source: NVRTC documentation, "User Interface".
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
from pathlib import Path


def find_nvrtc() -> ctypes.CDLL | None:
    """The library of the wheel ``nvidia-cuda-nvrtc-cu12``, or the system's; None without one."""
    names: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        names += [str(path) for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*[0-9]"))]
    for name in (*names, ctypes.util.find_library("nvrtc")):
        if name:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
    return None


def architectures(nvrtc: ctypes.CDLL) -> list[int]:
    """Compute capabilities that it compiles for: 70, 75, …"""
    count = ctypes.c_int()
    _check(nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(nvrtc.nvrtcGetSupportedArchs(found))
    return list(found)


def compile_ptx(nvrtc: ctypes.CDLL, code: str, architecture: int, options: tuple[str, ...]) -> str:
    """PTX of a source; an AssertionError with the compiler's words where it refuses."""
    program = ctypes.c_void_p()
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None)
    )
    flags = [f"--gpu-architecture=compute_{architecture}".encode()]
    flags += [option.encode() for option in options]
    status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    assert status == 0, log
    ptx = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    _check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return ptx


def _text(size_of: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: object) -> str:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(get(program, text))
    return text.value.decode()


def _check(status: int) -> None:
    assert status == 0, f"NVRTC error {status}"
