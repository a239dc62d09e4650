"""Facts about the machine, read from where Linux keeps them.

``root`` is the folder in which ``proc`` and ``sys`` lie. Elsewhere than on Linux most answers are
empty, and the doctor says so.

Source: proc(5), cgroups(7), the kernel's ``Documentation/admin-guide/cgroup-v1``, ``-v2``
and ``pm/cpuidle.rst``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from pathlib import Path
from typing import Final

INT8_FEATURES: Final = (
    ("avx2", "AVX2"),
    ("avx512f", "AVX-512"),
    ("avx512_vnni", "AVX-512 VNNI"),
    ("avx_vnni", "AVX-VNNI"),
    ("amx_int8", "AMX INT8"),
    ("asimddp", "ARM dot product"),
    ("i8mm", "ARM I8MM"),
    ("sve", "ARM SVE"),
)
DOT_PRODUCT: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
CLOCK_READINGS: Final = 10_000
TIMEX_BYTES: Final = 512  # more than any struct timex
TIME_ERROR: Final = 5
MAX_FREE: Final = 1 << 60  # cgroup v1 writes a number of this size for "no limit"


def cpu_model(root: Path) -> str:
    """Name of the CPU."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def cpu_flags(root: Path) -> frozenset[str]:
    """Features that every core has, by the kernel's names; empty where it names none."""
    sets = [
        frozenset(value.split())
        for key, _, value in (line.partition(":") for line in _lines(root / "proc/cpuinfo"))
        if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*sets) if sets else frozenset()


def allowed_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that the cgroups above this process allow; None for no quota."""
    quotas = []
    for folder in _cgroups(root, "cpu"):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
        quota = _words(folder / "cpu.cfs_quota_us")
        period = _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            quotas.append(int(quota[0]) / int(period[0]))
    return min(quotas, default=None)


def available_memory(root: Path) -> int:
    """Bytes that can be used without swapping, within the cgroups' limits."""
    free = 0
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for folder in _cgroups(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _words(folder / limit_name), _words(folder / used_name)
            if limit and used and limit[0] != "max" and int(limit[0]) < MAX_FREE:
                free = min(free, int(limit[0]) - int(used[0]) + _reclaimable(folder))
    return max(free, 0)


def governors(root: Path) -> frozenset[str]:
    """Frequency governors of all cores; empty where none is visible."""
    folder = root / "sys/devices/system/cpu"
    return frozenset(
        path.read_text().strip() for path in folder.glob("cpu[0-9]*/cpufreq/scaling_governor")
    )


def idle_driver(root: Path) -> str:
    """What puts idle cores to rest, ``none`` where the kernel just halts them; empty if unknown."""
    words = _words(root / "sys/devices/system/cpu/cpuidle/current_driver")
    return words[0] if words else ""


def idle_governor(root: Path) -> str:
    """What chooses how deep an idle core rests; empty if unknown."""
    folder = root / "sys/devices/system/cpu/cpuidle"
    words = _words(folder / "current_governor") or _words(folder / "current_governor_ro")
    return words[0] if words else ""


def polls_by_boot(root: Path) -> bool:
    """Whether the kernel was booted with ``idle=poll``: no core ever halts."""
    return "idle=poll" in _words(root / "proc/cmdline")


def clock_source(root: Path) -> str:
    """The kernel's clock source, empty where unknown."""
    words = _words(root / "sys/devices/system/clocksource/clocksource0/current_clocksource")
    return words[0] if words else ""


def clock_read_ns() -> float:
    """What one reading of the wall clock costs in nanoseconds, interpreter included."""
    read = time.time_ns
    started = time.perf_counter_ns()
    for _ in range(CLOCK_READINGS):
        read()
    return (time.perf_counter_ns() - started) / CLOCK_READINGS


def clock_synchronised() -> bool | None:
    """Whether the kernel's clock discipline is in step (adjtimex(2)); None if it does not say."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (AttributeError, OSError, TypeError):
        return None
    # All zero means modes = 0: read only.
    state = int(adjtimex(ctypes.create_string_buffer(TIMEX_BYTES)))
    return None if state < 0 else state != TIME_ERROR


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of the cgroups this process is in, innermost first, for versions 1 and 2."""
    base = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top = base
        elif controller in controllers.split(","):
            top = base / controller
        else:
            continue
        inner = top / path.lstrip("/")
        while True:
            folders.append(inner)
            if inner == top or top not in inner.parents:
                break
            inner = inner.parent
    return folders


def _reclaimable(folder: Path) -> int:
    """Page cache that counts as used but is given back on demand."""
    for line in _lines(folder / "memory.stat"):
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]
