"""`octick doctor`: what on this machine would stop the engine, and what would make it slow.

Every finding has a verdict — ``ok``, ``slow`` (it runs, but not as it could) or ``bad`` (it does
not run, or cannot be trusted) — and says what it means and what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from engine import host, wakefulness
from engine.jitter import Jitter, measure_jitter

Verdict = Literal["ok", "slow", "bad"]

MIN_PYTHON: Final = (3, 11)
MIN_LIBZMQ: Final = (4, 3)
# As in pyproject.toml; a test holds the two together.
MIN_VERSIONS: Final = (
    ("click", "8.1"),
    ("ddsketch", "3.0.1"),
    ("msgspec", "0.19"),
    ("numba", "0.61"),
    ("numpy", "2.0"),
    ("onnx", "1.17"),
    ("onnxruntime", "1.20"),
    ("prometheus-client", "0.20"),
    ("pyarrow", "16"),
    ("pyzmq", "26"),
    ("rich", "13"),
    ("river", "0.26"),
    ("uvloop", "0.19"),
    ("tzdata", "2024.1"),
    ("zstandard", "0.22"),
)
OPTIONAL: Final = frozenset({"uvloop"})
MIN_OPEN_FILES: Final = 256
GOOD_OPEN_FILES: Final = 1_024
MIN_MEMORY_BYTES: Final = 512 << 20
GOOD_MEMORY_BYTES: Final = 2 << 30
MIN_DISK_BYTES: Final = 1 << 30
GOOD_DISK_BYTES: Final = 10 << 30
GOOD_LOAD_A_CORE: Final = 0.7
GOOD_JITTER_P99_NS: Final = 20_000
GOOD_JITTER_MAX_NS: Final = 1_000_000
GOOD_CLOCK_READ_NS: Final = 500
QUICK_CLOCKS: Final = frozenset({"tsc", "kvm-clock", "hyperv_clocksource_tsc_page"}) | {
    "arch_sys_counter"
}


class Finding(msgspec.Struct, frozen=True):
    """One line of the report; ``means`` and ``do`` are empty where nothing needs saying."""

    name: str
    verdict: Verdict
    found: str
    means: str = ""
    do: str = ""


def examine(
    tape_folder: str | os.PathLike[str] = ".",
    *,
    root: Path = Path("/"),
    jitter_seconds: float = 1.0,
) -> list[Finding]:
    """Look at everything once; takes about ``jitter_seconds``.

    Parameters
    ----------
    tape_folder : path-like
        Where tapes will be recorded.
    root : Path
        Where ``dev``, ``proc`` and ``sys`` are.
    jitter_seconds : float
        How long to measure the host's jitter.

    Returns
    -------
    list of Finding
        A check that itself fails is a finding too, never an exception.
    """
    checks: tuple[tuple[str, Callable[[], Finding | Iterator[Finding]]], ...] = (
        ("python", python),
        ("packages", packages),
        ("zeromq", zeromq),
        ("onnxruntime", onnx_runtime),
        ("numba", numba_settings),
        ("numba cache", numba_cache),
        ("byte order", byte_order),
        ("cpu", lambda: cpu(root)),
        ("cores", lambda: cores(root)),
        ("load", lambda: load(root)),
        ("governor", lambda: governor(root)),
        ("idle cores", lambda: idle_cores(root)),
        ("clock", lambda: clock(root)),
        ("clock sync", clock_sync),
        ("memory", lambda: memory(root)),
        ("swap", lambda: swap(root)),
        ("huge pages", lambda: huge_pages(root)),
        ("limits", limits),
        ("disk", lambda: disk(Path(tape_folder))),
        ("jitter", lambda: jitter(measure_jitter(jitter_seconds))),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            found = check()
            findings.extend([found] if isinstance(found, Finding) else found)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            findings.append(Finding(name, "slow", text, "this could not be checked"))
    return findings


def show(findings: list[Finding], *, as_json: bool) -> None:
    """Print the report on stdout, as a table or one JSON object."""
    counts = {v: sum(f.verdict == v for f in findings) for v in ("ok", "slow", "bad")}
    if as_json:
        report = {"ok": not counts["bad"], "counts": counts, "findings": findings}
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "slow": "yellow", "bad": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("verdict", "name", "text"):
        table.add_column(column, no_wrap=column != "text", overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        for more in (finding.means, finding.do and f"→ {finding.do}"):
            if more:
                text.append(f"\n{more}", style="dim")
        verdict = Text(finding.verdict, style=colours[finding.verdict])
        table.add_row(verdict, finding.name, text)
    console = Console()
    console.print(table)
    console.print(
        f"{counts['ok']} ok, {counts['slow']} slow, {counts['bad']} bad: "
        + ("the engine cannot run well here" if counts["bad"] else "the engine can run here"),
        highlight=False,
    )


# What the engine runs on.


def python() -> Finding:
    """Interpreter version."""
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info[:2] < MIN_PYTHON or platform.python_implementation() != "CPython":
        need = ".".join(map(str, MIN_PYTHON))
        return Finding("python", "bad", found, f"CPython {need} or newer is needed", "install it")
    return Finding("python", "ok", found)


def packages(
    version_of: Callable[[str], str] = metadata.version,
) -> Iterator[Finding]:
    """Versions of what the engine imports, against what it needs."""
    good = []
    for name, minimum in MIN_VERSIONS:
        try:
            version = version_of(name)
        except metadata.PackageNotFoundError:
            if name in OPTIONAL:
                means = "the event loop is asyncio's own, which takes more time for each message"
                yield Finding(name, "slow", "not installed", means, f"pip install {name}")
            else:
                yield Finding(
                    name, "bad", "not installed", "the engine imports it", f"pip install {name}"
                )
            continue
        if _numbers(version) < _numbers(minimum):
            do = f"pip install '{name}>={minimum}'"
            yield Finding(name, "bad", version, f"{minimum} or newer is needed", do)
        else:
            good.append(f"{name} {version}")
    if good:
        yield Finding("packages", "ok", ", ".join(good))


def zeromq() -> Finding:
    """The libzmq that pyzmq carries, and its transports."""
    import zmq

    version = zmq.zmq_version_info()
    found = f"libzmq {zmq.zmq_version()}, ipc {'yes' if zmq.has('ipc') else 'no'}"
    if version[:2] < MIN_LIBZMQ:
        do = "pip install --upgrade pyzmq (its wheels carry a new libzmq)"
        return Finding("zeromq", "bad", found, "libzmq 4.3 or newer is needed", do)
    return Finding("zeromq", "ok", found)


def onnx_runtime() -> Finding:
    """Execution providers that are built in."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        do = "pip install --force-reinstall onnxruntime"
        return Finding("onnxruntime", "bad", str(error), "the onnx backend cannot be opened", do)
    providers = runtime.get_available_providers()
    found = f"{runtime.__version__}: {', '.join(providers)}"
    if "CPUExecutionProvider" not in providers:
        return Finding("onnxruntime", "bad", found, "there is no CPU provider", "reinstall it")
    return Finding("onnxruntime", "ok", found)


def numba_settings(environment: dict[str, str] | None = None) -> Finding:
    """Environment variables that change what Numba does."""
    env = dict(os.environ) if environment is None else environment
    settings = {key: value for key, value in sorted(env.items()) if key.startswith("NUMBA_")}
    found = ", ".join(f"{key}={value}" for key, value in settings.items()) or "no NUMBA_ settings"
    if settings.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        means = "the hot path would be interpreted, far slower"
        return Finding("numba", "bad", found, means, "unset NUMBA_DISABLE_JIT")
    if settings.get("NUMBA_CPU_NAME") == "generic":
        means = "kernels are compiled for the oldest CPU of this kind; signals are the same"
        return Finding("numba", "slow", found, means, "unset NUMBA_CPU_NAME")
    return Finding("numba", "ok", found)


def numba_cache(package: Path = Path(__file__).parent) -> Finding:
    """Whether compiled kernels can be kept between starts."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(named) if named else package / "__pycache__"
    existing = _existing(folder)
    if not os.access(existing, os.W_OK | os.X_OK):
        means = "every start compiles the hot path again"
        do = "make it writable, or set NUMBA_CACHE_DIR to a folder that is"
        return Finding("numba cache", "slow", f"{folder} cannot be written", means, do)
    kernels = sum(1 for _ in folder.rglob("*.nbc")) if folder.is_dir() else 0
    state = f"{kernels} kernels kept" if kernels else "empty: the first start compiles"
    return Finding("numba cache", "ok", f"{folder}, {state}")


def byte_order() -> Finding:
    """The wire and the tape are little-endian and read in place."""
    if sys.byteorder != "little":
        means = "messages are read in place and are little-endian"
        return Finding("byte order", "bad", sys.byteorder, means, "use another machine")
    return Finding("byte order", "ok", sys.byteorder)


# What the machine is like.


def cpu(root: Path) -> Finding:
    """Model and the instructions that INT8 inference lives on."""
    model, flags = host.cpu_model(root), host.cpu_flags(root)
    if not flags:
        return Finding("cpu", "ok", f"{model}; its features cannot be read here")
    have = [label for flag, label in host.INT8_FEATURES if flag in flags]
    found = f"{model}: {', '.join(have) or 'none of the features looked for'}"
    if not flags & host.DOT_PRODUCT:
        means = "no INT8 dot-product instruction: inference takes longer; its bits are the same"
        do = "use a CPU with AVX-512 VNNI, AVX-VNNI or (ARM) the dot-product extension"
        return Finding("cpu", "slow", found, means, do)
    return Finding("cpu", "ok", found)


def cores(root: Path) -> Finding:
    """Cores this process may use, by affinity and by cgroup quota."""
    allowed = host.allowed_cores()
    quota = host.cpu_quota(root)
    found = f"{allowed} of {os.cpu_count() or allowed} usable"
    if quota is not None:
        found += f", cgroup quota {quota:g}"
        if quota < allowed:
            means = "the kernel stops this group for the rest of each period when it is used up"
            do = "lift the CPU quota (cpu.max), or pin whole cores instead"
            return Finding("cores", "slow", found, means, do)
    if allowed < 2:
        means = "ZeroMQ's I/O thread and the engine share one core"
        return Finding("cores", "slow", found, means, "give it two cores")
    return Finding("cores", "ok", found)


def load(root: Path) -> Finding:
    """How busy the machine is already."""
    one_minute = float((root / "proc/loadavg").read_text().split()[0])
    allowed = host.allowed_cores()
    found = f"{one_minute:g} in the last minute, on {allowed} cores"
    if one_minute > GOOD_LOAD_A_CORE * allowed:
        means = "other programs compete for the cores: latencies measured now are theirs too"
        return Finding("load", "slow", found, means, "stop them, or pin the engine to its own core")
    return Finding("load", "ok", found)


def governor(root: Path) -> Finding:
    """CPU frequency governor."""
    names = host.governors(root)
    if not names:
        return Finding("governor", "ok", "not visible (fixed, or the hypervisor's)")
    found = ", ".join(sorted(names))
    if names != {"performance"}:
        means = "a core clocks down between messages, and the next one pays for it"
        return Finding("governor", "slow", found, means, "cpupower frequency-set -g performance")
    return Finding("governor", "ok", found)


def idle_cores(root: Path) -> Finding:
    """How idle cores wait for work, and whether the engine may keep them awake."""
    driver, refusal = host.idle_driver(root), wakefulness.refusal(root)
    if not driver:
        return Finding("idle cores", "ok", "not visible (the kernel's own idling)")
    asked_us = wakefulness.asked_us(root)
    found = f"driver {driver}, governor {host.idle_governor(root) or 'unknown'}"
    if asked_us is not None and asked_us < wakefulness.UNBOUND_US:
        found += f", asked to wake within {asked_us:,} µs"
    found += f", /{wakefulness.DEVICE}: {refusal}" if refusal else ""
    if wakefulness.cores_stay_awake(root):
        return Finding("idle cores", "ok", f"{found}: they stay awake")
    means = "an idle core halts: waking it takes longer than the engine takes for a message"
    if driver == "none":
        do = "boot with idle=poll: without a cpuidle driver no request changes it"
    elif refusal:
        do = wakefulness.remedy(root) + ", then set loop.cpu_dma_latency_us = 0"
    else:
        do = "set loop.cpu_dma_latency_us = 0 where all cores may draw power all the time"
    return Finding("idle cores", "slow", found, means, do)


def clock(root: Path) -> Finding:
    """Clock source, and what a reading costs."""
    source = host.clock_source(root)
    cost_ns = host.clock_read_ns()
    found = f"{source or 'unknown source'}, {cost_ns:.0f} ns a reading"
    if (source and source not in QUICK_CLOCKS) or cost_ns > GOOD_CLOCK_READ_NS:
        means = "each reading is a system call; the engine reads it twice a message"
        return Finding("clock", "slow", found, means, "boot with clocksource=tsc if it is stable")
    return Finding("clock", "ok", found)


def clock_sync() -> Finding:
    """Whether the kernel says that the wall clock is kept in step."""
    synchronised = host.clock_synchronised()
    if synchronised is None:
        return Finding("clock sync", "ok", "cannot be asked here")
    if not synchronised:
        means = "receive times cannot be compared with the exchange's; signals do not depend on it"
        return Finding("clock sync", "slow", "not synchronised", means, "run chrony, or PTP")
    return Finding("clock sync", "ok", "synchronised")


def memory(root: Path) -> Finding:
    """Memory that is free for use, within the cgroup's limit."""
    free = host.available_memory(root)
    found = f"{free / 2**30:.1f} GiB available"
    if free < GOOD_MEMORY_BYTES:
        verdict: Verdict = "bad" if free < MIN_MEMORY_BYTES else "slow"
        means = "the engine may be killed, and the tape's pages want room"
        return Finding("memory", verdict, found, means, "free some, or raise the limit")
    return Finding("memory", "ok", found)


def swap(root: Path) -> Finding:
    """Active swap."""
    lines = (root / "proc/swaps").read_text().splitlines()[1:]
    if lines:
        means = "a page that was swapped out costs milliseconds when a message needs it"
        return Finding("swap", "slow", f"{len(lines)} active", means, "swapoff -a")
    return Finding("swap", "ok", "off")


def huge_pages(root: Path) -> Finding:
    """Transparent huge pages."""
    path = root / "sys/kernel/mm/transparent_hugepage/enabled"
    text = path.read_text() if path.exists() else ""
    match = re.search(r"\[(\w+)\]", text)
    found = match[1] if match else "not visible"
    if found == "always":
        means = "the kernel may stop the engine to compact memory"
        do = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding("huge pages", "slow", found, means, do)
    return Finding("huge pages", "ok", found)


def limits(get: Callable[[int], tuple[int, int]] = resource.getrlimit) -> Iterator[Finding]:
    """Open files and locked memory."""
    files = get(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY or files >= GOOD_OPEN_FILES:
        yield Finding("open files", "ok", _limit(files))
    else:
        verdict: Verdict = "bad" if files < MIN_OPEN_FILES else "slow"
        means = "each subscriber takes one; beyond the limit none can connect"
        yield Finding("open files", verdict, _limit(files), means, "ulimit -n 65536")
    locked = get(resource.RLIMIT_MEMLOCK)[0]
    yield Finding("locked memory", "ok", _limit(locked, "KiB", 1024))


def disk(folder: Path) -> Finding:
    """Room for the tape."""
    existing = _existing(folder)
    free = shutil.disk_usage(existing).free
    found = f"{free / 2**30:.1f} GiB free in {folder}"
    if not os.access(existing, os.W_OK):
        do = "name another folder in tape.path"
        return Finding("disk", "bad", f"{folder} cannot be written", "no tape can be made", do)
    if free < GOOD_DISK_BYTES:
        verdict: Verdict = "bad" if free < MIN_DISK_BYTES else "slow"
        means = "a tape takes about 100 bytes a message and 16 a level"
        return Finding("disk", verdict, found, means, "free some, or name another disk")
    return Finding("disk", "ok", found)


def jitter(measured: Jitter) -> Finding:
    """The host's own interruptions."""
    found = (
        f"p50 {measured.p50_ns / 1e3:.2f} µs, p99 {measured.p99_ns / 1e3:.2f} µs, "
        f"max {measured.max_ns / 1e3:,.0f} µs over {measured.seconds:g} s, "
        f"{measured.preempted} times preempted"
    )
    if measured.p99_ns > GOOD_JITTER_P99_NS or measured.max_ns > GOOD_JITTER_MAX_NS:
        means = "the host stops a program that only reads the clock; no latency here can be better"
        do = "isolate a core (isolcpus, nohz_full), or use a machine without neighbours"
        return Finding("jitter", "slow", found, means, do)
    return Finding("jitter", "ok", found)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _limit(value: int, unit: str = "", divisor: int = 1) -> str:
    shown: Any = "unlimited" if value == resource.RLIM_INFINITY else f"{value // divisor:,} {unit}"
    return str(shown).strip()
