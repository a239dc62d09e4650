"""ONNX Runtime's C functions: sessions that a kernel can run by an address.

The Python package brings the same library a second time, with its C interface. Its table of
functions only grows at its end, so a function is known by its place in it. Python's own session
objects cannot be run from a kernel: what they wrap is not handed out.

Source: ONNX Runtime, ``onnxruntime_c_api.h`` (``OrtApi``, in the order of its members).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

API_VERSION: Final = 17
LIBRARY: Final = "capi/libonnxruntime.so.{version}"
# Places of functions in the table.
_PLACES: Final = {
    "CreateStatus": 0,
    "GetErrorMessage": 2,
    "CreateEnv": 3,
    "CreateSessionFromArray": 8,
    "CreateSessionOptions": 10,
    "SetSessionExecutionMode": 13,
    "DisableCpuMemArena": 19,
    "SetSessionLogSeverityLevel": 22,
    "SetSessionGraphOptimizationLevel": 23,
    "SetIntraOpNumThreads": 24,
    "SetInterOpNumThreads": 25,
    "CreateRunOptions": 39,
    "CreateTensorWithDataAsOrtValue": 49,
    "CreateCpuMemoryInfo": 69,
    "ReleaseStatus": 93,
    "ReleaseSession": 95,
    "ReleaseValue": 96,
    "ReleaseRunOptions": 97,
    "ReleaseSessionOptions": 100,
    "AddSessionConfigEntry": 130,
    "RunWithBinding": 133,
    "CreateIoBinding": 134,
    "ReleaseIoBinding": 135,
    "BindInput": 136,
    "BindOutput": 137,
}
_FATAL: Final = 4  # of log severities
_ALLOCATOR: Final = 0  # OrtDeviceAllocator
_MEMORY: Final = 0  # OrtMemTypeDefault
# ONNXTensorElementDataType of what is bound.
_KINDS: Final = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}

_Pointer = ctypes.c_void_p
_Call = tuple[str, tuple[Any, ...]]


class _Base(ctypes.Structure):
    _fields_ = (
        ("GetApi", ctypes.CFUNCTYPE(_Pointer, ctypes.c_uint32)),
        ("GetVersionString", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    )


class OrtError(RuntimeError):
    """What ONNX Runtime says went wrong."""


class OrtApi:
    """The table of functions; use `find_api`.

    Parameters
    ----------
    table : int
        Its address.
    """

    def __init__(self, table: int) -> None:
        places = (_Pointer * (max(_PLACES.values()) + 1)).from_address(table)
        self.addresses: Final = {name: places[place] or 0 for name, place in _PLACES.items()}
        self.env: Final = _Pointer()
        self.memory: Final = _Pointer()
        self.call("CreateEnv", ctypes.c_int(_FATAL), b"octick", ctypes.byref(self.env))
        at = ctypes.byref(self.memory)
        self.call("CreateCpuMemoryInfo", ctypes.c_int(_ALLOCATOR), ctypes.c_int(_MEMORY), at)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that gives a status.

        Raises
        ------
        OrtError
            If the status is none of success.
        """
        kinds = [ctypes.c_char_p if isinstance(one, bytes) else _kind(one) for one in arguments]
        function = ctypes.CFUNCTYPE(_Pointer, *kinds)(self.addresses[name])
        status = function(*arguments)
        if status:
            raise OrtError(self.said(status))

    def said(self, status: int) -> str:
        """What a status says; it is released."""
        kind = ctypes.CFUNCTYPE(ctypes.c_char_p, _Pointer)
        text = kind(self.addresses["GetErrorMessage"])(status) or b""
        self.release("ReleaseStatus", _Pointer(status))
        return text.decode(errors="replace")

    def release(self, name: str, held: ctypes.c_void_p) -> None:
        """Let go of something of the library's."""
        ctypes.CFUNCTYPE(None, _Pointer)(self.addresses[name])(held)


def _kind(argument: Any) -> Any:
    return type(argument) if isinstance(argument, ctypes.c_int | ctypes.c_size_t) else _Pointer


@functools.cache
def find_api() -> OrtApi | None:
    """The C functions of the very ONNX Runtime that Python runs; None where they are not there."""
    path = Path(ort.__file__).parent / LIBRARY.format(version=ort.__version__)
    if not path.is_file():
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.OrtGetApiBase.restype = ctypes.POINTER(_Base)
        base = library.OrtGetApiBase().contents
    except (OSError, AttributeError):
        return None
    table = base.GetApi(API_VERSION)
    if not table or base.GetVersionString() != ort.__version__.encode():
        return None
    return OrtApi(table)


class OrtSession:
    """A model in a session on the CPU, with what is bound to it.

    Parameters
    ----------
    api : OrtApi
    data : bytes
        The ONNX model.
    threads : int
    config : mapping of str to str
        Entries of the session's config.

    Raises
    ------
    OrtError
        If ONNX Runtime does not take the model.
    """

    def __init__(self, api: OrtApi, data: bytes, threads: int, config: Mapping[str, str]) -> None:
        self._api = api
        self._held: list[tuple[str, ctypes.c_void_p]] = []
        self._kept: list[np.ndarray] = []
        options = _Pointer()
        api.call("CreateSessionOptions", ctypes.byref(options))
        try:
            for name, value in (
                ("SetIntraOpNumThreads", threads),
                ("SetInterOpNumThreads", 1),
                ("SetSessionExecutionMode", int(ort.ExecutionMode.ORT_SEQUENTIAL)),
                (
                    "SetSessionGraphOptimizationLevel",
                    int(ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
                ),
                ("SetSessionLogSeverityLevel", _FATAL),
            ):
                api.call(name, options, ctypes.c_int(value))
            api.call("DisableCpuMemArena", options)
            for key, entry in config.items():
                api.call("AddSessionConfigEntry", options, key.encode(), entry.encode())
            self._session = self._make(
                "ReleaseSession",
                "CreateSessionFromArray",
                *(api.env, data, ctypes.c_size_t(len(data)), options),
            )
            self._options = self._make("ReleaseRunOptions", "CreateRunOptions")
        finally:
            api.release("ReleaseSessionOptions", options)

    def _make(self, release: str, name: str, *arguments: Any) -> ctypes.c_void_p:
        made = _Pointer()
        self._api.call(name, *arguments, ctypes.byref(made))
        self._held.append((release, made))
        return made

    @property
    def run(self) -> tuple[int, int, int]:
        """Addresses: of the function that runs a binding, and of its first two arguments."""
        run = self._api.addresses["RunWithBinding"]
        return run, self._session.value or 0, self._options.value or 0

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> int:
        """The address of a binding that reads and writes these arrays, C order, in place.

        They are kept alive until the session is closed.
        """
        binding = self._make("ReleaseIoBinding", "CreateIoBinding", self._session)
        for name, arrays in (("BindInput", inputs), ("BindOutput", outputs)):
            for end, array in arrays.items():
                self._api.call(name, binding, end.encode(), self._value(array))
        return binding.value or 0

    def said(self, status: int) -> str:
        """What a status that a run gave says; it is released."""
        return self._api.said(status)

    def _value(self, array: np.ndarray) -> ctypes.c_void_p:
        assert array.flags.c_contiguous
        self._kept.append(array)
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        return self._make(
            "ReleaseValue",
            "CreateTensorWithDataAsOrtValue",
            *(self._api.memory, _Pointer(array.ctypes.data), ctypes.c_size_t(array.nbytes)),
            *(shape, ctypes.c_size_t(array.ndim), ctypes.c_int(_KINDS[array.dtype.name])),
        )

    def close(self) -> None:
        """Let go of the session and all bindings. Closing twice is fine."""
        while self._held:
            self._api.release(*self._held.pop())
        self._kept.clear()
