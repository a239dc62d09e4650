"""The compiled step: the bits of the reference, on every instruction set, compiled once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from engine.backends.compiled.backend import CompiledBackend, CompiledGraph
from engine.backends.compiled.isa import ISAS, Isa, available_isas, choose_isa
from engine.backends.compiled.native_step import plan_key
from engine.backends.compiled.planning import Planner, pack_weights
from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import Dense, IntegerGraph
from engine.backends.lowering import lower
from engine.bundle import load_bundle
from feeds.errors import InputError
from tests.conftest import ROOT
from tests.engine import typed_graphs
from tests.engine.bundles import checked
from tests.engine.compiled_steps import differences
from tests.models.small_networks import rows_for, twins

STEPS = 120
ISA_NAMES = [isa.name for isa in ISAS]


def device_of(name: str) -> str:
    """The device of an instruction set, or a skip where this CPU lacks it."""
    if name not in [isa.name for isa in available_isas()]:
        pytest.skip(f"this CPU has no {name}")
    return f"cpu:{name}"


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("kind", typed_graphs.GRAPHS)
@pytest.mark.parametrize("seed", [0, 1])
def test_typed_graphs_have_the_bits_of_the_reference(kind: str, isa: str, seed: int) -> None:
    graph = typed_graphs.GRAPHS[kind](seed)
    x = typed_graphs.rows(graph, STEPS, seed)
    assert differences(graph, device_of(isa), x) == 0


def test_the_value_check_of_typed_graphs_says_something() -> None:
    """The comparisons above would not see masks that are always 0."""
    for make in typed_graphs.GRAPHS.values():
        graph = make(0)
        reference = GraphReference(graph)
        masks = [reference.step(row)[1] for row in typed_graphs.rows(graph, STEPS, 0)]
        assert 0 in [mask & 1 for mask in masks]
        assert len({mask & ~1 for mask in masks}) > 3


@cache
def network(arch: str) -> IntegerGraph:
    """An untrained network with its value check."""
    made = twins(arch)
    data, _ = checked(made.int8.SerializeToString(), "int8")
    return lower(data, made.int8_state)


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("arch", ["mlp", "tcn", "lstm", "gru", "deeplob"])
def test_networks_have_the_bits_of_the_reference(arch: str, isa: str) -> None:
    assert differences(network(arch), device_of(isa), rows_for(arch, STEPS)) == 0


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_a_part_of_a_graph_goes_from_codes_to_codes(isa: str) -> None:
    whole = typed_graphs.mixed(3)
    graph = replace(whole, layers=whole.layers[:-1])
    device = CompiledGraph(graph, device_of(isa), from_codes=True)
    reference, out = GraphReference(graph), np.zeros(graph.n_outputs, np.int32)
    for x in typed_graphs.rows(graph, STEPS, 3):
        codes = graph.quantise(x)
        mask = device.step(5, codes, out)
        expected, expected_mask = reference.step_codes(codes)
        assert np.array_equal(out, expected)
        assert mask == expected_mask


def test_packed_weights_are_all_there_once() -> None:
    weight = np.arange(-60, 60, dtype=np.int8).reshape(20, 6)
    for isa in ISAS:
        packed = pack_weights(weight, isa)
        assert np.array_equal(np.sort(packed[packed != 0]), np.sort(weight[weight != 0]))
        assert packed.size == -(-20 // isa.lanes) * isa.lanes * -(-6 // isa.group) * isa.group


def test_other_weights_need_no_other_code() -> None:
    graph = typed_graphs.mixed(0)
    layers = []
    for layer in graph.layers:
        if isinstance(layer, Dense):
            products = tuple(replace(p, weight=-(p.weight // 2)) for p in layer.products)
            layer = replace(layer, products=products, exponent=layer.exponent + 1)
        layers.append(layer)
    other = replace(graph, layers=tuple(layers))
    keys = {plan_key(Planner(g, ISAS[0], from_codes=False).plan) for g in (graph, other)}
    assert len(keys) == 1
    assert differences(other, "cpu", typed_graphs.rows(other, STEPS, 1)) == 0


COUNTING = """
import sys
from numba.core import event
compiled = []
class Listener(event.Listener):
    def on_start(self, e): compiled.append(e.data["dispatcher"].py_func.__name__)
    def on_end(self, e): pass
event.register("numba:compile", Listener())
import numpy as np
from engine.backends.compiled.backend import CompiledBackend
from engine.bundle import load_bundle
backend = CompiledBackend.open(load_bundle(sys.argv[1]), "cpu")
opened = len(compiled)
x, out = np.zeros((1, backend.info().input_shape[1]), "f4"), np.zeros(3, "f4")
for stream in range(3):
    backend.infer(stream, x, out)
    backend.reset(stream)
from numba.core.dispatcher import Dispatcher
print(backend._run.stats.cache_hits.total() if hasattr(backend._run.stats.cache_hits, "total") else
      sum(backend._run.stats.cache_hits.values()), len(compiled) - opened)
"""


def test_code_is_compiled_once_and_kept(tmp_path: Path, reference_bundle: Path) -> None:
    def run() -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, str(reference_bundle)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        )
        return [int(word) for word in done.stdout.split()]

    assert run() == [0, 0]  # from nothing: compiled at opening, and not again
    assert run() == [1, 0]  # from the disk


def test_a_folder_that_cannot_be_written_costs_time_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(blocked))
    graph = typed_graphs.deep_dense(8)
    assert differences(graph, "cpu:plain", typed_graphs.rows(graph, 60, 8)) == 0


QEMU = """
import sys
import numpy as np
from engine.backends.compiled.isa import available_isas
from tests.engine import typed_graphs
from tests.engine.compiled_steps import differences
print([isa.name for isa in available_isas()])
for make in (typed_graphs.lstms, typed_graphs.small):
    graph = make(2)
    print(differences(graph, "cpu", typed_graphs.rows(graph, 60, 2)))
"""


def test_a_cpu_without_vnni_has_the_same_bits(tmp_path: Path) -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("no qemu-x86_64; on Debian: apt-get install qemu-user")
    done = subprocess.run(
        [emulator, "-cpu", "Haswell", sys.executable, "-c", QEMU],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["['avx2', 'plain']", "0", "0"]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "unknown device of the compiled backend"),
        ("cpu:vnnni", "did you mean cpu:vnni?"),
        ("cpu:", "unknown device of the compiled backend"),
    ],
)
def test_devices_that_do_not_exist(device: str, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        choose_isa(device)


def test_an_instruction_set_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.backends.compiled import isa

    monkeypatch.setattr(isa, "cpu_features", lambda: frozenset({"avx2"}))
    assert [found.name for found in available_isas()] == ["avx2", "plain"]
    assert choose_isa("cpu") == Isa("avx2", 8, 2, (("avx2",),))
    with pytest.raises(InputError, match="this CPU cannot run cpu:vnni"):
        choose_isa("cpu:vnni")


def test_what_it_does_not_serve(reference_bundle: Path) -> None:
    bundle = load_bundle(reference_bundle)
    with pytest.raises(InputError, match="runs integers only"):
        CompiledBackend.open(bundle, "cpu", precision="fp32")
    with pytest.raises(InputError, match="on one thread"):
        CompiledBackend.open(bundle, "cpu", threads=2)


def test_a_model_larger_than_its_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.backends.compiled import planning

    monkeypatch.setattr(planning, "MAX_ARENA_BYTES", 1 << 14)
    with pytest.raises(InputError, match="the model is too large for the compiled backend"):
        CompiledGraph(typed_graphs.deep_dense(0), "cpu", from_codes=False)


def test_a_bundle_that_is_not_exact_is_refused(reference_bundle: Path) -> None:
    bundle = replace(load_bundle(reference_bundle), numerics="tolerance")
    with pytest.raises(InputError, match="only an exact-int8 bundle has an integer graph"):
        CompiledBackend.open(bundle, "cpu")


def test_a_step_that_gives_other_bits_is_refused(
    reference_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that got one weight wrong would not serve."""
    from engine.backends.compiled import planning

    def wrong(weight: np.ndarray, isa: Isa) -> np.ndarray:
        packed = pack_weights(weight, isa)
        packed[np.flatnonzero(packed)[5]] += 1
        return packed

    monkeypatch.setattr(planning, "pack_weights", wrong)
    with pytest.raises(InputError, match="does not give the bits of the bundle's graph"):
        CompiledBackend.open(load_bundle(reference_bundle), "cpu")
