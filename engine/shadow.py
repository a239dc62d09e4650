# Hot path: `Shadow.submit`; the rest is called a few times a second.
"""The engine's end of the FP32 shadow: hands inferences over, takes answers back, keeps it alive.

Nothing here waits. A shadow that is slow, stopped or dead costs the hot path a full ring and
nothing else; it is missed, said to be lost, and started again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from enum import Enum
from typing import Final, NamedTuple

import msgspec
import numpy as np

from engine import shadow_ring as ring
from engine.bundle import Bundle
from engine.child import child_environment
from engine.config import ShadowConfig
from engine.cores import beside
from engine.drift import DriftConfig
from engine.trust_events import ShadowAnswer, answer_templates

MAX_ANSWERS: Final = 16  # of one poll
STOP_TIMEOUT_S: Final = 2.0
STARTING_NS: Final = 60_000_000_000  # to open its models, before it counts as lost


class Health(Enum):
    """What the engine thinks of its shadow."""

    STARTING = "starting"
    UP = "up"
    LOST = "lost"


class Drifted(NamedTuple):
    """What the drift monitor found."""

    text: str
    rows: int


class Shadow:
    """A shadow process and the rings to it.

    Parameters
    ----------
    config : ShadowConfig
        With ``every`` above 0.
    drift : DriftConfig
    bundle : Bundle
    names : list of (str, str)
        Venue and symbol of each slot.
    now_ns : int
        Monotonic time.

    Attributes
    ----------
    health : Health
    why : str
        Of the last loss.
    restarts : int
    handles : ndarray of int64
        By which a kernel hands inferences over and takes answers; see
        `engine.shadow_ring.set_handles`.
    """

    def __init__(
        self,
        config: ShadowConfig,
        drift: DriftConfig,
        bundle: Bundle,
        names: list[tuple[str, str]],
        now_ns: int,
    ) -> None:
        assert config.every > 0
        self._config = config
        self._drift = msgspec.json.encode(drift).decode()
        self._names = names
        self._bundle = bundle
        self.restarts = self._look_ns = 0
        self.why = ""
        self._n_outputs = bundle.n_outputs
        self._row = np.zeros(ring.META, dtype=np.int64)
        self._gate = np.zeros(ring.GATE, dtype=np.int64)
        self._behind = np.zeros(len(names), dtype=np.int64)
        self._templates = answer_templates(names, bundle.n_outputs)
        self.handles: Final = ring.no_handles()
        self._process: subprocess.Popen[bytes] | None = None
        self._fd = -1
        self._reload = False
        self._set_every()
        self._start(now_ns)

    def _set_every(self) -> None:
        # A model with state has to see every step.
        state = self._bundle.state("int8") or self._bundle.state("fp32")
        self._gate[ring.EVERY] = 1 if state else self._config.every

    def _start(self, now_ns: int) -> None:
        self._ring, self._fd = ring.ShadowRing.make(
            self._config.max_waiting, self._bundle.n_features, self._n_outputs
        )
        self._payload = np.zeros(self._ring.payloads.shape[1], dtype=np.uint8)
        shape = (self._config.max_waiting, self._bundle.n_features, self._n_outputs)
        # Who waits is not lost.
        gather_ns = min(self._config.gather_ns, self._config.lost_after_ns // 4)
        self._process = subprocess.Popen(
            [
                *(*beside(), sys.executable, "-m", "engine.shadow_worker"),
                *(str(os.getpid()), str(self._fd)),
                *(str(number) for number in (*shape, gather_ns)),
                *(str(self._bundle.path), self._drift),
            ],
            pass_fds=(self._fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=child_environment(),
        )
        self.health = Health.STARTING
        self._began_ns = self._progress_ns = now_ns
        self._done = 0
        self._behind[:] = 1  # nothing before it was seen
        self._reload = False
        ring.set_handles(self.handles, self._gate, self._behind, self._ring, self._templates)
        self._set_gate()

    def _set_gate(self) -> None:
        self._gate[ring.OPEN] = self.health is Health.UP and not self._reload
        self._gate[ring.STARTING] = self.health is Health.STARTING

    @property
    def missed(self) -> int:
        """Inferences that the ring had no room for, or that came while the shadow was lost."""
        return int(self._gate[ring.MISSED])

    @property
    def pid(self) -> int:
        """Of the process; 0 where none runs."""
        return 0 if self._process is None else self._process.pid

    @property
    def stats(self) -> dict[str, float]:
        """Figures that the shadow keeps: `engine.shadow_ring.STAT_NAMES`."""
        return dict(zip(ring.STAT_NAMES, self._ring.stats.tolist(), strict=True))

    @property
    def divergence_by_output(self) -> dict[str, tuple[float, float]]:
        """p50 and p99 of each output's own divergence, by class, of the first outputs."""
        pairs = self._ring.output_stats.tolist()
        classes = self._bundle.classes
        return {name: (p50, p99) for name, (p50, p99) in zip(classes, pairs, strict=False)}

    def submit(self, ticket: int, slot: int, seq: int, fresh: bool, x: np.ndarray) -> None:
        """Hand over an inference of the hot path, if it is one of the declared share."""
        area = self._ring
        ring.submit(
            *(self._gate, self._behind, area.header, area.requests, area.inputs),
            *(ticket, slot, seq, fresh, x),
        )

    def swap(self, bundle: Bundle) -> None:
        """Answer with another bundle, from the next submitted inference on."""
        self._bundle = bundle
        self._set_every()
        self._reload = True
        self._send_reload()
        self._set_gate()

    def _send_reload(self) -> None:
        area = self._ring
        if self.health is Health.LOST:
            return  # it will start with the new bundle
        if area.waiting:
            return  # the text of the one before may not have been read
        area.text = str(self._bundle.path)
        x = np.zeros((1, self._bundle.n_features), dtype=np.float32)
        if ring.push_request(area.header, area.requests, area.inputs, 0, 0, 0, ring.RELOAD, x):
            self._behind[:] = 1
            self._reload = False

    @property
    def answers_wait(self) -> bool:
        """Whether there are answers that no poll has taken."""
        header = self._ring.header
        return bool(header[ring.ANSWER_HEAD] != header[ring.ANSWER_TAIL])

    def poll(
        self, now_ns: int, most: int = MAX_ANSWERS
    ) -> tuple[list[ShadowAnswer | Drifted], Health | None]:
        """Answers that have come, and its health where that has changed.

        Parameters
        ----------
        now_ns : int
            Monotonic time.
        most : int
            Answers that are taken.
        """
        header = self._ring.header
        quiet = not self.answers_wait
        if quiet and self.health is Health.UP and now_ns < self._look_ns and not self._reload:
            return [], None
        self._look_ns = now_ns + min(self._config.poll_ns, self._config.lost_after_ns // 4)
        if self._reload:
            self._send_reload()
        found = self._answers(most)
        taken = int(header[ring.REQUEST_TAIL])
        if taken != self._done or not self._ring.waiting:
            self._done, self._progress_ns = taken, now_ns
        before = self.health
        assert self._process is not None
        code = self._process.poll()
        quiet_ns = now_ns - max(int(header[ring.ALIVE_NS]), self._began_ns)
        stuck_ns = now_ns - self._progress_ns
        lost_after = self._config.lost_after_ns
        if before is Health.LOST:
            if code is None and header[ring.READY] and max(quiet_ns, stuck_ns) < lost_after // 2:
                self.health = Health.UP
            elif now_ns - self._lost_ns > self._config.restart_after_ns:
                self._end()
                self.restarts += 1
                self._start(now_ns)
        elif code is not None:
            self._lose(now_ns, f"its process ended with {code}")
        elif before is Health.STARTING:
            if header[ring.READY]:
                self.health = Health.UP
            elif quiet_ns > STARTING_NS:
                self._lose(now_ns, f"not ready after {quiet_ns / 1e9:.0f} s")
        elif max(quiet_ns, stuck_ns) > lost_after:
            self._lose(now_ns, f"silent for {max(quiet_ns, stuck_ns) / 1e9:.2f} s")
        self._set_gate()
        changed = self.health is not before and self.health is not Health.STARTING
        return found, self.health if changed else None

    def _answers(self, most: int) -> list[ShadowAnswer | Drifted]:
        area, row, payload = self._ring, self._row, self._payload
        found: list[ShadowAnswer | Drifted] = []
        while len(found) < most and ring.pop_answer(
            area.header, area.answers, area.payloads, row, payload
        ):
            ticket, slot, seq, flags = row.tolist()
            if flags & ring.ALERT:
                text = bytes(payload).rstrip(b"\0").decode("ascii", "replace")
                found.append(Drifted(text, ticket))
                continue
            scores = payload[: 8 * self._n_outputs].view(np.float32).reshape(2, -1).copy()
            venue, symbol = self._names[slot]
            found.append(ShadowAnswer(ticket, seq, venue, symbol, flags, scores[0], scores[1]))
        return found

    def _lose(self, now_ns: int, why: str) -> None:
        self.health = Health.LOST
        self.why = why
        self._lost_ns = now_ns

    def _end(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._process = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        if self._process is None:
            return
        self._ring.header[ring.STOP] = 1
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._end()
