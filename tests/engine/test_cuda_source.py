"""The generated CUDA C: what NVRTC makes of it, and where its barriers stand."""

from __future__ import annotations

import ctypes
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.backends.cuda.layout import pack_weights
from engine.backends.cuda.loaded import OPTIONS
from engine.backends.cuda.prelude import SERVE_KERNEL, STEP_KERNEL
from engine.backends.cuda.schedule import MIN_THREADS, WARP, Operation, Read, schedule
from engine.backends.cuda.source import HEADER_WORDS, CudaSource, generate
from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import Dense, IntegerGraph
from feeds.errors import InputError
from tests.engine import typed_graphs
from tests.engine.cuda_doubles import build
from tests.engine.nvrtc import architectures, compile_ptx, find_nvrtc

WANTED_ARCHITECTURES = (70, 80, 90)


@pytest.mark.parametrize("kind", typed_graphs.GRAPHS)
def test_nvrtc_compiles_it_for_each_generation_of_gpus(kind: str) -> None:
    nvrtc = find_nvrtc()
    if nvrtc is None:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    source = generate(typed_graphs.GRAPHS[kind](0))
    known = architectures(nvrtc)
    for architecture in [a for a in WANTED_ARCHITECTURES if a in known]:
        ptx = compile_ptx(nvrtc, source.code, architecture, OPTIONS)
        assert re.findall(r"\.entry (\w+)\(", ptx) == [STEP_KERNEL, SERVE_KERNEL]
        # Codes are unsigned, weights signed; a request's words are polled, not kept in registers.
        assert "dp4a.u32.s32" in ptx
        assert "ld.volatile.global.u64" in ptx
        assert "st.volatile.global.u64" in ptx
        assert not re.search(r"\.(?:f16|f32|f64)\b", ptx), "integers only"


def run_step(library: ctypes.CDLL, source: CudaSource, codes: np.ndarray, backwards: bool) -> bytes:
    """The answer to a first request of a fresh stream, without the last word; empty: no answer."""
    words = np.zeros(source.request_words, dtype=np.uint64)
    state = np.zeros(source.state_bytes + 16, dtype=np.uint8)
    address = state.ctypes.data
    words[2:HEADER_WORDS] = address & 0xFFFFFFFF, address >> 32
    padded = np.zeros(4 * (source.request_words - HEADER_WORDS), dtype=np.uint8)
    padded[: len(codes)] = codes
    words[HEADER_WORDS:] = padded.view("<u4")
    words |= np.uint64(1 << 32)
    reply = np.zeros(source.reply_words, dtype=np.uint64)
    weights = source.weights.copy()
    pointers = np.array([a.ctypes.data for a in (words, reply, weights)], dtype=np.uint64)
    status = library.run_octick_step(
        source.threads, source.shared_bytes, backwards, pointers.ctypes.data_as(ctypes.c_void_p)
    )
    return b"" if status else reply[:-1].tobytes()


def expected(graph: IntegerGraph, codes: np.ndarray) -> bytes:
    """The answer by the reference."""
    acc, mask = GraphReference(graph).step_codes(codes)
    words = np.concatenate([[mask], acc.astype(np.int64) & 0xFFFFFFFF]).astype(np.uint64)
    return (words | np.uint64(1 << 32)).tobytes()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run kernels on the CPU")
def test_none_of_its_barriers_can_be_left_out(tmp_path: Path) -> None:
    """Nor would a missing one go unseen by the tests that run kernels in both orders."""
    graph = typed_graphs.grus(0)
    source = generate(graph)
    codes = graph.quantise(typed_graphs.rows(graph, 64, 0)[1])
    whole = build(source.code, tmp_path)
    for backwards in (False, True):
        assert run_step(whole, source, codes, backwards) == expected(graph, codes)
    begin = source.code.index("void step(")
    finish = source.code.index("\n}", begin)
    barrier = re.compile(r"__syncthreads\(\);")
    barriers = [found.span() for found in barrier.finditer(source.code, begin, finish)]
    assert len(barriers) > 5
    for start, end in barriers:
        lacking = build(source.code[:start] + source.code[end:], tmp_path)
        found = {run_step(lacking, source, codes, backwards) for backwards in (False, True)}
        assert found != {expected(graph, codes)}, source.code[start - 200 : start]


@pytest.mark.parametrize("threads", [32, 96])
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run kernels on the CPU")
def test_any_number_of_threads_gives_the_same_bits(tmp_path: Path, threads: int) -> None:
    graph = typed_graphs.mixed(0)
    source = generate(graph, threads)
    library = build(source.code, tmp_path)
    for x in typed_graphs.rows(graph, 64, 1)[:6]:
        codes = graph.quantise(x)
        for backwards in (False, True):
            assert run_step(library, source, codes, backwards) == expected(graph, codes)


def test_the_same_graph_gives_the_same_source() -> None:
    sources = [generate(typed_graphs.mixed(4)) for _ in range(2)]
    assert sources[0].code == sources[1].code
    assert sources[0].weights.tobytes() == sources[1].weights.tobytes()


def test_accumulators_beyond_int32_are_refused() -> None:
    graph = typed_graphs.deep_dense(0)
    first = graph.layers[0]
    assert isinstance(first, Dense)
    products = tuple(replace(p, up=p.up + 9) for p in first.products)
    graph = replace(graph, layers=(replace(first, products=products), *graph.layers[1:]))
    with pytest.raises(InputError, match=f"{first.name}: accumulators beyond int32"):
        generate(graph)


def operation(name: str, reads: str = "", *, own: bool = False, items: int = 40) -> Operation:
    """One that writes the value of its name."""
    read = tuple(Read(source, own=own) for source in reads.split())
    return Operation(name, items, "", read, (name,), own=True)


def test_what_reads_other_threads_values_waits_for_a_barrier() -> None:
    phases = schedule([operation("a"), operation("b", "a"), operation("c", "a b")])
    assert [[placed.operation.note for placed in phase] for phase in phases] == [
        ["a"],
        ["b"],
        ["c"],
    ]


def test_what_reads_only_its_own_thread_does_not_and_stays_on_its_threads() -> None:
    phases = schedule([operation("a"), operation("b"), operation("c", "b", own=True)])
    offsets = {placed.operation.note: placed.offset for phase in phases for placed in phase}
    assert len(phases) == 1
    assert offsets == {"a": 0, "b": 2 * WARP, "c": 2 * WARP}


def test_two_values_of_other_threads_are_not_its_own() -> None:
    phases = schedule([operation("a"), operation("b"), operation("sum", "a b", own=True)])
    assert [len(phase) for phase in phases] == [2, 1]


def test_an_operation_that_depends_on_nothing_goes_first() -> None:
    names = [operation("a"), operation("b", "a"), operation("early")]
    assert [placed.operation.note for placed in schedule(names)[0]] == ["a", "early"]


def test_a_block_has_threads_for_its_busiest_phase() -> None:
    assert generate(typed_graphs.deep_dense(0)).threads == 160  # 150 outputs, in whole warps
    assert generate(typed_graphs.lstms(0)).threads == MIN_THREADS


@pytest.mark.parametrize(
    ("inputs", "rows", "vector"),
    [(96, 1, 4), (13, 1, 4), (5, 1, 1), (32, 3, 4), (24, 3, 2), (20, 3, 1), (2, 3, 0)],
)
def test_weights_are_packed_as_wide_as_rows_are_aligned(
    inputs: int, rows: int, vector: int
) -> None:
    weight = np.arange(inputs * 3).astype(np.int8).reshape(3, inputs)
    packed = pack_weights(weight, rows)
    width = 4 * max(vector, 1)
    assert packed.vector == vector
    assert packed.data.shape == (packed.count, 3, width)
    for k in range(inputs):
        assert packed.data[k // width, :, k % width].tolist() == weight[:, k].tolist()
    assert packed.data.size == 3 * -(-inputs // width) * width
