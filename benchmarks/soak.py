"""``octick bench soak``: hours of a market at twice its recorded peak; what creeps?

Publisher, engine and FP32 shadow run as an operator would run them, everything recorded. The market
is simulated, at a steady rate, and its clock may run faster than the wall's: the offered rate is
then as many times higher still. Nothing but a look at ``/proc`` and one question on the control
socket disturbs them while they run; latencies are read from the tape when all is over.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from benchmarks.live_engine import INSTRUMENTS, LiveEngine, live_engine
from benchmarks.provenance import REFERENCE, provenance
from benchmarks.recorded_peak import Peak, recorded_peak
from benchmarks.signal_latency import Latencies, latency_windows
from benchmarks.slopes import Slope, block_medians, drift, theil_sen
from engine.jitter import Jitter, measure_jitter
from feeds.errors import InputError
from feeds.simulator import Simulator

TIMES_PEAK: Final = 2.0
DEFAULT_SPEED: Final = 10.0
DEFAULT_WINDOW_S: Final = 5.0
WARM_UP_SHARE: Final = 0.2  # of the windows, at the start: buffers fill, the shadow comes up
MIN_WINDOWS: Final = 16  # after it
BLOCKS: Final = 12  # of windows, for the slope of p99.9
MAX_GC_PAUSE_US: Final = 1_000.0
JITTER_S: Final = 2.0
POLL_S: Final = 0.05
SEED: Final = 17
TRIAL_RATE_HZ: Final = 1_000.0
TRIAL_S: Final = 100.0
TAPE_BYTES_PER_MESSAGE: Final = 300  # with the signals and shadow answers it makes due; 243 found
SECTIONS: Final = "[shadow]\nevery = 1\n"


class Window(msgspec.Struct):
    """One stretch of wall time. Memory is that at its end.

    Attributes
    ----------
    at_s, market_h : float
        Its end: wall time, and hours of market time by the exchange's clock, since the first.
    lost, shadow_missed : int
        In it: messages that never came, inferences that the shadow had no room for.
    rss_mb, rss_anon_mb : float
        Resident memory of the engine with and without the mapped pages of its tape and libraries.
    cpu_share : float
        Of one core, that the engine's process took.
    preempted : int
        How often the kernel took the core away from the engine's thread.
    p50_us, p999_us, max_us : float
        From a message's receipt to the sending of the signal it made due.
    warm_up : bool
        Left out of the slopes.
    """

    at_s: float
    messages: int
    messages_per_s: float
    lost: int
    shadow_missed: int
    rss_mb: float
    rss_anon_mb: float
    cpu_share: float
    preempted: int
    warm_up: bool = True
    market_h: float = 0.0
    signals: int = 0
    p50_us: float = 0.0
    p999_us: float = 0.0
    max_us: float = 0.0


class Soak(msgspec.Struct, frozen=True):
    """What was measured; ``ok`` where nothing creeps, nothing was lost and no pause was long.

    Attributes
    ----------
    ok : bool
        ``failed`` is empty.
    failed : list of str
        What was not as it should be.
    hours : float
        Of market time in the windows, of those asked for in ``hours_asked``.
    interrupted : bool
        By Ctrl-C: the verdict is about the windows that there are.
    peak : Peak
    times_peak : float
        Offered messages a second of market time, over ``peak.lines_per_s``.
    speed : float
        Seconds of market time in one of wall time.
    messages_per_s : float
        Of wall time.
    rss_slope_mb_per_hour, p999_slope_us_per_hour : Slope or None
        For an hour of market time; None where the run was ended before it could say. Memory is
        the anonymous one: the pages of a tape come and go with the window that is mapped.
    gc : dict
        ``collections`` and ``longest_pause_us`` of the engine, its start left out.
    publisher_late_ms : float
        By how much the publisher was behind its schedule at worst.
    jitter : dict of str to Jitter
        A spinning loop on this machine before and after.
    """

    ok: bool
    failed: list[str]
    hours: float
    hours_asked: float
    interrupted: bool
    wall_s: float
    peak: Peak
    times_peak: float
    speed: float
    messages: int
    messages_per_s: float
    signals: int
    lost: int
    shadow_missed: int
    rss_slope_mb_per_hour: Slope | None
    p999_slope_us_per_hour: Slope | None
    windows: list[Window]
    gc: dict[str, float]
    compilations: int
    publisher_late_ms: float
    backend: str
    tape_bytes: int
    jitter: dict[str, Jitter]
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def events_rate(messages_per_s: float, instruments: int) -> float:
    """Simulator's ``rate_hz`` at which all instruments together send so many messages a second.

    An event is one or two messages; how many it is on average is counted.
    """
    trial = Simulator(SEED, instruments, rate_hz=TRIAL_RATE_HZ)
    for _ in trial.chunks(seconds=TRIAL_S):
        pass
    return TRIAL_RATE_HZ * messages_per_s / (trial.messages / TRIAL_S)


def bench_soak(
    hours: float,
    *,
    speed: float = DEFAULT_SPEED,
    window_s: float = DEFAULT_WINDOW_S,
    model: Path = REFERENCE,
    backend: str = "compiled",
    progress: Callable[[str, float], Any] = lambda stage, share: None,
) -> Soak:
    """Feed a live engine ``hours`` of market time at `TIMES_PEAK` times the recorded peak.

    Ctrl-C ends it; what was measured until then is the result.

    Parameters
    ----------
    hours : float
        Of market time.
    speed : float
        Seconds of market time in one of wall time.
    window_s : float
        Wall time of one window.
    progress : callable
        Takes the stage and the share of it that is done.

    Raises
    ------
    InputError
        If that is too short to say anything, or the tape would not fit on the disk.
    """
    planned = int(hours * 3600 / speed / window_s)
    if planned * (1 - WARM_UP_SHARE) < MIN_WINDOWS:
        raise InputError(
            "too short to say anything about slopes",
            where="bench soak",
            expected=f"at least {MIN_WINDOWS} windows behind the warm-up",
            found=f"{planned} in all",
            fix="more --hours, a lower --speed or a shorter --window",
        )
    progress("reading the recording", 0.0)
    peak = recorded_peak()
    offered = TIMES_PEAK * peak.lines_per_s
    _check_room(hours * 3600 * offered)
    jitter = {"before": measure_jitter(JITTER_S)}
    market = ["--speed", f"{speed:g}", "--seconds", f"{hours * 3600:g}", "--seed", str(SEED)]
    market += ["--rate", f"{events_rate(offered, len(INSTRUMENTS)):.3f}"]
    market += ["--instruments", str(len(INSTRUMENTS)), "--wait-subscribers", "1"]
    progress("starting the engine", 0.0)
    with live_engine(model, market, sections=SECTIONS, backend=backend) as session:
        windows, edges_ns = _watch(session, planned, window_s, progress)
        interrupted = session.running
        session.finish()
        tape_bytes = session.tape.stat().st_size
        read = latency_windows(
            session.tape, [0, *edges_ns], lambda share: progress("reading the tape", share)
        )
    jitter["after"] = measure_jitter(JITTER_S)
    _fill(windows, read)
    times_peak, rss, p999 = _slopes(windows, peak)
    messages, wall_s = sum(w.messages for w in windows), windows[-1].at_s if windows else 0.0
    totals = session.totals
    pause_us = totals["longest_gc_pause_us"]
    checks = {
        "too short for slopes": rss is None,
        "resident memory has a slope": rss is not None and not rss.zero,
        "p99.9 has a slope": p999 is not None and not p999.zero,
        f"lost {totals['lost']} messages": totals["lost"] > 0,
        f"a GC pause of {pause_us:.0f} us": pause_us >= MAX_GC_PAUSE_US,
    }
    return Soak(
        ok=not any(checks.values()),
        failed=[what for what, bad in checks.items() if bad],
        hours=round(windows[-1].market_h, 4) if windows else 0.0,
        hours_asked=hours,
        interrupted=interrupted,
        wall_s=wall_s,
        peak=peak,
        times_peak=times_peak,
        speed=speed,
        messages=messages,
        messages_per_s=round(messages / wall_s) if wall_s else 0,
        signals=sum(w.signals for w in windows),
        lost=totals["lost"],
        shadow_missed=sum(w.shadow_missed for w in windows),
        rss_slope_mb_per_hour=rss,
        p999_slope_us_per_hour=p999,
        windows=windows,
        gc={"collections": totals["collections"], "longest_pause_us": pause_us},
        compilations=totals["compilations"],
        publisher_late_ms=session.market_totals["late_max_ms"],
        backend=backend,
        tape_bytes=tape_bytes,
        jitter=jitter,
        **provenance(),
    )


def _fill(windows: list[Window], read: list[Latencies]) -> None:
    """Complete windows with what the tape says of them; the first of ``read`` lies before them."""
    start_ns, last_ns = read[0].exchange_ns, read[0].exchange_ns
    warm = int(np.ceil(len(windows) * WARM_UP_SHARE))
    for k, (window, found) in enumerate(zip(windows, read[1:], strict=True)):
        window.signals, window.p50_us, window.p999_us, window.max_us, exchange_ns = found
        last_ns = exchange_ns or last_ns
        window.market_h = round((last_ns - start_ns) / 3.6e12, 6)
        window.warm_up = k < warm


def _slopes(windows: list[Window], peak: Peak) -> tuple[float, Slope | None, Slope | None]:
    """The rate by the exchange's clock over the recorded peak; slopes of memory and of p99.9."""
    market_s = windows[-1].market_h * 3600 if windows else 0.0
    if not market_s:
        return 0.0, None, None
    times_peak = sum(w.messages for w in windows) / market_s / peak.lines_per_s
    used = [window for window in windows if not window.warm_up]
    if len(used) < MIN_WINDOWS:
        return round(times_peak, 3), None, None
    hours = np.array([window.market_h for window in used])
    rss = drift(hours, np.array([window.rss_anon_mb for window in used]))
    tail = np.array([window.p999_us for window in used])
    blocks = min(BLOCKS, len(used) // 2)
    return round(times_peak, 3), rss, theil_sen(*block_medians(hours, tail, blocks))


def _check_room(messages: float) -> None:
    folder = tempfile.gettempdir()
    need, free = messages * TAPE_BYTES_PER_MESSAGE, shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            "the tape would not fit",
            where=folder,
            expected=f"{need / 1e9:.1f} GB free",
            found=f"{free / 1e9:.1f} GB",
            fix="fewer --hours, or name a folder on a larger disk in TMPDIR",
        )


class _Process(NamedTuple):
    """What the kernel says of a process: MB, seconds, and switches of its first thread."""

    rss_mb: float
    rss_anon_mb: float
    cpu_s: float
    preempted: int


def _process(pid: int) -> _Process:
    """A process as it is now.

    Source: proc_pid_status(5), VmRSS, RssAnon and nonvoluntary_ctxt_switches; proc_pid_stat(5),
    fields 14 and 15.
    """
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        found[name] = value.split()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return _Process(
        rss_mb=int(found["VmRSS"][0]) * 1024 / 1e6,
        rss_anon_mb=int(found["RssAnon"][0]) * 1024 / 1e6,
        cpu_s=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        preempted=int(found["nonvoluntary_ctxt_switches"][0]),
    )


def _watch(
    session: LiveEngine, planned: int, window_s: float, progress: Callable[[str, float], Any]
) -> tuple[list[Window], list[int]]:
    """Windows until the market ends or Ctrl-C; and the end of each, that of the start first."""
    windows: list[Window] = []
    session.wait_until_tradable()
    pid = session.engine.pid
    status, process = session.ask("status"), _process(pid)
    started = time.monotonic()
    edges_ns = [time.time_ns()]
    at_s = 0.0
    with suppress(KeyboardInterrupt):
        while True:
            due = started + (len(windows) + 1) * window_s
            while session.running and (left := due - time.monotonic()) > 0:
                time.sleep(min(POLL_S, left))
            if time.monotonic() < due:
                break  # the market ended within this one
            before, status = status, session.ask("status")
            process_before, process = process, _process(pid)
            last_s, at_s = at_s, time.monotonic() - started
            messages = status["messages"] - before["messages"]
            window = Window(
                at_s=round(at_s, 3),
                messages=messages,
                messages_per_s=round(messages / (at_s - last_s)),
                lost=status["lost"] - before["lost"],
                shadow_missed=status["shadow_missed"] - before["shadow_missed"],
                rss_mb=round(process.rss_mb, 3),
                rss_anon_mb=round(process.rss_anon_mb, 3),
                cpu_share=round((process.cpu_s - process_before.cpu_s) / (at_s - last_s), 3),
                preempted=process.preempted - process_before.preempted,
            )
            edges_ns.append(time.time_ns())
            windows.append(window)
            progress(f"window {len(windows)} of {planned}", len(windows) / planned)
    return windows, edges_ns[: len(windows) + 1]
