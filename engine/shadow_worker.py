"""The shadow's own process: both models on what the hot path answered, and the drift monitor.

``python -m engine.shadow_worker PARENT FD ROWS FEATURES OUTPUTS GATHER_NS BUNDLE DRIFT`` where
PARENT is the engine's process, FD the ring that it made (`engine.shadow_ring`), and DRIFT the
config's section as JSON. It says in the ring that it is there, and ends when it is told to or when
its parent is gone.

It lets work gather: where cores are short, each time it wakes it takes one from the engine, and a
dozen inferences in a row take hardly longer than one by itself, whose code and weights have to be
fetched first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from engine import shadow_ring as ring
from engine.bundle import load_bundle
from engine.cores import be_patient
from engine.drift import DriftAlert, DriftConfig
from engine.shadow_models import Models
from engine.shadow_watch import Watch

GATHERED_SHARE: Final = 4  # of the ring's rows, the part that waits for no more
LOOK_NS: Final = 20_000_000  # between two looks at the ring, at most
MIN_LOOK_NS: Final = 500_000  # a look wakes the process up, some 20 µs of a core
STATS_EVERY: Final = 256  # requests
NICE: Final = 5  # the hot path comes first where cores are short


def serve(
    area: ring.ShadowRing, parent: int, bundle: Path, drift: DriftConfig, gather_ns: int
) -> None:
    """Answer until told to stop, or orphaned."""
    header = area.header
    header[ring.ALIVE_NS] = time.monotonic_ns()
    models = Models(load_bundle(bundle), drift)
    header[ring.READY] = 1
    done = left = 0
    look_ns = min(LOOK_NS, max(MIN_LOOK_NS, gather_ns // 4))
    many = max(1, len(area.requests) // GATHERED_SHARE)
    while True:
        if left == 0:
            if header[ring.STOP] or os.getppid() != parent:
                return
            left = ring.gather(header, many, look_ns, gather_ns)
            continue
        taken = models.answer_waiting(area, left)
        if taken == 0:
            left = min(left, area.waiting) if _wait_for_room(area, parent) else 0
            continue
        left -= taken
        before, done = done, done + taken - models.reload
        alerts = models.overdue()
        if (done - 1) // STATS_EVERY != (before - 1) // STATS_EVERY:
            alerts += models.catch_up()
            _publish(area, models.watch)
        for alert in alerts:
            _push_alert(area, parent, alert)
        if models.reload:
            models.close()
            models = Models(load_bundle(Path(area.text)), drift)


def _publish(area: ring.ShadowRing, watch: Watch) -> None:
    figures = watch.figures()
    for i, name in enumerate(ring.STAT_NAMES):
        area.stats[i] = figures.get(name, 0.0)
    for i, pair in enumerate(watch.quantiles_by_output()):
        area.output_stats[i] = pair


def alert_text(alert: DriftAlert) -> str:
    """One line of an alert."""
    return (
        f"{alert.kind} {alert.subject}: {alert.statistic} {alert.value:.4g}, "
        f"threshold {alert.threshold:.4g}"
    )


def _push_alert(area: ring.ShadowRing, parent: int, alert: DriftAlert) -> None:
    row = np.zeros(ring.META, dtype=np.int64)
    row[ring.FLAGS] = ring.ALERT
    row[ring.TICKET] = alert.rows
    text = np.frombuffer(
        bytearray(alert_text(alert).encode()), dtype=np.uint8
    )  # writable, as typed
    if _wait_for_room(area, parent):
        ring.push_answer(area.header, area.answers, area.payloads, row, text)


def _wait_for_room(area: ring.ShadowRing, parent: int) -> bool:
    """Wait until the engine has emptied its ring; False where it stops or is gone."""
    header = area.header
    while not (header[ring.STOP] or os.getppid() != parent):
        if header[ring.ANSWER_HEAD] - header[ring.ANSWER_TAIL] < len(area.answers):
            return True
        header[ring.ALIVE_NS] = time.monotonic_ns()
        time.sleep(LOOK_NS / 1e9)
    return False


def main(arguments: list[str]) -> int:
    """Run; see the module."""
    parent, fd, rows, n_features, n_outputs, gather_ns = (int(text) for text in arguments[:6])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which then stops us
    os.nice(NICE)
    be_patient()
    area = ring.ShadowRing(fd, rows, n_features, n_outputs)
    drift = msgspec.json.decode(arguments[7], type=DriftConfig)
    serve(area, parent, Path(arguments[6]), drift, gather_ns)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
