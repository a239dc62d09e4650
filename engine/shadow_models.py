"""Both models of a bundle beside the hot path, and how they answer what waits in the ring.

Where kernels can run both, `engine.shadow_stretch` answers a stretch in one call. What it leaves is
answered here, one request at a time: of models in another backend all of them, else those of a slot
that was not seen before, and those whose inference failed, to say why.

What watches the answers follows behind them, a number of rows at a time, since nothing waits for
it but alerts: they are raised no later than with the stretch that led to them.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np

from engine import shadow_ring as ring
from engine.backends.interface import Backend
from engine.backends.native_call import ARENA, FRESH, NATIVE_FIELDS, STATE_BYTES, STEP
from engine.backends.registry import open_backend
from engine.bundle import Bundle
from engine.drift import DriftAlert, DriftConfig
from engine.handles import new_handles
from engine.shadow_stretch import (
    FAILED,
    MODELS,
    NOTHING,
    UNTOUCHED,
    answer_stretch,
    begin_step,
)
from engine.shadow_watch import Watch
from feeds.errors import InputError

KEPT_ROWS: Final = 64  # answers that what watches them may lie behind
KEPT_ROWS_STATE: Final = 16  # of a model with state, whose every step is looked into


def _open_int8(bundle: Bundle) -> Backend:
    """The INT8 model in the exact backend that takes the least of a core."""
    try:
        return open_backend("compiled", bundle, "cpu", precision="int8")
    except InputError:  # a graph that it does not know
        return open_backend("onnx", bundle, "cpu", precision="int8")


class Models:
    """Both models of a bundle, and what watches them.

    Parameters
    ----------
    bundle : Bundle
    drift : DriftConfig

    Attributes
    ----------
    scores : ndarray of float32, shape (2, n_outputs)
        Of the last `answer`: FP32 and INT8.
    watch : Watch
    reload : bool
        Whether `answer_waiting` has come to a `RELOAD`: what follows is for other models.
    """

    def __init__(self, bundle: Bundle, drift: DriftConfig) -> None:
        fp32 = open_backend("onnx", bundle, "cpu", precision="fp32")
        self._backends = (fp32, _open_int8(bundle))
        assert len(self._backends) == MODELS
        self.watch = Watch(bundle, drift)
        self.reload = False
        self._has_state = bool(bundle.state("int8") or bundle.state("fp32"))
        self.scores = np.zeros((MODELS, bundle.n_outputs), dtype=np.float32)
        self._outs = tuple(self.scores)
        self._x = np.zeros((1, bundle.n_features), dtype=np.float32)
        self._ages = np.zeros(0, dtype=np.int64)
        n = KEPT_ROWS_STATE if self._has_state else KEPT_ROWS
        self._rows = np.zeros((n, ring.META), dtype=np.int64)
        self._row_xs = np.zeros((n, bundle.n_features), dtype=np.float32)
        self._row_scores = np.zeros((n, *self.scores.shape), dtype=np.float32)
        self._kept = 0
        self._answer = np.zeros(ring.META, dtype=np.int64)
        self._left = np.zeros(1, dtype=np.int64)
        self._native = np.zeros((MODELS, NATIVE_FIELDS), dtype=np.int64)
        self._states = np.zeros((MODELS, 0), dtype=np.int64)
        self._runs_native = True  # until a backend says that it cannot
        self._area: ring.ShadowRing | None = None
        self._handles = np.zeros(0, dtype=np.int64)

    def answer(self, slot: int, flags: int, x: np.ndarray) -> tuple[int, list[DriftAlert]]:
        """Run both and watch them; returns the answer's flags and what drifts.

        Parameters
        ----------
        slot, flags : int
            Of the request.
        x : ndarray of float32, shape (1, n_features)
        """
        settling = self._begin(slot, flags)
        self._infer(slot, x, 0)
        return settling, self.watch.take([slot], [flags], x, self.scores[None])

    def answer_waiting(self, area: ring.ShadowRing, most: int) -> int:
        """Answer what waits in a ring.

        It stops where no request waits, the ring has no room for an answer, the engine says
        `STOP`, after a `RELOAD`, and where `overdue` has to be called first.

        Parameters
        ----------
        area : ShadowRing
            The same at each call.
        most : int
            Requests that are taken.

        Returns
        -------
        int
            Requests taken, a `RELOAD` too.

        Raises
        ------
        RuntimeError
            If an inference failed.
        """
        if area is not self._area:
            self._area = area
            self._set_handles()
        taken = 0
        while taken < most and self._kept < len(self._rows):
            stop = min(self._kept + most - taken, len(self._rows))
            answered = int(answer_stretch(self._handles, self._kept, stop, self._has_state))
            taken += answered - self._kept
            self._kept = answered
            left = int(self._left[0])
            if left == NOTHING:
                break
            taken += 1
            if self._rows[self._kept, ring.FLAGS] & ring.RELOAD:
                self.reload = True
                break
            self._answer_left(area, left)
        return taken

    def overdue(self) -> list[DriftAlert]:
        """Let what watches the answers follow, where it lies so far behind that it has to.

        Returns
        -------
        list of DriftAlert
            What drifts.
        """
        if self._kept < min(len(self._rows), self.watch.patience):
            return []
        return self.catch_up()

    def catch_up(self) -> list[DriftAlert]:
        """Let what watches the answers follow; returns what drifts."""
        n, self._kept = self._kept, 0
        if n == 0:
            return []
        rows = self._rows[:n]
        slots, flags = rows[:, ring.SLOT].tolist(), rows[:, ring.FLAGS].tolist()
        return self.watch.take(slots, flags, self._row_xs[:n], self._row_scores[:n])

    def close(self) -> None:
        """Give both backends back."""
        for backend in self._backends:
            backend.close()

    def _answer_left(self, area: ring.ShadowRing, left: int) -> None:
        """Answer the request that the kernel left, from the step on that it came to."""
        slot, flags = (int(self._rows[self._kept, i]) for i in (ring.SLOT, ring.FLAGS))
        self._x[0] = self._row_xs[self._kept]
        self.scores[:] = self._row_scores[self._kept]
        if left == UNTOUCHED:
            self._answer[:] = self._rows[self._kept]
            self._answer[ring.FLAGS] = self._begin(slot, flags)
        self._infer(slot, self._x, max(left - FAILED, 0))
        self._row_scores[self._kept] = self.scores
        payload = self.scores.reshape(-1).view(np.uint8)
        pushed = ring.push_answer(area.header, area.answers, area.payloads, self._answer, payload)
        assert pushed, "the kernel leaves no request that there is no room to answer"
        os.sched_yield()
        self._kept += 1
        if self._runs_native and slot >= self._states.shape[1]:
            self._make_native(slot + 1)

    def _begin(self, slot: int, flags: int) -> int:
        """Begin a stream's step; the flags of its answer."""
        if slot >= len(self._ages):
            more = np.zeros(slot + 1 - len(self._ages), dtype=np.int64)
            self._ages = np.concatenate((self._ages, more))
            self._set_handles()
        if flags & ring.FRESH:
            for backend in self._backends:
                backend.reset(slot)
        return int(begin_step(self._ages, slot, flags, self._has_state))

    def _infer(self, slot: int, x: np.ndarray, first: int) -> None:
        for backend, out in zip(self._backends[first:], self._outs[first:], strict=True):
            backend.infer(slot, x, out)
            os.sched_yield()

    def _make_native(self, slots: int) -> None:
        """Let the kernel answer requests of slots 0 to ``slots`` - 1, if it can run both models."""
        states = []
        for m, backend in enumerate(self._backends):
            make = getattr(backend, "native_model", None)
            model = None if make is None else make(slots)
            if model is None:
                self._runs_native = False
                return
            for column, value in (
                (STEP, model.step),
                (ARENA, model.arena),
                (FRESH, model.fresh),
                (STATE_BYTES, model.state_bytes),
            ):
                self._native[m, column] = value
            states.append(model.states)
        self._states = np.stack(states)
        self._set_handles()

    def _set_handles(self) -> None:
        area = self._area
        if area is None:
            return
        assert area.inputs.shape[1] == self._x.shape[1], "a ring of other features"
        assert area.payloads.shape[1] >= self.scores.nbytes, "a ring of fewer outputs"
        of_ring = (area.header, area.requests, area.inputs, area.answers, area.payloads)
        of_rows = (self._rows, self._row_xs, self._row_scores)
        rest = (self._native, self._states, self._ages, self._answer, self._left)
        self._handles = new_handles((*of_ring, *of_rows, *rest))
