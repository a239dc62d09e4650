"""Backends for the conformance suite: one keeps every promise, the others break one each."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any, ClassVar, Self
from unittest import mock

import msgspec
import numpy as np

from engine.backends import graph_reference
from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import CODE_MAX, IntegerGraph
from engine.backends.interface import BackendInfo
from engine.backends.lowering import lower_bundle
from engine.backends.onnx import OnnxBackend
from engine.bundle import Bundle
from feeds.errors import InputError

MAX_IN_FLIGHT = 5


class Honest:
    """The integer graph in numpy, behind the interface; answers wait in a short queue."""

    name: ClassVar[str] = "theirs"

    def __init__(self, bundle: Bundle, graph: IntegerGraph, device: str = "cpu") -> None:
        self._graph, self._bundle, self._device = graph, bundle, device
        self._streams: dict[int, GraphReference] = {}
        self._queue: deque[tuple[int, np.ndarray]] = deque()

    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        if (device, threads, precision) != ("cpu", 1, "int8"):
            raise InputError(
                "no such place", where="model", found=f"{device} {threads} {precision}"
            )
        return cls(bundle, lower_bundle(bundle))

    def info(self) -> BackendInfo:
        bundle = self._bundle
        return BackendInfo(
            name=self.name,
            device="cpu",
            precision="int8",
            numerics="exact-int8",
            input_shape=(1, bundle.n_features),
            input_dtype="float32",
            output_shape=(bundle.n_outputs,),
            output_dtype="float32",
            model_hash=bundle.model_hash,
            isa="numpy",
            threads=1,
            library=f"numpy {np.__version__}",
        )

    def stream(self, number: int) -> GraphReference:
        return self._streams.setdefault(number, GraphReference(self._graph))

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        out[:], mask = self.stream(stream).step(x)
        return mask

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        if len(self._queue) == MAX_IN_FLIGHT:
            return False
        out = np.zeros(self._bundle.n_outputs, np.float32)
        self.infer(stream, x, out)
        self._queue.append((ticket, out))
        return True

    def poll(self, out: np.ndarray) -> int:
        if not self._queue:
            return -1
        ticket, answer = self._queue.popleft()
        out[:] = answer
        return ticket

    def reset(self, stream: int) -> None:
        self.stream(stream).reset()

    def close(self) -> None:
        self._streams.clear()


def half_up(acc: np.ndarray, shift: np.ndarray | int) -> np.ndarray:
    """``acc / 2**shift``, ties away from minus infinity: as hardware likes to round."""
    acc, shift = np.asarray(acc, np.int64), np.asarray(shift, np.int64)
    right, left = np.maximum(shift, 0), np.maximum(-shift, 0)
    return np.where(left > 0, np.clip(acc, -512, 512) << left, acc + (1 << right >> 1) >> right)


def half_up_codes(acc: np.ndarray, shift: np.ndarray | int, zero_point: int) -> np.ndarray:
    return np.clip(half_up(acc, shift) + zero_point, 0, CODE_MAX).astype(np.uint8)


class HalfUp(Honest):
    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        with (
            mock.patch.object(graph_reference, "requantise", half_up_codes),
            mock.patch.object(graph_reference, "round_shift", half_up),
        ):
            return super().infer(stream, x, out)


class WrongZeroPoint(Honest):
    def __init__(self, bundle: Bundle, graph: IntegerGraph) -> None:
        point = replace(graph.point, zero_point=graph.point.zero_point + 1)
        super().__init__(bundle, replace(graph, point=point))


class SharedState(Honest):
    def stream(self, number: int) -> GraphReference:
        return super().stream(0)


class ResetIgnored(Honest):
    def reset(self, stream: int) -> None:
        pass


class Forgetful(ResetIgnored):
    name = "forgetful"


class ResetOnlyOfBegun(Honest):
    def reset(self, stream: int) -> None:
        self._streams[stream].reset()


class ResetOfAll(Honest):
    def reset(self, stream: int) -> None:
        self._streams.clear()


class MaskDropped(Honest):
    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        super().infer(stream, x, out)
        return 0


class LayerMasksDropped(Honest):
    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        return super().infer(stream, x, out) & 1


class MaskOfNumpy(Honest):
    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        return np.uint32(super().infer(stream, x, out))  # type: ignore[return-value]


class PartlyWritten(Honest):
    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        last = out[-1]
        mask = super().infer(stream, x, out)
        out[-1] = last
        return mask


class Clobbering(Honest):
    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        mask = super().infer(stream, x, out)
        x[0, 0] = 0.5
        return mask


class BoundOnce(Honest):
    """Reads and writes the arrays of the first call for good."""

    _x: np.ndarray | None = None
    _out: np.ndarray | None = None

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        if self._x is None or self._out is None:
            self._x, self._out = x, out
        mask = super().infer(stream, self._x, self._out)
        return mask


class TicketsSwapped(Honest):
    def poll(self, out: np.ndarray) -> int:
        if len(self._queue) > 1:
            (first, a), (second, b) = self._queue[0], self._queue[1]
            self._queue[0], self._queue[1] = (second, a), (first, b)
        return super().poll(out)


class NewestFirst(Honest):
    def poll(self, out: np.ndarray) -> int:
        self._queue.rotate(1)
        return super().poll(out)


class NoneWhenEmpty(Honest):
    def poll(self, out: np.ndarray) -> int:
        return super().poll(out) if self._queue else None  # type: ignore[return-value]


class WithoutLimit(Honest):
    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        out = np.zeros(self._bundle.n_outputs, np.float32)
        self.infer(stream, x, out)
        self._queue.append((ticket, out))
        return True


class RefusedAndTaken(Honest):
    """A step that the queue refuses is taken all the same."""

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        if len(self._queue) == MAX_IN_FLIGHT:
            self.infer(stream, x, np.zeros(self._bundle.n_outputs, np.float32))
        return super().submit(stream, ticket, x)


class LateReading(Honest):
    """Reads a submitted input when it is polled."""

    def __init__(self, bundle: Bundle, graph: IntegerGraph) -> None:
        super().__init__(bundle, graph)
        self._late: deque[tuple[int, int, np.ndarray]] = deque()

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        if len(self._late) == MAX_IN_FLIGHT:
            return False
        self._late.append((stream, ticket, x))
        return True

    def poll(self, out: np.ndarray) -> int:
        if not self._late:
            return -1
        stream, ticket, x = self._late.popleft()
        self.infer(stream, x, out)
        return ticket


class Poisoned(Honest):
    _bad = False

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        self._bad = self._bad or bool(np.isnan(x).any())
        mask = super().infer(stream, x, out)
        if self._bad:
            out[:] = np.nan
        return mask


class SharedBetweenInstances(Honest):
    every: ClassVar[dict[int, GraphReference]] = {}

    def stream(self, number: int) -> GraphReference:
        return self.every.setdefault(number, GraphReference(self._graph))

    def close(self) -> None:
        pass


class OpensAnything(Honest):
    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        return cls(bundle, lower_bundle(bundle))


class BreaksOverDevices(Honest):
    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        if device != "cpu":
            raise KeyError(device)
        return super().open(bundle, device, threads=threads, precision=precision)


class OtherNumerics(Honest):
    def info(self) -> BackendInfo:
        return msgspec.structs.replace(super().info(), numerics="tolerance")


class Restless(Honest):
    """Now and then another bit."""

    _calls = 0

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        mask = super().infer(stream, x, out)
        self._calls += 1
        if self._calls % 701 == 0:
            out[0] = np.nextafter(out[0], np.float32(np.inf))
        return mask


class Floating:
    """The float twin, which says that it is the INT8 model."""

    def __init__(self, inner: OnnxBackend, info: BackendInfo) -> None:
        self._inner, self._info = inner, info

    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        honest = Honest.open(bundle, device, threads=threads, precision=precision)
        return cls(OnnxBackend.open(bundle, device, precision="fp32"), honest.info())

    def info(self) -> BackendInfo:
        return self._info

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Broken:
    """Nothing but a name."""

    @classmethod
    def open(cls, bundle: Bundle, device: str, **_: Any) -> Self:
        raise ZeroDivisionError("at\nonce")

    info = infer = submit = poll = reset = close = open
