"""The `cuda` backend on kernels that g++ compiled: both devices, their streams, their failures."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.gpu import find_gpu, parse_device
from engine.backends.cuda.loaded import LoadedGraph
from engine.backends.cuda.mailbox import PENDING, RETIRED, collect, post
from engine.backends.cuda.persistent import PersistentDevice
from engine.backends.cuda.prelude import SERVE_KERNEL
from engine.backends.cuda.source import HEADER_WORDS, STEP, generate
from engine.backends.cuda.streams import MAX_POSITION, WRAPPED_POSITION, Streams
from engine.backends.graph_backend import GraphDevice
from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import Delay, IntegerGraph, Table
from engine.backends.lowering import lower
from engine.bundle import load_bundle
from feeds.errors import InputError
from tests.engine import integer_graphs, typed_graphs
from tests.engine.architecture_graphs import quantised
from tests.engine.bundles import checked, make_bundle
from tests.engine.cuda_doubles import FakeGpu, Memory
from tests.models.small_networks import rows_for

DEVICES = ("cuda:0", "cuda:0/persistent")
PATIENCE = 1 << 20  # looks: for as long as a busy machine may take

runs_kernels = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ to run kernels on the CPU"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are built, once each."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A machine with CuPy and one GPU."""
    fake = FakeGpu(folder)
    monkeypatch.setitem(sys.modules, "cupy", fake.cupy())
    yield fake
    fake.end()


@functools.cache
def network(arch: str) -> IntegerGraph:
    """The graph of a small network, its value check counting from the first saturated code."""
    model, state = quantised(arch, symmetric=False)
    data, _ = checked(model, "int8")
    return lower(data, state)


class Watched:
    """A device beside one reference for each of its streams."""

    def __init__(self, device: GraphDevice, graph: IntegerGraph) -> None:
        self.device, self._graph = device, graph
        self._out = np.zeros(graph.n_outputs, dtype=np.int32)
        self._references: dict[int, GraphReference] = {}
        self.masks: set[int] = set()

    def step(self, stream: int, x: np.ndarray) -> bool:
        """Whether both give the same bits."""
        reference = self._references.setdefault(stream, GraphReference(self._graph))
        codes = self._graph.quantise(x)
        mask = self.device.step(stream, codes, self._out)
        acc, expected = reference.step_codes(codes)
        self.masks.add(mask)
        return np.array_equal(acc, self._out) and mask == expected

    def reset(self, stream: int) -> None:
        """Start a stream afresh, on both sides."""
        self.device.reset(stream)
        self._references[stream].reset()


def persistent(graph: IntegerGraph, **options: int) -> PersistentDevice:
    """The device whose kernel stays, with limits of a test's own."""
    loaded = LoadedGraph(find_gpu(0), generate(graph), SERVE_KERNEL)
    return PersistentDevice(loaded, **{"max_looks": PATIENCE, **options})


@runs_kernels
@pytest.mark.parametrize("arch", ["mlp", "tcn", "lstm", "gru", "deeplob"])
def test_networks_have_the_bits_of_the_reference(gpu: FakeGpu, arch: str) -> None:
    graph = network(arch)
    watched = Watched(CudaBackend.open_device(graph, "cuda:0"), graph)
    for i, x in enumerate(rows_for(arch, 20)):
        gpu.circumstances.backwards = bool(i % 2)  # or a missing barrier could go unseen
        assert watched.step(0, x), f"step {i}"
    assert len(watched.masks) > 1, "a value check that never changes compares nothing"


@runs_kernels
@pytest.mark.parametrize("kind", typed_graphs.GRAPHS)
def test_odd_graphs_have_the_bits_of_the_reference(gpu: FakeGpu, kind: str) -> None:
    graph = typed_graphs.GRAPHS[kind](0)
    watched = Watched(CudaBackend.open_device(graph, "cuda:0"), graph)
    for i, x in enumerate(typed_graphs.rows(graph, 64, 1)[:40]):
        gpu.circumstances.backwards = bool(i % 2)
        assert watched.step(0, x), f"step {i}"
    assert len(watched.masks) > 2


@runs_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_streams_do_not_mix_and_begin_afresh_when_reset(gpu: FakeGpu, device: str) -> None:
    graph = typed_graphs.mixed(1)
    watched = Watched(CudaBackend.open_device(graph, device), graph)
    rows = typed_graphs.rows(graph, 64, 2)
    for i, x in enumerate(rows[:48]):
        stream = (0, 65_535, 3)[i % 3]
        if i in (20, 21, 40):
            watched.reset(stream)
        assert watched.step(stream, x), f"step {i}"
    watched.device.reset(17)  # has not begun: nothing to do
    watched.device.close()


@runs_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_a_part_of_a_graph_goes_from_codes_to_codes(gpu: FakeGpu, device: str) -> None:
    whole = typed_graphs.grus(1)
    graph = replace(whole, layers=whole.layers[:-1])
    watched = Watched(CudaBackend.open_device(graph, device), graph)
    assert all(watched.step(0, x) for x in typed_graphs.rows(graph, 64, 3)[:12])
    watched.device.close()


@runs_kernels
def test_two_delays_of_one_value_share_its_past(gpu: FakeGpu) -> None:
    graph = typed_graphs.mixed(1)
    first = next(layer for layer in graph.layers if isinstance(layer, Delay))
    second = replace(first, name="again", lags=first.lags[::-1])
    entries = np.arange(256, dtype=np.uint8)[::-1].copy()
    layers = (*graph.layers[:-1], second, Table("last", "again", entries))
    size = graph.sizes[first.name]
    graph = replace(graph, layers=layers, sizes={**graph.sizes, "again": size, "last": size})
    watched = Watched(CudaBackend.open_device(graph, "cuda:0"), graph)
    assert all(watched.step(0, x) for x in typed_graphs.rows(graph, 64, 2)[:12])


@runs_kernels
def test_a_step_that_was_refused_may_be_done_again(gpu: FakeGpu) -> None:
    graph = typed_graphs.lstms(1)
    watched = Watched(CudaBackend.open_device(graph, "cuda:0"), graph)
    out = np.zeros(graph.n_outputs, dtype=np.int32)
    for i, x in enumerate(typed_graphs.rows(graph, 64, 4)[:12]):
        if i % 4 == 2:
            gpu.circumstances.refused_launches = 1
            with pytest.raises(RuntimeError, match="refused"):
                watched.device.step(0, graph.quantise(x), out)
        assert watched.step(0, x), f"step {i}"


@runs_kernels
def test_a_step_whose_answer_was_lost_may_be_done_again(gpu: FakeGpu) -> None:
    """Even one that the GPU has done: it wrote nothing that the same step reads."""
    graph = typed_graphs.mixed(1)
    device = CudaBackend.open_device(graph, "cuda:0")
    watched, loaded = Watched(device, graph), device._loaded  # type: ignore[attr-defined]
    for i, x in enumerate(typed_graphs.rows(graph, 64, 5)[:16]):
        if i % 3 == 1:
            own, sequence = loaded.find_stream(0), loaded.next_sequence()
            other = graph.quantise(x[::-1])
            post(loaded.request, other, sequence, STEP, own.position, own.address)
            loaded.launch()
            loaded.stream.synchronize()
        assert watched.step(0, x), f"step {i}"


@runs_kernels
@pytest.mark.parametrize("trouble", ["failing_kernels", "lost_launches"])
def test_a_kernel_that_gives_no_answer_is_an_error(gpu: FakeGpu, trouble: str) -> None:
    graph = typed_graphs.grus(1)
    device = CudaBackend.open_device(graph, "cuda:0")
    setattr(gpu.circumstances, trouble, 1)
    with pytest.raises(RuntimeError, match=r"error 719|without an answer"):
        device.step(0, np.zeros(graph.n_features, np.uint8), np.zeros(graph.n_outputs, np.int32))


@runs_kernels
@pytest.mark.parametrize("kind", ["mixed", "grus"])
def test_positions_wrap_without_a_trace(gpu: FakeGpu, kind: str) -> None:
    graph = typed_graphs.GRAPHS[kind](1)
    device = CudaBackend.open_device(graph, "cuda:0")
    watched = Watched(device, graph)
    rows = typed_graphs.rows(graph, 64, 6)
    assert all(watched.step(0, x) for x in rows[:16])
    own = device._loaded.find_stream(0)  # type: ignore[attr-defined]
    own.position += MAX_POSITION - 32  # of the same parity, at the same place of every ring
    assert all(watched.step(0, x) for x in rows[16:48])
    assert WRAPPED_POSITION <= own.position < WRAPPED_POSITION + 32


@runs_kernels
def test_one_kernel_serves_all_requests_while_they_come(gpu: FakeGpu) -> None:
    graph = typed_graphs.lstms(1)
    device = persistent(graph)
    watched = Watched(device, graph)
    assert all(watched.step(0, x) for x in typed_graphs.rows(graph, 64, 9)[:40])
    device.close()
    assert gpu.circumstances.launches == 1


@runs_kernels
@pytest.mark.parametrize("idle_polls", [0, 3])
def test_a_kernel_that_left_comes_back_with_the_next_request(gpu: FakeGpu, idle_polls: int) -> None:
    """It may leave between two requests, and just when one is written: none is lost or doubled."""
    graph = typed_graphs.grus(1)
    device = persistent(graph, idle_polls=idle_polls)
    watched = Watched(device, graph)
    for i, x in enumerate(typed_graphs.rows(graph, 64, 7)[:20]):
        if i % 5 == 4:
            device._loaded.stream.synchronize()  # until it has left
        assert watched.step(0, x), f"step {i}"
    device.close()
    assert gpu.circumstances.launches > 3


@runs_kernels
def test_memory_for_new_streams_is_allocated_while_no_kernel_stays(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = typed_graphs.grus(1)
    monkeypatch.setattr("engine.backends.cuda.streams.MAX_CHUNK_STREAMS", 2)
    device = persistent(graph)
    allocated: list[int] = []
    loaded = device._loaded

    def allocate(size: int) -> Memory:
        assert loaded.stream.query() == 0, "a kernel that allocation would wait for"
        allocated.append(size)
        return Memory(np.full(size, 0x5A, dtype=np.uint8))

    monkeypatch.setattr(loaded.streams, "_allocate", allocate)
    watched = Watched(device, graph)
    for i, x in enumerate(typed_graphs.rows(graph, 64, 8)[:15]):
        assert watched.step(i % 5, x), f"step {i}"
    device.close()
    assert len(allocated) == 3


@runs_kernels
def test_a_persistent_kernel_that_fails_is_not_asked_again(gpu: FakeGpu) -> None:
    graph = typed_graphs.grus(1)
    device = persistent(graph)
    codes, out = np.zeros(graph.n_features, np.uint8), np.zeros(graph.n_outputs, np.int32)
    gpu.circumstances.failing_kernels = 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA error 719"):
            device.step(0, codes, out)
    device.close()


@runs_kernels
def test_a_persistent_kernel_that_never_answers_is_given_up(gpu: FakeGpu) -> None:
    graph = typed_graphs.grus(1)
    device = persistent(graph, max_looks=3)
    codes, out = np.zeros(graph.n_features, np.uint8), np.zeros(graph.n_outputs, np.int32)
    gpu.circumstances.lost_launches = 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no answer"):
            device.step(0, codes, out)
    device.close()


@runs_kernels
def test_a_persistent_kernel_whose_launch_is_refused_may_be_launched_again(gpu: FakeGpu) -> None:
    graph = typed_graphs.grus(1)
    device = persistent(graph)
    codes, out = np.zeros(graph.n_features, np.uint8), np.zeros(graph.n_outputs, np.int32)
    gpu.circumstances.refused_launches = 1
    with pytest.raises(RuntimeError, match="refused"):
        device.step(0, codes, out)
    watched = Watched(device, graph)
    assert all(watched.step(0, x) for x in typed_graphs.rows(graph, 64, 9)[:4])
    device.close()


@runs_kernels
@pytest.mark.parametrize("device", DEVICES)
def test_a_bundle_opens_proven_and_says_what_answers(
    gpu: FakeGpu, tmp_path: Path, device: str
) -> None:
    reference, _ = make_bundle(tmp_path, checks=True)
    bundle = load_bundle(tmp_path)
    backend = CudaBackend.open(bundle, device)
    info = backend.info()
    assert (info.name, info.device, info.numerics) == ("cuda", device, "exact-int8")
    assert info.isa == "sm_90 dp4a (g++)"
    assert info.library == "CuPy 0, CUDA 12.9"
    x = integer_graphs.inputs(np.random.default_rng(0), 6, bundle.n_features)
    expected = reference.run(x)
    out = np.zeros(bundle.n_outputs, dtype=np.float32)
    for row, scores in zip(x, expected, strict=True):
        backend.infer(0, row[None].copy(), out)
        assert out.tobytes() == scores.tobytes()
    assert backend.submit(0, 5, x[:1].copy())
    assert backend.poll(out) == 5
    assert out.tobytes() == expected[0].tobytes()
    backend.close()


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:", "cuda:x", "cuda:0/graph", "cuda:0000"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=r"model.device: unknown device"):
        parse_device(device)


def test_a_device_is_a_gpu_by_number_and_a_mode() -> None:
    assert parse_device("cuda:0") == (0, False)
    assert parse_device("cuda:12/persistent") == (12, True)


def test_without_cupy_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not there
    make_bundle(tmp_path)
    with pytest.raises(InputError, match=r"pip install 'octick\[gpu\]'"):
        CudaBackend.open(load_bundle(tmp_path), "cuda:0")


def test_without_a_driver_one_line_says_so(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDeviceCount", no_driver)
    make_bundle(tmp_path)
    with pytest.raises(InputError, match=r"no CUDA GPU can be used.*InsufficientDriver"):
        CudaBackend.open(load_bundle(tmp_path), "cuda:0")


def test_a_gpu_that_is_not_there_or_too_old_is_refused(gpu: FakeGpu) -> None:
    with pytest.raises(InputError, match="no such GPU"):
        find_gpu(1)
    gpu.circumstances.attributes |= {"ComputeCapabilityMajor": 6, "ComputeCapabilityMinor": 1}
    with pytest.raises(InputError, match=r"too old.*7\.0.*6\.1"):
        find_gpu(0)


@runs_kernels
def test_a_gpu_with_a_display_takes_no_kernel_that_stays(gpu: FakeGpu) -> None:
    gpu.circumstances.attributes["KernelExecTimeout"] = 1
    graph = typed_graphs.grus(1)
    with pytest.raises(InputError, match="drives a display"):
        CudaBackend.open_device(graph, "cuda:0/persistent")
    CudaBackend.open_device(graph, "cuda:0").close()


def test_a_graph_that_does_not_fit_is_refused_before_anything_is_built(gpu: FakeGpu) -> None:
    gpu.circumstances.attributes["MaxSharedMemoryPerBlockOptin"] = 1_000
    with pytest.raises(InputError, match=r"do not fit.*at most 1000 bytes"):
        CudaBackend.open_device(typed_graphs.mixed(1), "cuda:0")


def test_what_cuda_has_against_a_model_is_one_line(gpu: FakeGpu) -> None:
    def no_library(**_: object) -> None:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    sys.modules["cupy"].RawModule = no_library  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"cannot take the model.*libnvrtc"):
        CudaBackend.open_device(typed_graphs.mixed(1), "cuda:0")


def test_a_request_carries_its_number_in_every_word() -> None:
    request = np.zeros(HEADER_WORDS + 2, dtype=np.uint64)
    post(request, np.arange(1, 8, dtype=np.uint8), 0xFFFFFFFF, STEP, 7, 0x7FFF_1234_5678_9ABC)
    assert set(request >> np.uint64(32)) == {0xFFFFFFFF}
    low = (request & np.uint64(0xFFFFFFFF)).tolist()
    assert low == [STEP, 7, 0x5678_9ABC, 0x7FFF_1234, 0x04030201, 0x00070605]


@pytest.mark.parametrize("late", range(4))
def test_an_answer_is_whole_only_when_every_word_has_its_number(late: int) -> None:
    words = np.array([0x8000_0001, 5, 0xFFFF_FFFF, 0x8000_0000, 0], dtype=np.uint64)
    reply = words | np.uint64(9 << 32)
    out = np.zeros(3, dtype=np.int32)
    reply[late] = words[late] | np.uint64(8 << 32)
    assert collect(reply, out, 9, 1, 100) == PENDING
    reply[late] = words[late] | np.uint64(9 << 32)
    assert collect(reply, out, 9, 1, 100) == 0x8000_0001
    assert out.tolist() == [5, -1, -(1 << 31)]


def test_a_kernel_that_left_is_known_by_its_launch_and_the_request_it_missed() -> None:
    reply, out = np.zeros(5, dtype=np.uint64), np.zeros(3, dtype=np.int32)
    reply[-1] = 9 << 32 | 4
    assert collect(reply, out, 9, 4, 100) == RETIRED
    assert collect(reply, out, 9, 5, 100) == PENDING
    assert collect(reply, out, 8, 4, 100) == PENDING


def test_streams_have_places_of_their_own_that_never_move() -> None:
    chunks: list[Memory] = []

    def allocate(size: int) -> Memory:
        chunks.append(Memory(np.zeros(size, dtype=np.uint8)))
        return chunks[-1]

    size = 48
    streams = Streams(size, allocate)
    places = [streams.begin(stream).address for stream in range(3_000)]
    assert sorted(places) == sorted(set(places))
    inside = {chunk.data.ptr + at for chunk in chunks for at in range(0, len(chunk.array), size)}
    assert inside.issuperset(places)
    assert [streams.find(stream).address for stream in range(3_000)] == places  # type: ignore[union-attr]


def test_no_memory_for_another_stream_is_an_error_of_the_device() -> None:
    def allocate(size: int) -> Memory:
        raise MemoryError(f"{size} bytes")

    with pytest.raises(RuntimeError, match="no device memory"):
        Streams(16, allocate).begin(0)


def test_a_model_without_state_needs_no_memory_for_streams() -> None:
    assert Streams(0, lambda size: None).begin(3).address == 0


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_double_offers_nothing_that_cupy_lacks(folder: Path) -> None:
    import cupy

    def names(offered: object) -> list[str]:
        return [name for name in vars(offered) if not name.startswith("_")]

    double = FakeGpu(folder).cupy()
    assert all(hasattr(cupy, name) for name in names(double))
    assert all(hasattr(cupy.cuda, name) for name in names(double.cuda))
    assert all(hasattr(cupy.cuda.runtime, name) for name in names(double.cuda.runtime))
    for name in ("begin_capture", "end_capture", "synchronize", "__enter__"):
        assert hasattr(cupy.cuda.Stream, name)
    for name in ("launch", "upload"):
        assert hasattr(cupy.cuda.Graph, name)
    assert hasattr(cupy.cuda.Device, "attributes")
    assert hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes")
    assert hasattr(cupy.cuda.PinnedMemoryPointer, "ptr")


@pytest.mark.parametrize("device", DEVICES)
def test_a_real_gpu_gives_the_bits_of_the_reference(device: str) -> None:
    try:
        find_gpu(0)
    except InputError as error:
        pytest.skip(str(error))
    for arch in ("mlp", "tcn", "lstm", "gru", "deeplob"):
        graph = network(arch)
        try:
            opened = CudaBackend.open_device(graph, device)
        except InputError as error:
            if "drives a display" in str(error):
                pytest.skip(str(error))
            raise
        watched = Watched(opened, graph)
        assert all(watched.step(i % 3, x) for i, x in enumerate(rows_for(arch, 300)))
        opened.close()
