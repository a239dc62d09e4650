"""The part of ONNX Runtime that the GPU devices use, played by the CPU provider.

Its kernels are real, and so are its graphs; its device memory is arrays of their own, which nothing
reaches but copies, all counted. What a CUDA graph does is played as well: the first run keeps the
addresses that it was given, and every later run works on those, whatever is bound by then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest

from engine.backends.onnx_providers import CAPTURES, PROVIDERS, session_options

TrueSession, TrueValue = ort.InferenceSession, ort.OrtValue


@dataclass
class Gpu:
    """What the pretended GPU is like, and what was done with it.

    Attributes
    ----------
    kind : str
        "cuda" or "tensorrt".
    lacks : collection of str
        Names of nodes that it has no kernel for.
    captures : bool
        Whether it can capture a CUDA graph.
    driver : bool
        False: the provider is built in, but cannot be loaded.
    fails : bool
        Whether runs fail.
    options : list of dict
        Provider options of every session that was opened.
    copies : Counter
        Bytes by direction: "in", "out", "within".
    captured, runs : int
        Graphs captured, and runs.
    """

    kind: str = "cuda"
    lacks: Collection[str] = ()
    captures: bool = True
    driver: bool = True
    fails: bool = False
    options: list[dict[str, str]] = field(default_factory=list)
    copies: Counter[str] = field(default_factory=Counter)
    captured: int = 0
    runs: int = 0


class _Value:
    """An OrtValue in the memory of the pretended GPU."""

    gpu: ClassVar[Gpu]

    def __init__(self, array: np.ndarray, index: int) -> None:
        self.array = array.copy()
        self.index = index
        self.true = TrueValue.ortvalue_from_numpy(self.array, "cpu", 0)

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str, index: int) -> _Value:
        assert device == "cuda"
        cls.gpu.copies["in"] += array.nbytes
        return cls(array, index)

    def update_inplace(self, data: np.ndarray | _Value) -> None:
        way, array = ("within", data.array) if isinstance(data, _Value) else ("in", data)
        assert (array.dtype, array.shape) == (self.array.dtype, self.array.shape)
        self.gpu.copies[way] += array.nbytes
        self.array[...] = array

    def numpy(self) -> np.ndarray:
        self.gpu.copies["out"] += self.array.nbytes
        return self.array.copy()


class _Binding:
    """An I/O binding that takes values of the GPU only."""

    def __init__(self, session: _Session) -> None:
        self.true = session.true.io_binding()
        self.bound: dict[str, _Value] = {}

    def bind_ortvalue_input(self, name: str, value: _Value) -> None:
        self.bound[name] = value
        self.true.bind_ortvalue_input(name, value.true)

    def bind_ortvalue_output(self, name: str, value: _Value) -> None:
        self.bound[name] = value
        self.true.bind_ortvalue_output(name, value.true)


class _Session:
    """A session of the GPU's provider, or, where another is asked for, a true one."""

    gpu: ClassVar[Gpu]

    def __new__(cls, data: bytes, options: Any = None, providers: Any = None, **rest: Any) -> Any:
        provider = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if provider != PROVIDERS[cls.gpu.kind]:
            return TrueSession(data, options, providers=providers, **rest)
        return super().__new__(cls)

    def __init__(self, data: bytes, options: Any, providers: Any, enable_fallback: int = 1) -> None:
        gpu = self.gpu
        assert not enable_fallback, "the wrapper would open another provider instead"
        ((self.provider, self.options),) = providers
        gpu.options.append(self.options)
        alone = options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        assert options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        self.capturing = self.options[CAPTURES[gpu.kind]] == "1"
        if alone and (gpu.lacks or not gpu.driver):
            raise RuntimeError("nodes that are assigned to the default CPU EP")
        if self.capturing and not gpu.captures:
            raise RuntimeError("this session cannot use the graph capture feature")
        own = session_options(1)
        own.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if gpu.kind == "cuda":
            key = "session.disable_quant_qdq"
            own.add_session_config_entry(key, options.get_session_config_entry(key))
        self.true = TrueSession(data, own, providers=["CPUExecutionProvider"])
        self.replayed: Any = None

    def get_providers(self) -> list[str]:
        return [self.provider, PROVIDERS["cpu"]] if self.gpu.driver else [PROVIDERS["cpu"]]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [n for p in self.true.get_provider_graph_assignment_info() for n in p.get_nodes()]
        found = []
        for node in nodes:
            name = PROVIDERS["cpu"] if node.name in self.gpu.lacks else self.provider
            found.append(SimpleNamespace(ep_name=name, get_nodes=lambda node=node: [node]))
        return found

    def get_inputs(self) -> Any:
        return self.true.get_inputs()

    def get_outputs(self) -> Any:
        return self.true.get_outputs()

    def disable_fallback(self) -> None:
        pass

    def io_binding(self) -> _Binding:
        return _Binding(self)

    def run_with_iobinding(self, binding: _Binding) -> None:
        gpu = self.gpu
        gpu.runs += 1
        if gpu.fails:
            for value in binding.bound.values():
                if value.array.dtype == np.uint8:
                    value.array[...] = 7  # whatever lay there
            raise OSError("the device is gone")
        if self.capturing and self.replayed is None:
            self.replayed = binding
            gpu.captured += 1
        self.true.run_with_iobinding((self.replayed or binding).true)


def pretend(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> Gpu:
    """Put the GPU into ONNX Runtime's place for the rest of the test."""
    available = [PROVIDERS[gpu.kind], *ort.get_available_providers()]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(ort, "InferenceSession", type("Session", (_Session,), {"gpu": gpu}))
    monkeypatch.setattr(ort, "OrtValue", type("Value", (_Value,), {"gpu": gpu}))
    return gpu
