"""One FP32 step of a network through ``torch.compile``: what it costs beside the other runtimes.

The generated C++ is given its best: fixed shapes, one graph, weights frozen into it, the wrapper in
C++ too, scores written where the caller reads them, and the state that a step gives handed to the
next without a copy.

Source: PyTorch documentation, "torch.compile" and its options ``freezing`` and ``cpp_wrapper``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from feeds.errors import InputError
from models.execute import State, run, tensors
from models.operations import Spec

OPTIONS: Final[dict[str, Any]] = {"freezing": True, "cpp_wrapper": True}
PROVED_STEPS: Final = 4
TOLERANCE: Final = 1e-4  # of a score, against the same step without the compiler


@contextmanager
def inference_settings() -> Iterator[None]:
    """One thread and no gradients: what a compiled step is made and called under."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


class CompiledStep:
    """One stream of a network, made and called within `inference_settings`.

    Parameters
    ----------
    spec : Spec
    parameters : mapping of str to ndarray
        Without BatchNorm.
    x : ndarray of float32, shape (1, features)
        Where a step reads its input.
    out : ndarray of float32, shape (1, classes)
        Where it writes its scores.

    Raises
    ------
    InputError
        If there is no C++ compiler, the network does not compile, or the compiled step gives
        other scores.
    """

    def __init__(
        self, spec: Spec, parameters: Mapping[str, np.ndarray], x: np.ndarray, out: np.ndarray
    ) -> None:
        _need_compiler()
        weights = tensors(parameters)
        step: Any = torch.compile(
            _Step(spec, weights), fullgraph=True, dynamic=False, options=OPTIONS
        )
        self._x, self._out = torch.from_numpy(x[None]), torch.from_numpy(out[None])
        _, state = run(spec, weights, self._x)
        self._fresh = {name: torch.zeros_like(value).contiguous() for name, value in state.items()}
        self._state = dict(self._fresh)
        self._step: Callable[[Tensor, State, Tensor], State] = step
        try:
            self._prove(spec, weights)
        except (RuntimeError, OSError) as error:
            raise InputError(
                "torch.compile cannot compile the step",
                where=spec.arch,
                found=(str(error).strip().splitlines() or [type(error).__name__])[0][:300],
            ) from None

    def __call__(self) -> None:
        """One step, from the array of inputs to that of scores."""
        self._state = self._step(self._x, self._state, self._out)

    def reset(self) -> None:
        """A fresh stream."""
        self._state = dict(self._fresh)

    def _prove(self, spec: Spec, weights: State) -> None:
        """Compile, and hold the first steps against those of PyTorch's own kernels."""
        state, rng = dict(self._fresh), np.random.default_rng(0)
        for _ in range(PROVED_STEPS):
            drawn = rng.normal(size=tuple(self._x.shape)).clip(-spec.clip, spec.clip)
            self._x.copy_(torch.from_numpy(drawn))
            expected, state = run(spec, weights, self._x, state=state)
            self()
            apart = float((expected - self._out).abs().max())
            if not apart <= TOLERANCE:
                raise InputError(
                    "the compiled step gives other scores",
                    where=spec.arch,
                    expected=f"at most {TOLERANCE} apart",
                    found=f"{apart:g}",
                )
        self.reset()


class _Step(torch.nn.Module):
    """The step over its weights as buffers: what freezing takes for constant."""

    def __init__(self, spec: Spec, weights: State) -> None:
        super().__init__()
        self._spec = spec
        self._names = {name: f"weight{i}" for i, name in enumerate(weights)}
        for name, place in self._names.items():
            self.register_buffer(place, weights[name])

    def forward(self, x: Tensor, state: State, out: Tensor) -> State:
        weights = {name: getattr(self, place) for name, place in self._names.items()}
        scores, after = run(self._spec, weights, x, state=state)
        out.copy_(scores)
        return after


def _need_compiler() -> None:
    from torch._inductor import config

    named = config.cpp.cxx if isinstance(config.cpp.cxx, list | tuple) else (config.cpp.cxx,)
    if any(name and shutil.which(name) for name in named):
        return
    raise InputError(
        "no C++ compiler",
        where="torch.compile",
        expected=os.environ.get("CXX") or "g++",
        fix="install g++, or name a compiler in CXX",
    )
