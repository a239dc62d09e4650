"""The `split` backend: the first layers of a model on one backend, the rest on another.

The device says which: ``compiled/cpu > hidden0 > fpga/rtl-sim`` runs the layers up to and with
``hidden0`` by the compiled backend and all behind them by the FPGA's. What crosses is that layer's
uint8 codes, so that the whole is as exact as its parts. More parts may follow.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar, Final

import numpy as np

from engine.backends.graph_backend import GraphBackend, GraphDevice
from engine.backends.integer_graph import (
    INPUT,
    Add,
    Dense,
    GruCell,
    IntegerGraph,
    Layer,
    LstmCell,
    Point,
    Product,
)
from engine.manifest import StateTensor
from feeds.errors import InputError

SEPARATOR: Final = ">"
FORM: Final = "FRONT/DEVICE > LAYER > REST/DEVICE"


class SplitDevice:
    """Parts of a graph, one after the other; see `engine.backends.graph_backend.GraphDevice`."""

    def __init__(self, parts: list[tuple[IntegerGraph, GraphDevice]]) -> None:
        self._parts = parts
        self._wide = [np.zeros(graph.n_outputs, dtype=np.int32) for graph, _ in parts[:-1]]
        self._codes = [np.zeros(graph.n_outputs, dtype=np.uint8) for graph, _ in parts[:-1]]
        self.isa = " > ".join(device.isa for _, device in parts)
        self.library = ", ".join(dict.fromkeys(device.library for _, device in parts))

    def step(self, stream: int, codes: np.ndarray, out: np.ndarray) -> int:
        """One inference."""
        mask, last = 0, len(self._parts) - 1
        for i, (_, device) in enumerate(self._parts):
            target = out if i == last else self._wide[i]
            mask |= device.step(stream, codes, target)
            if i != last:
                codes = self._codes[i]
                codes[:] = target
        return mask

    def reset(self, stream: int) -> None:
        """Start a stream afresh, in every part."""
        for _, device in self._parts:
            device.reset(stream)

    def close(self) -> None:
        """Give every device back."""
        for _, device in self._parts:
            device.close()


class SplitBackend(GraphBackend):
    """One bundle's model over several backends; see `engine.backends.interface.Backend`."""

    name: ClassVar[str] = "split"

    @classmethod
    def open_device(cls, graph: IntegerGraph, device: str) -> GraphDevice:
        """All parts; see `GraphBackend.open_device`."""
        words = [word.strip() for word in device.split(SEPARATOR)]
        if len(words) < 3 or len(words) % 2 == 0 or not all(words):
            raise InputError(
                "not a split over backends",
                where="model.device",
                expected=f'"{FORM}", as in "compiled/cpu > hidden0 > fpga/rtl-sim"',
                found=repr(device),
            )
        graphs, rest = [], graph
        for layer in words[1::2]:
            front, rest = split_graph(rest, layer)
            graphs.append(front)
        opened: list[tuple[IntegerGraph, GraphDevice]] = []
        try:
            for part, place in zip([*graphs, rest], words[::2], strict=True):
                opened.append((part, _open_part(part, place)))
        except InputError:
            for _, part_device in opened:
                part_device.close()
            raise
        return SplitDevice(opened)


def _open_part(graph: IntegerGraph, place: str) -> GraphDevice:
    from engine.backends.registry import find_backend

    name, slash, device = place.partition("/")
    if not slash or not device or name == SplitBackend.name:
        raise InputError(
            "not a backend and its device",
            where="model.device",
            expected="BACKEND/DEVICE, as in compiled/cpu",
            found=repr(place),
        )
    backend: Any = find_backend(name)
    if not hasattr(backend, "open_device"):
        raise InputError(
            f"the {name} backend runs whole models only",
            where="model.device",
            expected="a backend that runs integer graphs: compiled, cuda, fpga",
            found=repr(place),
        )
    device_of_part: GraphDevice = backend.open_device(graph, device)
    return device_of_part


def split_graph(graph: IntegerGraph, name: str) -> tuple[IntegerGraph, IntegerGraph]:
    """A graph in two, behind a layer.

    Parameters
    ----------
    graph : IntegerGraph
    name : str
        The last layer of the first part.

    Returns
    -------
    front, rest : IntegerGraph
        The first gives the codes that are the input of the second.

    Raises
    ------
    InputError
        If there is no such layer, or more than its codes would cross.
    """
    cuts = [layer.name for i, layer in enumerate(graph.layers) if _can_cut(graph, i)]
    if name not in cuts:
        known = any(layer.name == name for layer in graph.layers)
        raise InputError(
            "the model cannot be split here: more than one value would cross"
            if known
            else "no such layer to split behind",
            where=f"{graph.where}: model.device",
            expected="one of " + ", ".join(cuts) if cuts else "a model of more than one layer",
            found=repr(name),
        )
    at = next(i for i, layer in enumerate(graph.layers) if layer.name == name)
    point = _point(graph.layers[at])
    assert point is not None
    front, rest = graph.layers[: at + 1], graph.layers[at + 1 :]
    kept = {tensor.input for layer in front for tensor in _state(layer)}
    first = replace(graph, layers=front, state=tuple(t for t in graph.state if t.input in kept))
    sizes = {key: value for key, value in graph.sizes.items() if key != INPUT}
    second = replace(
        graph,
        n_features=graph.sizes[name],
        point=point,
        layers=tuple(_renamed(layer, name) for layer in rest),
        sizes={**sizes, INPUT: graph.sizes[name]},
        state=tuple(t for t in graph.state if t.input not in kept),
        input_limit=float("inf"),
    )
    return first, second


def _can_cut(graph: IntegerGraph, at: int) -> bool:
    """Whether one layer's codes, and no group of the value check, cross behind a layer."""
    front, rest = graph.layers[: at + 1], graph.layers[at + 1 :]
    if not rest or _point(graph.layers[at]) is None:
        return False
    made = {INPUT, *(layer.name for layer in front)}
    crossing = {source for layer in rest for source in _sources(layer)} & made
    groups = [
        {point.group for layer in part for point in _points(layer) if point.group >= 0}
        for part in (front, rest)
    ]
    return crossing == {graph.layers[at].name} and not groups[0] & groups[1]


def _point(layer: Layer) -> Point | None:
    """Where a layer's output becomes codes."""
    if isinstance(layer, Dense | Add):
        return layer.point
    return layer.out if isinstance(layer, LstmCell | GruCell) else None


def _parts(layer: object) -> list[Any]:
    """What a layer is made of, itself included, whatever it is called."""
    found = [layer]
    for item in fields(layer):  # type: ignore[arg-type]
        value = getattr(layer, item.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Dense | Product):
                found += _parts(part)
            elif isinstance(part, Point | StateTensor):
                found.append(part)
    return found


def _points(layer: Layer) -> list[Point]:
    return [part for part in _parts(layer) if isinstance(part, Point)]


def _state(layer: Layer) -> list[StateTensor]:
    return [part for part in _parts(layer) if isinstance(part, StateTensor)]


def _sources(layer: Layer) -> set[str]:
    """Names of the values that a layer reads."""
    names: set[str] = set()
    for part in _parts(layer):
        if isinstance(part, Add):
            names |= {part.a, part.b}
        names |= set(getattr(part, "sources", ()))
        if hasattr(part, "source"):
            names.add(part.source)
    return names


def _renamed(item: Any, name: str) -> Any:
    """A layer that reads its part's input where it read a value."""
    changes: dict[str, Any] = {}
    for entry in fields(item):
        value = getattr(item, entry.name)
        if entry.name in ("source", "a", "b") and value == name:
            changes[entry.name] = INPUT
        elif entry.name == "sources":
            changes["sources"] = tuple(INPUT if part == name else part for part in value)
        elif entry.name == "products":
            changes["products"] = tuple(_renamed(part, name) for part in value)
        elif isinstance(value, Dense):
            changes[entry.name] = _renamed(value, name)
    return replace(item, **changes) if changes else item
