"""Kernels that only kernels call: of the declared types, and never called from Python."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("feeds", "engine", "replay", "models", "benchmarks")
KERNEL_MARKS = ("njit", "inner", "intrinsic")
COMPILE_ALL = """
import importlib, json, pkgutil
from numba.core.sigutils import normalize_signature
import engine, feeds, replay
for package in (feeds, engine, replay):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from feeds.inner import DECLARED
rows = []
for kernel, signature in DECLARED:
    arguments, result = normalize_signature(signature)
    name = f"{kernel.py_func.__module__}.{kernel.py_func.__name__}"
    rows.append((name, str(result(*arguments)), [str(s) for s in kernel.nopython_signatures]))
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_callers_compile_each_for_the_signature_it_declares_and_no_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_ALL],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    rows = json.loads(done.stdout)
    assert rows
    for name, declared, compiled in rows:
        assert compiled == [declared], name


def _marks(function: ast.FunctionDef) -> set[str]:
    calls = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {call.id for call in calls if isinstance(call, ast.Name)}


def _functions(tree: ast.Module, *marks: str) -> list[ast.FunctionDef]:
    found = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return [function for function in found if _marks(function) & set(marks)]


def _names_in_python(tree: ast.Module) -> set[str]:
    """Dotted names that code outside of kernels reads, as far as imports tell what they are."""
    known = {
        (alias.asname or alias.name): f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    kernels = _functions(tree, *KERNEL_MARKS)
    inside = {id(node) for kernel in kernels for node in ast.walk(kernel)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(known.get(node.id, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{known.get(node.value.id, node.value.id)}.{node.attr}")
    return names


def test_python_calls_none_of_them() -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    inner = {f"{name}.{f.name}" for name, tree in files.items() for f in _functions(tree, "inner")}
    assert "engine.features.compute" in inner
    for name, tree in files.items():
        read = {word if "." in word else f"{name}.{word}" for word in _names_in_python(tree)}
        assert not read & inner, f"{name}: a kernel without an eager signature, called from Python"
