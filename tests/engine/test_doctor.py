"""The doctor: what it reads on a made-up machine, and that it never fails itself."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine import doctor, host
from engine.cli import doctor as command
from engine.jitter import Jitter
from engine.wakefulness import UNBOUND_US

ROOT = Path(__file__).resolve().parents[2]

Machine = Callable[[dict[str, str]], Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_the_whole_report_as_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--json", "--tape", str(tmp_path / "not yet")])
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["ok"] else 1)
    names = [finding["name"] for finding in report["findings"]]
    assert len(names) == len(set(names)) == sum(report["counts"].values())
    assert {
        "python",
        "cpu",
        "idle cores",
        "clock",
        "memory",
        "open files",
        "numba cache",
        "jitter",
    } <= set(names)
    for finding in report["findings"]:
        assert finding["verdict"] in ("ok", "slow", "bad")
        assert finding["found"]
        assert finding["verdict"] == "ok" or finding["means"]


def test_the_report_for_a_person_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show([doctor.Finding("disk", "bad", "full", "no tape", "free some")], as_json=False)
    shown = capsys.readouterr().out
    for part in ("disk", "bad", "full", "no tape", "free some", "1 bad"):
        assert part in shown


def test_a_machine_that_says_nothing_gives_findings_not_errors(tmp_path: Path) -> None:
    findings = doctor.examine(tmp_path, root=tmp_path, jitter_seconds=0.001)
    assert {finding.name for finding in findings} >= {"cpu", "memory", "load"}
    unread = next(finding for finding in findings if finding.name == "memory")
    assert unread.verdict == "slow"


def test_exit_code_1_only_when_something_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    for verdict, code in (("ok", 0), ("slow", 0), ("bad", 1)):
        findings = [doctor.Finding("x", verdict, "y", "z")]  # type: ignore[arg-type]
        monkeypatch.setattr(doctor, "examine", lambda folder, f=findings: f)
        assert CliRunner().invoke(command, ["--json"]).exit_code == code


def test_the_versions_it_asks_for_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = set()
    for requirement in project["dependencies"]:
        match = re.match(r"([\w-]+)>=([\d.]+)", requirement)
        assert match
        wanted.add((match[1], match[2]))
    assert wanted == set(doctor.MIN_VERSIONS)
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.MIN_PYTHON))


def test_an_old_or_missing_package_is_bad() -> None:
    def version_of(name: str) -> str:
        if name in ("numba", "uvloop"):
            raise metadata.PackageNotFoundError
        return "1.19.9rc1" if name == "onnxruntime" else "9999.0"

    verdicts = {finding.name: finding.verdict for finding in doctor.packages(version_of)}
    assert verdicts == {"numba": "bad", "uvloop": "slow", "onnxruntime": "bad", "packages": "ok"}


@pytest.mark.parametrize(
    ("flags", "verdict"),
    [("fma avx2 avx512f avx512_vnni", "ok"), ("fma avx2 avx_vnni", "ok"), ("fma avx2", "slow")],
)
def test_int8_instructions(flags: str, verdict: str, machine: Machine) -> None:
    core = f"model name\t: Some CPU\nflags\t\t: {flags}\n\n"
    finding = doctor.cpu(machine({"proc/cpuinfo": core * 2}))
    assert (finding.verdict, finding.found.split(":")[0]) == (verdict, "Some CPU")


def test_a_feature_counts_only_if_every_core_has_it(machine: Machine) -> None:
    root = machine({"proc/cpuinfo": "flags : avx2 avx_vnni\n\nflags : avx2\n"})
    assert host.cpu_flags(root) == {"avx2"}


def test_cgroup_quota_of_version_2_is_the_tightest_above(machine: Machine) -> None:
    root = machine(
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        }
    )
    assert host.cpu_quota(root) == 0.5
    finding = doctor.cores(root)
    assert finding.verdict == "slow"
    assert "quota 0.5" in finding.found


def test_cgroup_quota_of_version_1(machine: Machine) -> None:
    root = machine(
        {
            "proc/self/cgroup": "3:memory:/x\n1:cpu,cpuacct:/x\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
    )
    assert host.cpu_quota(root) == 1.5


def test_a_machine_without_quota(machine: Machine) -> None:
    assert host.cpu_quota(machine({"proc/self/cgroup": "0::/\n"})) is None


@pytest.mark.parametrize(
    ("limit", "verdict"), [("max", "ok"), (str(3 << 30), "slow"), (str(1 << 30), "bad")]
)
def test_memory_is_bounded_by_the_cgroup(limit: str, verdict: str, machine: Machine) -> None:
    root = machine(
        {
            "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": limit,
            "sys/fs/cgroup/a/memory.current": str(2 << 30),
            "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {256 << 20}\n",
        }
    )
    assert doctor.memory(root).verdict == verdict


@pytest.mark.parametrize(
    ("name", "text", "check", "verdict"),
    [
        ("proc/loadavg", "0.01 0 0 1/1 1", doctor.load, "ok"),
        ("proc/loadavg", "1e6 0 0 1/1 1", doctor.load, "slow"),
        ("proc/swaps", "Filename Type\n", doctor.swap, "ok"),
        ("proc/swaps", "Filename Type\n/dev/sda2 partition\n", doctor.swap, "slow"),
        (
            "sys/kernel/mm/transparent_hugepage/enabled",
            "always [madvise] never",
            doctor.huge_pages,
            "ok",
        ),
        (
            "sys/kernel/mm/transparent_hugepage/enabled",
            "[always] madvise never",
            doctor.huge_pages,
            "slow",
        ),
        (
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
            "performance\n",
            doctor.governor,
            "ok",
        ),
        (
            "sys/devices/system/cpu/cpu3/cpufreq/scaling_governor",
            "powersave\n",
            doctor.governor,
            "slow",
        ),
        (
            "sys/devices/system/clocksource/clocksource0/current_clocksource",
            "hpet\n",
            doctor.clock,
            "slow",
        ),
    ],
)
def test_what_the_kernel_says(
    name: str,
    text: str,
    check: Callable[[Path], doctor.Finding],
    verdict: str,
    machine: Machine,
) -> None:
    finding = check(machine({name: text}))
    assert finding.verdict == verdict
    assert verdict == "ok" or finding.do


@pytest.mark.parametrize(
    ("driver", "boot", "asked_us", "verdict", "do"),
    [
        ("haltpoll", "", UNBOUND_US, "slow", "loop.cpu_dma_latency_us = 0"),
        ("haltpoll", "", 0, "ok", ""),
        ("intel_idle", "", 50, "slow", "loop.cpu_dma_latency_us = 0"),
        ("intel_idle", "", None, "slow", "CONFIG_CPU_IDLE"),
        ("none", "", 0, "slow", "idle=poll"),
        ("none", "quiet idle=poll", UNBOUND_US, "ok", ""),
        ("", "", None, "ok", ""),
    ],
)
def test_idle_cores(
    driver: str, boot: str, asked_us: int | None, verdict: str, do: str, machine: Machine
) -> None:
    files = {"proc/cmdline": boot}
    if driver:
        files["sys/devices/system/cpu/cpuidle/current_driver"] = driver + "\n"
        files["sys/devices/system/cpu/cpuidle/current_governor_ro"] = "menu\n"
    root = machine(files)
    device = root / "dev" / "cpu_dma_latency"
    if asked_us is not None:
        device.parent.mkdir()
        device.write_bytes(asked_us.to_bytes(4, sys.byteorder))
    finding = doctor.idle_cores(root)
    assert finding.verdict == verdict
    assert do in finding.do
    assert bool(finding.do) == bool(finding.means) == (verdict == "slow")
    assert not driver or f"{driver}, governor menu" in finding.found
    assert ("asked to wake within" in finding.found) == (asked_us in (0, 50))
    if asked_us is not None:
        assert device.read_bytes() == asked_us.to_bytes(4, sys.byteorder), "looking changes nothing"


@pytest.mark.parametrize(("files", "verdict"), [(64, "bad"), (512, "slow"), (20_000, "ok")])
def test_open_files(files: int, verdict: str) -> None:
    assert next(doctor.limits(lambda _: (files, files))).verdict == verdict


@pytest.mark.parametrize(
    ("environment", "verdict"),
    [
        ({}, "ok"),
        ({"NUMBA_DISABLE_JIT": "0"}, "ok"),
        ({"NUMBA_DISABLE_JIT": "1"}, "bad"),
        ({"NUMBA_CPU_NAME": "generic"}, "slow"),
    ],
)
def test_numba_settings(environment: dict[str, str], verdict: str) -> None:
    assert doctor.numba_settings(environment).verdict == verdict


@pytest.mark.parametrize(
    ("p99_ns", "max_ns", "verdict"),
    [(800, 50_000, "ok"), (90_000, 95_000, "slow"), (800, 9_000_000, "slow")],
)
def test_jitter(p99_ns: int, max_ns: int, verdict: str) -> None:
    assert doctor.jitter(Jitter(1.0, 100, 500, p99_ns, p99_ns, max_ns, 3)).verdict == verdict


def test_the_kernels_clock_can_be_asked() -> None:
    assert host.clock_synchronised() in (True, False, None)
    assert host.clock_read_ns() > 0
