"""A plan's step as a native function, kept on disk for the next process.

Numba keeps what it compiled by the file a function stands in. So each plan gets a small file of its
own in the cache of kernels, named after the plan's text: another model of the same shape loads the
same code, and nothing is compiled again until the sources, the plan or the CPU are others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from numba import types
from numba.extending import intrinsic

from engine.backends.compiled.emission import emit
from engine.backends.compiled.plan import Plan

PREFIX: Final = "octick_step_"
FOLDER: Final = "steps"
_SOURCE: Final = '''"""One step of a compiled graph, as native_step.py wrote it."""

from numba import cfunc, njit

from engine.backends.compiled.native_step import step_intrinsic

_run = step_intrinsic("{key}")


@njit("int64(int64, int64, int64, int64)", cache={cache})
def step(x, out, arena, state):
    return _run(x, out, arena, state)


@cfunc("int64(int64, int64, int64, int64)", cache={cache})
def called(x, out, arena, state):
    return step(x, out, arena, state)
'''


class NativeStep(NamedTuple):
    """One plan's code.

    Attributes
    ----------
    run : callable
        Takes addresses of input, output, arena and state; gives the value check's mask.
    address : int
        Of the same as a C function.
    """

    run: Callable[[int, int, int, int], int]
    address: int


_PLANS: Final[dict[str, Plan]] = {}
_STEPS: Final[dict[str, NativeStep]] = {}


def plan_key(plan: Plan) -> str:
    """What a plan's code is kept under."""
    return hashlib.sha256(repr(plan).encode()).hexdigest()[:24]


def step_intrinsic(key: str) -> Any:
    """The intrinsic that stands for one plan's code."""

    @intrinsic
    def run(typingctx, x, out, arena, state):  # type: ignore[no-untyped-def]
        signature = types.int64(types.int64, types.int64, types.int64, types.int64)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return emit(builder, _PLANS[key], *args)

        return signature, codegen

    return run


def native_step(plan: Plan) -> NativeStep:
    """The native function of a plan: from memory, from the disk, or compiled now."""
    key = plan_key(plan)
    found = _STEPS.get(key)
    if found is None:
        _PLANS[key] = plan
        found = _STEPS[key] = _load(key)
    return found


def _load(key: str) -> NativeStep:
    path = _source_file(key)
    name = f"{PREFIX}{key}"
    if path is None:
        scope: dict[str, Any] = {"__name__": name}
        exec(_SOURCE.format(key=key, cache=False), scope)
        return NativeStep(scope["step"], scope["called"].address)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where Numba looks for the function that a cached code is of
    spec.loader.exec_module(module)
    return NativeStep(module.step, module.called.address)


def _source_file(key: str) -> Path | None:
    """The file of a plan's function, written if it is not there; None where nothing can be kept."""
    base = os.environ.get("NUMBA_CACHE_DIR")
    if not base:
        return None
    path = Path(base) / FOLDER / f"{PREFIX}{key}.py"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=PREFIX, suffix=".new")
        with os.fdopen(handle, "w") as file:
            file.write(_SOURCE.format(key=key, cache=True))
        # A link, unlike a replacement, keeps the file that another process may have put there.
        try:
            os.link(name, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(name)
    except OSError:
        return None
    return path
