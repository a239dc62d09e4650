"""Finding a backend by the name in the config.

Third parties add one by an entry point of the group ``octick.backends`` whose value is a class
with the methods of `engine.backends.interface.Backend`. Ours are found without an installation
too, so that a checkout runs as it stands.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from engine.backends.interface import Backend
from engine.bundle import Bundle
from feeds.errors import InputError

GROUP: Final = "octick.backends"
BUILT_IN: Final = {
    "compiled": "engine.backends.compiled.backend:CompiledBackend",
    "cuda": "engine.backends.cuda.backend:CudaBackend",
    "fpga": "engine.backends.fpga.backend:FpgaBackend",
    "onnx": "engine.backends.onnx:OnnxBackend",
    "split": "engine.backends.split:SplitBackend",
}
# Of a backend that is named without a device; of the others it is the CPU.
DEFAULT_DEVICES: Final = {"cuda": "cuda:0", "fpga": "rtl-sim"}
_METHODS: Final = ("open", "info", "infer", "submit", "poll", "reset", "close")


def backend_names() -> tuple[str, ...]:
    """Names that `find_backend` knows, sorted."""
    return tuple(sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))}))


def default_device(name: str) -> str:
    """The device of a backend that is named without one."""
    return DEFAULT_DEVICES.get(name, "cpu")


def find_backend(name: str) -> type[Backend]:
    """The backend class of a name; only this one is imported.

    Raises
    ------
    InputError
        If no backend has the name, two packages claim it, or its class cannot be imported or
        lacks a method of the interface.
    """
    points = {point.value: point for point in entry_points(group=GROUP) if point.name == name}
    if name in BUILT_IN:
        points = {BUILT_IN[name]: EntryPoint(name, BUILT_IN[name], GROUP)}
    if not points:
        known = backend_names()
        nearest = difflib.get_close_matches(name, known, n=1)
        raise InputError(
            "unknown backend",
            where="model.backend",
            expected="one of " + ", ".join(known),
            found=repr(name),
            fix=f"did you mean {nearest[0]}?" if nearest else "install the package that has it",
        )
    if len(points) > 1:
        raise InputError(
            "two installed packages claim the same backend",
            where=f"model.backend {name}",
            found=" and ".join(sorted(points)),
            fix="uninstall one of them",
        )
    (point,) = points.values()
    try:
        found = getattr(import_module(point.module), point.attr)
    except (ImportError, AttributeError) as error:
        raise InputError(
            "cannot load the backend",
            where=f"model.backend {name}",
            expected=point.value,
            found=str(error),
            fix="install what it needs, or use onnx",
        ) from None
    missing = [method for method in _METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise InputError(
            "not a backend",
            where=f"model.backend {name}: {point.value}",
            expected="the methods " + ", ".join(_METHODS),
            found="no " + ", ".join(missing),
        )
    return found  # type: ignore[no-any-return]


def open_backend(
    name: str, bundle: Bundle, device: str = "cpu", *, threads: int = 1, precision: str = "int8"
) -> Backend:
    """Find a backend and open a bundle with it; see `find_backend` and `Backend.open`."""
    return find_backend(name).open(bundle, device, threads=threads, precision=precision)
