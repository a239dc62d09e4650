"""The models that answer: one serving, in INT8 and FP32, and the one before it for a rollback."""

from __future__ import annotations

from typing import Final

import numpy as np

from engine.backends.interface import Backend
from engine.backends.native_call import NativeModel
from engine.backends.registry import open_backend
from engine.bundle import Bundle
from engine.model_input import normalised
from engine.recent import Recent
from engine.trust import MODE_FP32, MODE_INT8, MODES

CATCH_UP_ROWS: Final = 64  # that a model with state is run over before it takes over a stream


class Loaded:
    """A bundle with what runs it.

    Parameters
    ----------
    bundle : Bundle
    backend : Backend
        Opened at the config's precision.

    Attributes
    ----------
    mode : int
        Of ``backend``: MODE_INT8 or MODE_FP32.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        info = backend.info()
        self.mode = MODE_FP32 if info.precision == "fp32" else MODE_INT8
        self._threads = info.threads
        self._backends = {self.mode: backend}

    def backend(self, mode: int) -> Backend:
        """What answers in a mode; the FP32 twin is opened when it is first asked for.

        It is always ONNX Runtime's on the CPU: what takes over from a device that failed must not
        depend on it.
        """
        found = self._backends.get(mode)
        if found is None:
            precision = MODES[mode].lower()
            found = open_backend(
                "onnx", self.bundle, "cpu", threads=self._threads, precision=precision
            )
            self._backends[mode] = found
        return found

    def has_state(self, mode: int) -> bool:
        """Whether the model of a mode remembers anything from one inference to the next."""
        return bool(self.bundle.state(MODES[mode].lower()))

    def close(self) -> None:
        """Give both back."""
        for backend in self._backends.values():
            backend.close()
        self._backends = {}


class Serving:
    """Runs the serving model; swaps it for another between two inferences.

    Parameters
    ----------
    loaded : Loaded
    n_instruments : int
    recent : Recent
        Where a model that takes over a stream with state catches up from.
    """

    def __init__(self, loaded: Loaded, n_instruments: int, recent: Recent) -> None:
        self.loaded = loaded
        self.previous: Loaded | None = None
        self._recent = recent
        self._mode = -1
        self._behind = np.zeros(n_instruments, dtype=bool)
        self._any_behind = False
        self._scratch = np.zeros(loaded.bundle.n_outputs, dtype=np.float32)
        self._x = np.zeros((1, loaded.bundle.n_features), dtype=np.float32)
        self.backend = loaded.backend(loaded.mode)
        self._native_of: Backend | None = None
        self._native: NativeModel | None = None
        self._spare: NativeModel | None = None
        self.switch(loaded.mode)
        self._behind[:] = self._any_behind = False  # nothing to catch up with yet

    def switch(self, mode: int) -> None:
        """Let the model of a mode answer from the next inference on."""
        if mode != self._mode:
            self._mode = mode
            self.backend = self.loaded.backend(mode)
            self._any_behind = self.loaded.has_state(mode)
            self._behind[:] = self._any_behind

    def replace(self, loaded: Loaded) -> Loaded | None:
        """Serve another bundle; returns the one that no rollback can reach any more."""
        retired = self.previous
        self.previous, self.loaded = self.loaded, loaded
        mode, self._mode = self._mode, -1
        self.switch(mode)
        return None if retired is loaded else retired

    def native_model(self) -> NativeModel | None:
        """What a kernel can call in place of `infer`; None where only `infer` will do."""
        if self._any_behind and self._behind.any():
            return None
        self._make_native()
        return self._native

    def spare_model(self) -> NativeModel | None:
        """The same with one stream, which is no instrument's; None where `native_model` is."""
        return None if self.native_model() is None else self._spare

    def _make_native(self) -> None:
        if self._native_of is self.backend:
            return
        self._native_of = self.backend
        self._native = self._spare = None
        make = getattr(self.backend, "native_model", None)
        n = len(self._behind)
        model = None if make is None else make(n + 1)
        if model is not None:
            self._native = model._replace(states=model.states[:n])
            self._spare = model._replace(states=model.states[n:])

    def infer(self, slot: int, ticket: int, x: np.ndarray, out: np.ndarray, fresh: bool) -> int:
        """One inference; returns the violation mask of the model's value check.

        Parameters
        ----------
        fresh : bool
            The stream starts anew with it.
        """
        backend = self.backend
        if fresh:
            backend.reset(slot)
            self._behind[slot] = False
        elif self._any_behind and self._behind[slot]:
            self._catch_up(slot, ticket)
        return backend.infer(slot, x, out) or 0

    def _catch_up(self, slot: int, ticket: int) -> None:
        """Run the model over the stream's last inputs, so that it has their state."""
        backend = self.backend
        backend.reset(slot)
        for row in normalised(
            self._recent.stretch(slot, ticket, CATCH_UP_ROWS), self.loaded.bundle
        ):
            self._x[0] = row
            backend.infer(slot, self._x, self._scratch)
        self._behind[slot] = False

    def close(self) -> None:
        """Give every backend back."""
        self.loaded.close()
        if self.previous is not None:
            self.previous.close()
