# Hot path: `Oversight.submit`; everything else is called beside it.
"""What stands beside the hot path and watches it: shadow, commands, evidence, swaps, recalibration.

It never changes the pipeline. What it sees and what it is told becomes an event, which the daemon
puts on the tape and the pipeline takes between two ticks.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from engine import evidence, state
from engine.child import run_child
from engine.config import Config
from engine.control import ControlServer, Request
from engine.handshake import Notice
from engine.live import NEVER_NS
from engine.metrics import MetricsServer
from engine.pipeline import Pipeline
from engine.shadow import MAX_ANSWERS, Drifted, Health, Shadow
from engine.swap import Swapper
from engine.trust import MODE_HALTED, MODES, SHADOW_STATES
from engine.trust_events import (
    ARM,
    DEMOTE,
    DRIFT,
    HALT,
    PROMOTE,
    RECALIBRATION,
    ROLLBACK,
    SHADOW_LOST,
    SHADOW_UP,
    SWAP,
    SWAP_REFUSED,
    Control,
)
from engine.trust_keeper import Move
from feeds import tape
from feeds.errors import InputError

HALT_FILE_POLL_S: Final = 0.004
SAFETY_POLL_S: Final = 0.05  # the control socket's descriptor is edge-triggered
ANSWERS_A_LOOK: Final = 2  # of the shadow: some 50 µs each, and the next message is on its way
RECALIBRATION_TIMEOUT_S: Final = 3_600.0
_AT_ONCE: Final = {"halt": HALT, "arm": ARM, "demote": DEMOTE, "promote": PROMOTE}

Take = Callable[[int, bytes], None]  # kind of tape record, payload
Tell = Callable[[int, int, str], None]  # slot or -1, severity, text


class Oversight:
    """Beside one daemon.

    Parameters
    ----------
    config : Config
    pipeline : Pipeline
    context : zmq.Context
    now_ns : callable
        The daemon's clock.
    take : callable
        Puts an event on the tape and lets the pipeline take it.
    tell : callable
        Publishes an alert.
    values : callable
        The engine's state, for ``status``.
    notice : callable
        Takes one line for the operator.

    Attributes
    ----------
    shadow : Shadow or None
    control : ControlServer or None
    written : int
        Evidence files.
    look_ns : int
        Monotonic time from which on it is time to `look`.
    patience_ns : int
        How long what is watched here may wait for the loop.
    """

    def __init__(
        self,
        config: Config,
        pipeline: Pipeline,
        context: zmq.Context[Any],
        *,
        now_ns: Callable[[], int],
        take: Take,
        tell: Tell,
        values: Callable[[], dict[str, Any]],
        notice: Notice,
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._now_ns = now_ns
        self._take = take
        self._tell = tell
        self._values = values
        self._notice = notice
        self._swapper = Swapper(config, pipeline)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._changing = False  # a swap or recalibration is under way
        self._halted_by_file = False
        self._recalibrated_ns = 0
        self.written = 0
        self.patience_ns = round(SAFETY_POLL_S * 1e9)
        if config.controls.halt_file:
            self.patience_ns = round(HALT_FILE_POLL_S * 1e9)
        self.tape_path = ""
        self.metrics: MetricsServer | None = None
        if config.metrics.address:
            self.metrics = MetricsServer(config.metrics.address, self._figures)
        self.control: ControlServer | None = None
        self.shadow: Shadow | None = None
        if config.control.endpoint:
            self.control = ControlServer(context, config.control)
        if config.evidence.folder:
            pipeline.trust.on_move = self._keep_evidence
        loaded = pipeline.trust.loaded
        self.look_ns = NEVER_NS
        if config.shadow.every > 0 and loaded is not None:
            self.look_ns = 0
            self.shadow = Shadow(
                config.shadow, config.drift, loaded.bundle, pipeline.names, time.monotonic_ns()
            )

    # The hot path.

    def submit(self, slot: int, seq: int, fresh: bool) -> None:
        """Hand the inference just made to the shadow."""
        if self.shadow is not None:
            pipeline = self._pipeline
            self.shadow.submit(pipeline.ticket, slot, seq, fresh, pipeline.x)

    def report(self) -> None:
        """Tell every move and note of the pipeline; cheap where there is none."""
        pipeline = self._pipeline
        while pipeline.trust.moves:
            move = pipeline.trust.moves.popleft()
            text = str(move.transition)
            halted = move.transition.after == MODE_HALTED
            self._tell(-1, state.CRITICAL if halted else state.WARNING, text)
            self._notice(text)
        while pipeline.trust.notes:
            note = pipeline.trust.notes.popleft()
            severity = state.WARNING if note.severity == "warning" else state.INFO
            self._tell(-1, severity, note.text)
            self._notice(note.text)
        while pipeline.trust.retired:
            # Freeing a session takes milliseconds.
            self._start(asyncio.to_thread(pipeline.trust.retired.pop().close))

    def _keep_evidence(self, move: Move) -> None:
        folder = self._config.evidence.folder
        found = evidence.gather(self._pipeline, self._config, move)
        self.written += 1

        async def write() -> None:
            try:
                await asyncio.to_thread(evidence.write, folder, found)
            except OSError as error:
                self._notice(f"evidence cannot be written: {folder}: {error}")

        self._start(write())

    # Its own loop.

    def _figures(self) -> dict[str, Any]:
        by_output = {} if self.shadow is None else self.shadow.divergence_by_output
        more = {"suppressed": self._pipeline.suppressed, "divergence_by_output": by_output}
        return self._values() | more

    async def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to watch, on a running loop."""
        # One thread: what it allocates for one model is free for the next.
        loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="octick"))
        if self.metrics is not None:
            await self.metrics.start()
        if self.control is not None:
            loop.add_reader(self.control.fd, self._serve)
            self._every(loop, SAFETY_POLL_S, self._serve)
        if self._config.controls.halt_file:
            self._every(loop, HALT_FILE_POLL_S, self._look_for_halt_file)
        if self.shadow is not None:
            self._every(loop, self._config.shadow.poll_ns / 1e9, self._look_late)

    def _every(
        self, loop: asyncio.AbstractEventLoop, period_s: float, call: Callable[[], None]
    ) -> None:
        at = len(self._timers)

        def again() -> None:
            self._timers[at] = loop.call_later(period_s, again)
            call()

        self._timers.append(loop.call_later(period_s, again))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            task = asyncio.get_running_loop().create_task(work)
        except RuntimeError:  # no loop runs yet, or any more
            asyncio.run(work)
            return
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop watching; what is under way is given up, evidence is written out."""
        for timer in self._timers:
            timer.cancel()
        if self.control is not None:
            loop.remove_reader(self.control.fd)
        if self.metrics is not None:
            await self.metrics.stop()
        for task in list(self._tasks):
            if task.get_name().startswith("change"):
                task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def event(self, control: Control) -> None:
        """Put an event on the tape and let the pipeline take it."""
        self._take(tape.CONTROL, control.encode())

    def halt(self, by: str, why: str) -> None:
        """Nothing is tradable from the next message on."""
        self.event(Control(HALT, self._now_ns(), by, why))

    def _look_for_halt_file(self) -> None:
        there = os.path.exists(self._config.controls.halt_file)
        if there and not self._halted_by_file:
            self.halt("file", self._config.controls.halt_file)
        self._halted_by_file = there

    def look(self) -> None:
        """Take what the shadow says and the hot path has left, where it is time to.

        Called right behind a message: what this needs is in the caches then, and it takes a third
        of what it takes at any other moment, in which the next message might come.
        """
        if self.shadow is not None and time.monotonic_ns() >= self.look_ns:
            self._poll_shadow(ANSWERS_A_LOOK)

    def _look_late(self) -> None:
        """The same where no message came for a while."""
        if time.monotonic_ns() >= self.look_ns + self._config.shadow.poll_ns // 2:
            self._poll_shadow(MAX_ANSWERS)

    def _poll_shadow(self, most: int) -> None:
        shadow = self.shadow
        assert shadow is not None
        now_ns = time.monotonic_ns()
        found, health = shadow.poll(now_ns, most)
        self.look_ns = now_ns + (0 if shadow.answers_wait else self._config.shadow.poll_ns)
        for item in found:
            if isinstance(item, Drifted):
                self.event(
                    Control(DRIFT, self._now_ns(), "drift monitor", item.text, value=item.rows)
                )
                self._recalibrate_on_drift()
            else:
                self._take(tape.SHADOW, item.encode())
        if health is Health.UP:
            self.event(Control(SHADOW_UP, self._now_ns(), "shadow", f"process {shadow.pid}"))
        elif health is Health.LOST:
            self.event(Control(SHADOW_LOST, self._now_ns(), "shadow", shadow.why))

    # Commands.

    def _serve(self) -> None:
        assert self.control is not None
        for request in self.control.poll():
            self._obey(request)

    def _obey(self, request: Request) -> None:
        command = request.command
        name = command.command
        if name in _AT_ONCE:
            by = command.by or "control socket"
            self.event(Control(_AT_ONCE[name], self._now_ns(), by, command.reason))
            if name == "arm" and self._halted_by_file:
                self._confirm(request, warning="the halt file is still there")
            else:
                self._confirm(request)
        elif name == "status":
            self._confirm(request)
        elif self._changing:
            self._refuse(request, "a swap or recalibration is under way: try again later")
        elif name == "swap":
            self._change(self._swap(command.bundle, command.by or "control socket", request))
        elif name == "rollback":
            self._rollback(request)
        else:
            self._change(self._recalibrate(command.by or "control socket", request))

    def _confirm(self, request: Request, **more: Any) -> None:
        assert self.control is not None
        head = {"ok": True, "command": request.command.command}
        self.control.answer(request, head | more | self.status())

    def _refuse(self, request: Request | None, why: str) -> None:
        if request is not None and self.control is not None:
            command = request.command.command
            self.control.answer(request, {"ok": False, "command": command, "error": why})

    def status(self) -> dict[str, Any]:
        """What ``octick control status`` prints."""
        pipeline, shadow = self._pipeline, self.shadow
        previous = pipeline.trust.previous
        loaded = pipeline.trust.loaded
        values = self._values()
        for name in ("model_hash", "config_hash", "feature_hash", "code_hash"):
            values[name] = f"{values[name]:016x}"
        values["mode"] = MODES[values["mode"]]
        values["shadow_state"] = SHADOW_STATES[values["shadow_state"]]
        return values | {
            "halted_why": pipeline.trust.failover.halted_why if values["mode"] == "HALTED" else "",
            "bundle": "" if loaded is None else str(loaded.bundle.path),
            "previous_bundle": "" if previous is None else str(previous.bundle.path),
            "divergence_by_output": {} if shadow is None else shadow.divergence_by_output,
            "shadow_health": "off" if shadow is None else shadow.health.value,
            "shadow_pid": 0 if shadow is None else shadow.pid,
            "shadow_restarts": 0 if shadow is None else shadow.restarts,
            "suppressed": dict(pipeline.suppressed),
            "evidence_files": self.written,
            "changing": self._changing,
            "recalibrated_ns": self._recalibrated_ns,
        }

    # Another model.

    def _change(self, work: Coroutine[Any, Any, None]) -> None:
        self._changing = True

        async def guarded() -> None:
            try:
                await work
            finally:
                self._changing = False

        task = asyncio.get_running_loop().create_task(guarded(), name="change")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _swap(self, candidate: str, by: str, request: Request | None = None) -> None:
        try:
            loaded = await self._swapper.open(candidate)
        except (InputError, OSError) as error:
            why = str(error)
            self.event(Control(SWAP_REFUSED, self._now_ns(), by, why))
            self._refuse(request, why)
            return
        model_hash = loaded.bundle.model_hash
        self._pipeline.trust.offer(loaded)
        self.event(Control(SWAP, self._now_ns(), by, candidate, model_hash=model_hash))
        if self.shadow is not None:
            self.shadow.swap(loaded.bundle)
        if request is not None:
            self._confirm(request)

    def _rollback(self, request: Request) -> None:
        previous = self._pipeline.trust.previous
        if previous is None:
            self._refuse(request, "no model served before this one")
            return
        by = request.command.by or "control socket"
        bundle = previous.bundle
        self.event(
            Control(ROLLBACK, self._now_ns(), by, str(bundle.path), model_hash=bundle.model_hash)
        )
        if self.shadow is not None:
            self.shadow.swap(bundle)
        self._confirm(request)

    # Recalibration.

    def on_timer(self, now_ns: int) -> None:
        """Event time has come to ``now_ns``: is a recalibration due?"""
        every = self._config.recalibration.every_ns
        if self._recalibrated_ns == 0:
            self._recalibrated_ns = now_ns
        if every and now_ns - self._recalibrated_ns >= every and self._can_recalibrate():
            self._recalibrated_ns = now_ns
            self._change(self._recalibrate("schedule"))

    def _can_recalibrate(self) -> bool:
        return bool(self._config.recalibration.folder and self.tape_path and not self._changing)

    def _recalibrate_on_drift(self) -> None:
        config, now_ns = self._config.recalibration, self._now_ns()
        paused = now_ns - self._recalibrated_ns >= config.min_pause_ns
        if config.on_drift and paused and self._can_recalibrate():
            self._recalibrated_ns = now_ns
            self._change(self._recalibrate("drift"))

    async def _recalibrate(self, by: str, request: Request | None = None) -> None:
        """Make a candidate from the tape in a process of its own, then swap it in."""
        config = self._config.recalibration
        loaded = self._pipeline.trust.loaded
        if loaded is None or not config.folder or not self.tape_path:
            self._refuse(request, "recalibration needs recalibration.folder and tape.path")
            return
        now_ns = self._now_ns()
        self.event(Control(RECALIBRATION, now_ns, by, "started"))
        out = Path(config.folder) / f"{now_ns}"
        try:
            code, answer, errors = await run_child(
                *("-m", "octick", "model", "recalibrate", str(loaded.bundle.path)),
                *("--tape", self.tape_path, "--out", str(out), "--rows", str(config.rows)),
                *("--calibration-set", str(Path(config.folder) / "calibration-set.npz")),
                *("--max-agreement-loss", str(config.max_agreement_loss), "--json"),
                timeout_s=RECALIBRATION_TIMEOUT_S,
            )
        except (InputError, OSError) as error:
            code, answer, errors = 2, b"", str(error).encode()
        verdict = _verdict(answer)
        if code != 0:
            why = "; ".join(verdict.refused) or errors.decode(errors="replace").strip()[-250:]
            self.event(Control(SWAP_REFUSED, self._now_ns(), by, why))
            self._refuse(request, why)
            return
        if verdict.unchanged:
            self.event(Control(RECALIBRATION, self._now_ns(), by, "the same model came out"))
            if request is not None:
                self._confirm(request, warning="the same model came out: nothing to swap")
            return
        await self._swap(str(out), by, request)

    def close(self) -> None:
        """End the shadow and close the control socket. Closing twice is fine."""
        if self.shadow is not None:
            self.shadow.close()
        if self.control is not None:
            self.control.close()


class _Recalibrated(msgspec.Struct, frozen=True):
    """What of a recalibration's answer is needed here."""

    refused: tuple[str, ...] = ()
    unchanged: bool = False


def _verdict(answer: bytes) -> _Recalibrated:
    try:
        return msgspec.json.decode(answer, type=_Recalibrated)
    except msgspec.DecodeError:
        return _Recalibrated()
