"""The counter sees every compilation of Numba, of whatever kind, and no load from the cache."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numba import cfunc, njit, vectorize

from engine.compilations import Compilations

CACHED = """
from numba import cfunc, njit

@njit("int64(int64)", cache=True)
def doubled(x):
    return 2 * x

@cfunc("int64(int64)", cache=True)
def entry(x):
    return doubled(x)
"""


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    counted = Compilations()
    counted.watch()
    yield counted
    counted.close()


def load(path: Path) -> ModuleType:
    """Run a module's source anew, as a new process would."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def test_a_call_with_new_types_is_seen_and_one_with_known_types_is_not(
    compilations: Compilations,
) -> None:
    @njit
    def plus_one(x):  # type: ignore[no-untyped-def]
        return x + 1

    assert compilations.count == 0
    plus_one(1)
    assert compilations.count == 1
    plus_one(2)
    assert compilations.count == 1
    plus_one(1.0)
    assert compilations.count == 2
    assert all(name.endswith("plus_one") for name in compilations.functions)


def test_a_c_callback_and_a_ufunc_are_seen(compilations: Compilations) -> None:
    """Which the event of dispatchers does not tell of."""

    @cfunc("int64(int64)")
    def negated(x):  # type: ignore[no-untyped-def]
        return -x

    assert compilations.count == 1

    @vectorize(["int64(int64)"])
    def squared(x):  # type: ignore[no-untyped-def]
        return x * x

    assert compilations.count == 2
    assert squared(np.array([3]))[0] == 9


def test_another_thread_is_seen(compilations: Compilations) -> None:
    def work() -> None:
        njit("int64(int64)")(lambda x: x + 7)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert compilations.count == 1


def test_what_the_cache_holds_is_not_compiled(tmp_path: Path, compilations: Compilations) -> None:
    source = tmp_path / "kernels_of_this_test.py"
    source.write_text(CACHED)
    assert load(source).doubled(4) == 8
    assert compilations.count == 2
    assert load(source).doubled(4) == 8
    assert compilations.count == 2


def test_names_are_bounded_and_the_count_is_not(
    compilations: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.compilations.MAX_NAMED", 1)
    for _ in range(3):
        njit("int64(int64)")(lambda x: x)
    assert compilations.count == 3
    assert len(compilations.functions) == 1


def test_after_close_nothing_counts(compilations: Compilations) -> None:
    compilations.close()
    compilations.close()
    njit("int64(int64)")(lambda x: x)
    assert compilations.count == 0
