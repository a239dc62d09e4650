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
from engine.backends.registry import open_backend
from engine.bundle import Bundle, load_bundle
from engine.cores import be_patient
from engine.divergence import new_sketch
from engine.drift import DriftAlert, DriftConfig, DriftMonitor
from engine.feature_specs import NAMES
from engine.saturation import SaturationProbe
from engine.trust_events import SETTLING

GATHERED_SHARE: Final = 4  # of the ring's rows, the part that waits for no more
LOOK_NS: Final = 20_000_000  # between two looks at the ring, at most
MIN_LOOK_NS: Final = 500_000  # a look wakes the process up, some 20 µs of a core
SETTLE_ROWS: Final = 256  # of a model with state, before its answers count
STATS_EVERY: Final = 256  # requests
PROBE_EVERY: Final = 16  # requests
CALIBRATION_NAME: Final = "calibration.npz"
NICE: Final = 5  # the hot path comes first where cores are short


class Models:
    """Both models of a bundle, and what watches them."""

    def __init__(self, bundle: Bundle, drift: DriftConfig) -> None:
        self.bundle = bundle
        self.fp32 = open_backend("onnx", bundle, "cpu", precision="fp32")
        self.int8 = open_backend("onnx", bundle, "cpu", precision="int8")
        self.has_state = bool(bundle.state("int8") or bundle.state("fp32"))
        self.scores = np.zeros((2, bundle.n_outputs), dtype=np.float32)
        self._outs = (self.scores[0], self.scores[1])
        self._ages: dict[int, int] = {}
        self._probe = SaturationProbe(bundle)
        reference = {}
        path = bundle.path / CALIBRATION_NAME
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                reference = {name: file[name] for name in file.files}
        self.monitor = DriftMonitor(drift, NAMES, reference, self._probe.names)
        self._seen = 0
        self.sketches = [new_sketch() for _ in range(min(bundle.n_outputs, ring.MAX_OUTPUT_STATS))]

    def answer(self, slot: int, flags: int, x: np.ndarray) -> tuple[int, list[DriftAlert]]:
        """Run both; returns the answer's flags and what drifts. The scores are in ``scores``."""
        settling = 0
        if flags & ring.FRESH:
            self.fp32.reset(slot)
            self.int8.reset(slot)
            self._probe.reset(slot)
            self._ages[slot] = SETTLE_ROWS
        elif self.has_state:
            age = 0 if flags & ring.GAP else self._ages.get(slot, 0)
            settling = SETTLING if age < SETTLE_ROWS else 0
            self._ages[slot] = age + 1
        self.fp32.infer(slot, x, self._outs[0])
        os.sched_yield()
        self.int8.infer(slot, x, self._outs[1])
        os.sched_yield()
        self._seen += 1
        saturated = None
        if self.has_state or self._seen % PROBE_EVERY == 0:
            saturated = self._probe.shares(slot, x)
        apart = np.abs(self.scores[0] - self.scores[1])
        divergence = float(apart.max())
        if np.isfinite(divergence):
            for sketch, value in zip(self.sketches, apart.tolist(), strict=False):
                sketch.add(value)
        return settling, self.monitor.observe(x[0], divergence, saturated)


def serve(
    area: ring.ShadowRing, parent: int, bundle: Path, drift: DriftConfig, gather_ns: int
) -> None:
    """Answer until told to stop, or orphaned."""
    header = area.header
    header[ring.ALIVE_NS] = time.monotonic_ns()
    models = Models(load_bundle(bundle), drift)
    header[ring.READY] = 1
    row = np.zeros(ring.META, dtype=np.int64)
    x = np.zeros((1, area.inputs.shape[1]), dtype=np.float32)
    payload = models.scores.reshape(-1).view(np.uint8)
    done = left = 0
    look_ns = min(LOOK_NS, max(MIN_LOOK_NS, gather_ns // 4))
    many = max(1, len(area.requests) // GATHERED_SHARE)
    while True:
        if left == 0:
            if header[ring.STOP] or os.getppid() != parent:
                return
            left = ring.gather(header, many, look_ns, gather_ns)
            continue
        left -= 1
        header[ring.ALIVE_NS] = time.monotonic_ns()
        if not ring.pop_request(header, area.requests, area.inputs, row, x):
            continue
        flags = int(row[ring.FLAGS])
        if flags & ring.RELOAD:
            models = Models(load_bundle(Path(area.text)), drift)
            payload = models.scores.reshape(-1).view(np.uint8)
            continue
        row[ring.FLAGS], alerts = models.answer(int(row[ring.SLOT]), flags, x)
        _push(area, parent, row, payload)
        os.sched_yield()
        for alert in alerts:
            row[ring.FLAGS] = ring.ALERT
            row[ring.TICKET] = alert.rows
            _push(area, parent, row, np.frombuffer(alert_text(alert).encode(), dtype=np.uint8))
        done += 1
        if done % STATS_EVERY == 1:
            state = models.monitor.state()
            state |= {f"drift_{name}": state[name] for name in ("alerts", "alarms")}
            for i, name in enumerate(ring.STAT_NAMES):
                area.stats[i] = state.get(name, 0.0)
            for i, sketch in enumerate(models.sketches):
                area.output_stats[i] = [sketch.get_quantile_value(q) or 0.0 for q in (0.5, 0.99)]


def alert_text(alert: DriftAlert) -> str:
    """One line of an alert."""
    return (
        f"{alert.kind} {alert.subject}: {alert.statistic} {alert.value:.4g}, "
        f"threshold {alert.threshold:.4g}"
    )


def _push(area: ring.ShadowRing, parent: int, row: np.ndarray, payload: np.ndarray) -> None:
    """Wait for room: the engine empties its ring, or is gone."""
    while not ring.push_answer(area.header, area.answers, area.payloads, row, payload):
        if area.header[ring.STOP] or os.getppid() != parent:
            return
        area.header[ring.ALIVE_NS] = time.monotonic_ns()
        time.sleep(LOOK_NS / 1e9)


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
