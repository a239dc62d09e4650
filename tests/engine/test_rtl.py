"""The generated SystemVerilog: what it is made of, and what is refused, without simulating it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.backends.fpga.parallelism import choose_parallelism
from engine.backends.fpga.rtl import Design, Lanes, Parallelism, generate
from engine.backends.fpga.rtl_circuit import Circuit
from engine.backends.fpga.rtl_text import identifier
from engine.backends.integer_graph import INPUT, Dense, IntegerGraph
from engine.backends.lowering import lower_bundle
from engine.bundle import load_bundle
from feeds.errors import InputError
from tests.engine import typed_graphs
from tests.engine.rtl_graphs import GRAPHS, flat


@pytest.fixture(scope="module")
def reference(reference_bundle: Path) -> IntegerGraph:
    """The reference model."""
    return lower_bundle(load_bundle(reference_bundle))


def weights_in(design: Design, module: str, steps: int) -> np.ndarray:
    """What a weight ROM holds: int8 (steps, lanes)."""
    text = design.files[f"{module}_weights.sv"]
    chunks = []
    for entries in re.findall(r"case \(step_\d+\)\n(.*?)endcase", text, re.DOTALL):
        rows = []
        for entry in re.findall(r"<= (.*?);", entries, re.DOTALL):
            parts = [(int(n), int(v, 16)) for n, v in re.findall(r"(\d+)'h([0-9a-f]+)", entry)]
            data = b"".join(v.to_bytes(n // 8, "big") for n, v in parts)
            rows.append(np.frombuffer(data[::-1], dtype=np.int8))
        assert len(rows) == steps
        chunks.append(np.array(rows))
    return np.concatenate(chunks, axis=1)


def test_each_layer_is_a_module_of_its_name_with_its_weights_beside_it(
    reference: IntegerGraph,
) -> None:
    files = generate(reference).files
    for layer in reference.layers:
        assert f"module {layer.name} #(" in files[f"{layer.name}.sv"]
        assert f"module {layer.name}_weights #(" in files[f"{layer.name}_weights.sv"]
        assert f"u_{layer.name} (" in files["octick_top.sv"]
    for name, text in files.items():
        assert re.findall(r"^module (\w+)", text, re.MULTILINE) == [Path(name).stem]


def test_the_rom_holds_the_weights_in_the_order_of_the_steps(reference: IntegerGraph) -> None:
    first = reference.layers[0]
    assert isinstance(first, Dense)
    weight = first.products[0].weight  # 64 outputs of 96 inputs
    design = generate(reference, Parallelism({"hidden0": Lanes(48, 4)}))
    expected = weight.reshape(16, 4, 2, 48).transpose(0, 2, 1, 3).reshape(32, 4 * 48)
    assert np.array_equal(weights_in(design, "hidden0", 32), expected)


def test_a_name_that_the_language_or_a_module_needs_gets_a_prefix() -> None:
    assert identifier("block0.a/taps") == "block0_a_taps"
    for name in ("always", "codes", "total", "stage", "level3", "0.conv", "", "_x", "out_data"):
        assert identifier(name).startswith("layer_")
    assert identifier("hidden0") == "hidden0"


def test_two_names_never_become_one(reference: IntegerGraph) -> None:
    names = ("requantise", "a.b", "a_b")
    layers = [
        replace(layer, name=name) for layer, name in zip(reference.layers, names, strict=True)
    ]
    sources = (INPUT, *names)
    for at, layer in enumerate(layers):
        assert isinstance(layer, Dense)
        product = replace(layer.products[0], source=sources[at])
        layers[at] = replace(layer, products=(product,))
    sizes = dict(zip(names, (64, 32), strict=False)) | {INPUT: 96}
    files = generate(replace(reference, layers=tuple(layers), sizes=sizes)).files
    assert {"requantise.sv", "requantise_2.sv", "a_b.sv", "a_b_2.sv"} <= set(files)


def test_nothing_is_read_from_files_and_no_port_is_an_array() -> None:
    for make in GRAPHS.values():
        for text in generate(make(0)).files.values():
            assert "$readmem" not in text
            ports = text[text.index(") (") : text.index(");")]
            assert not re.search(r"\w+ \[[^\]]*\]\s*[,)]", ports)


def test_the_same_graph_gives_the_same_text() -> None:
    for make in GRAPHS.values():
        assert generate(make(1)) == generate(make(1))


def test_what_is_planned_in_a_draft_is_what_is_built() -> None:
    for make in GRAPHS.values():
        graph = make(0)
        for lanes in (Lanes(16, 1), Lanes(1, 64), Lanes(5, 4)):
            whole = Circuit(graph, Parallelism(other=lanes))
            draft = Circuit(graph, Parallelism(other=lanes), draft=True)
            assert draft.due == whole.due
            assert draft.plans == whole.plans


@pytest.mark.parametrize("multipliers", [16, 64, 280, 416, 1024])
def test_a_budget_is_kept_and_more_of_it_never_costs_cycles(
    reference: IntegerGraph, multipliers: int
) -> None:
    chosen = choose_parallelism(reference, multipliers, blocks=40)
    assert sum(lanes.count for lanes in chosen.layers.values()) <= max(multipliers, 3)
    assert sum(lanes.dsp for lanes in chosen.layers.values()) <= 40
    fewer = choose_parallelism(reference, multipliers // 2, blocks=40)
    assert Circuit(reference, chosen).due <= Circuit(reference, fewer).due


def test_neighbours_overlap_where_one_takes_what_the_other_brings(
    reference: IntegerGraph,
) -> None:
    """22 steps of the first layer and 22 of the second take hardly longer than one of them."""
    matched = {"hidden0": Lanes(96, 3), "hidden1": Lanes(3, 32), "head": Lanes(32, 3)}
    odd = matched | {"hidden1": Lanes(4, 32)}
    overlapped = Circuit(reference, Parallelism(matched)).due
    assert overlapped + 16 <= Circuit(reference, Parallelism(odd)).due


def test_blocks_are_given_output_by_output(reference: IntegerGraph) -> None:
    chosen = choose_parallelism(reference, 416, blocks=100)
    blocks = {name: lanes.dsp for name, lanes in chosen.layers.items() if lanes.dsp}
    for name, given in blocks.items():
        lanes = chosen.layers[name]
        assert given == lanes.count or given % lanes.inputs == 0
    text = generate(reference, chosen).files["hidden0.sv"]
    assert f"BLOCK = LANE < {blocks['hidden0']};" in text


def test_layers_over_several_rows_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"random graph: columns0|random graph: dense1"):
        generate(typed_graphs.mixed(0))
    g = typed_graphs.TypedGraph(0, 12)
    graph = g.graph(g.maximum(INPUT, 3))
    with pytest.raises(InputError, match=r"random graph: maximum0: .* found Maximum of 3 rows"):
        generate(graph)


def test_yosys_reads_the_design(tmp_path: Path) -> None:
    """Every kind of module, by the open synthesis tool of the ECP5."""
    yosys = shutil.which("yosys")
    if yosys is None:
        pytest.skip("yosys is not installed")
    for kind, make in GRAPHS.items():
        folder = tmp_path / kind
        folder.mkdir()
        design = generate(make(0), Parallelism(other=Lanes(6, 4, 3)))
        for name, text in design.files.items():
            (folder / name).write_text(text)
        script = (
            f"read_verilog -sv {' '.join(sorted(design.files))}; chparam -set HOLD 0 {design.top};"
            f" hierarchy -check -top {design.top}; proc; check -assert"
        )
        done = subprocess.run(
            [yosys, "-q", "-p", script], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_flat_holds_every_kind_of_layer_that_is_no_cell() -> None:
    kinds = {type(layer).__name__ for layer in flat(0).layers}
    assert kinds == {"Add", "Columns", "Concat", "Delay", "Dense", "Table"}
