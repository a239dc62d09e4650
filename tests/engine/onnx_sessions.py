"""Both kinds of ONNX Runtime session on the CPU, and either of them failing when told to."""

from __future__ import annotations

import ctypes

import onnxruntime as ort
import pytest

from engine.backends import onnx_native, onnx_providers
from engine.backends.onnx import OnnxBackend
from engine.backends.ort_api import find_api

KINDS = ("native", "python")
GONE = "the device is gone"
_FAIL = 1


def use(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open sessions of one kind from now on."""
    if kind == "python":
        monkeypatch.setattr(onnx_providers, "find_api", lambda: None)
    elif find_api() is None:
        pytest.skip("this ONNX Runtime does not bring its C functions")


class Failing:
    """A backend's session that fails when told to, after it has written everything it writes.

    ``fails`` makes every run fail; ``after``, above 0, one behind so many that did not.
    """

    def __init__(self, backend: OnnxBackend, after: int = 0) -> None:
        self.fails = False
        self.failed = self._ran = 0
        self._after = after
        if backend._native is not None:
            self._spoil(backend._native)
            return
        assert backend._session is not None
        self._session: ort.InferenceSession = backend._session
        for owner in (backend, backend._runner):
            if owner is not None:
                owner._session = self  # type: ignore[assignment]

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        """As the session does."""
        self._session.run_with_iobinding(binding)
        if self._due():
            raise OSError(GONE)

    def _due(self) -> bool:
        due = self.fails or self._ran == self._after > 0
        self._ran = 0 if due else self._ran + 1
        self.failed += due
        return due

    def _spoil(self, runner: onnx_native.NativeRunner) -> None:
        address = ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(address, address, address, address)
        api = find_api()
        assert api is not None
        run = kind(api.addresses["RunWithBinding"])
        create = ctypes.CFUNCTYPE(address, ctypes.c_int, ctypes.c_char_p)(
            api.addresses["CreateStatus"]
        )

        def run_and_fail(session: int, options: int, binding: int) -> int:
            status: int = run(session, options, binding) or 0
            return create(_FAIL, GONE.encode()) if self._due() else status

        self._kept = kind(run_and_fail)
        at = ctypes.cast(self._kept, address).value
        runner._arena[onnx_native.RUN] = at
