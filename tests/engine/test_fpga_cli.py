"""``octick fpga build --check-netlist``: what it asks for, reports and exits with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from engine.backends.fpga import cli
from engine.backends.fpga.build_report import BuildReport, NetlistCheck
from engine.backends.fpga.targets import ECP5_85K
from tests.conftest import ROOT


def reported(checked: NetlistCheck) -> BuildReport:
    return BuildReport(
        date="2026-01-01T00:00:00+00:00",
        bundle="bundle",
        model="hash",
        target=ECP5_85K.name,
        device=ECP5_85K.device,
        package=ECP5_85K.package,
        speed_grade=6,
        estimate=False,
        cycles=9,
        lanes={},
        resources=(),
        capacity_source="",
        seeds=(),
        aimed_mhz=None,
        fmax_mhz=None,
        latency_ns=None,
        critical_path=None,
        netlist=checked,
        includes="",
        tools={},
        seconds={},
    )


@pytest.mark.parametrize("differing", [0, 3])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_netlist_that_differs_is_exit_code_1_and_in_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, differing: int, as_json: bool
) -> None:
    given: dict[str, Any] = {}

    def build_of(*_: Any, **options: Any) -> BuildReport:
        given.update(options)
        seconds = {"build": 1.0, "run": 1.0}
        return reported(NetlistCheck(70, 700, differing, "cycle 8" * (differing > 0), "", seconds))

    monkeypatch.setattr("engine.backends.fpga.build.build_design", build_of)
    arguments = [str(ROOT / "models" / "reference"), "--check-netlist", "--vectors", "70"]
    arguments += ["--seeds", "0", "--out", str(tmp_path), *["--json"][: int(as_json)]]
    done = CliRunner().invoke(cli.build, arguments)
    assert done.exit_code == (1 if differing else 0), done.output
    assert (given["check_vectors"], given["seeds"]) == (70, [])
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=BuildReport)
    assert report.netlist is not None
    assert report.netlist.differing == differing
    if as_json:
        assert msgspec.json.decode(done.output, type=BuildReport) == report


@pytest.mark.parametrize(
    "arguments", [["--vectors", "9"], ["--check-netlist", "--target", "ultrascale+"]]
)
def test_what_cannot_be_checked_is_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    bundle = str(ROOT / "models" / "reference")
    done = CliRunner().invoke(cli.build, [bundle, "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()
