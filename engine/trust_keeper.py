"""Who answers, and why: the models, the rules, and the events that move the engine between them.

The pipeline hands over what it saw of each suppressed signal and each trust event of the tape;
what is decided here holds from the next signal on. Nothing here reads a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from engine.bundle import Bundle
from engine.config import Config
from engine.failover import Failover, Transition
from engine.features import N_FEATURES
from engine.recent import Recent
from engine.serving import Loaded, Serving
from engine.trust import (
    CHECKS_OF_INPUT,
    MODE_INT8,
    NUMERICS,
    PRECISIONS,
    REASON_INFERENCE_FAILED,
    check_names,
)
from engine.trust_events import (
    ARM,
    COMMAND_NAMES,
    DEMOTE,
    HALT,
    INFERENCE_LATE,
    PROMOTE,
    ROLLBACK,
    SETTLING,
    SHADOW_LOST,
    SHADOW_UP,
    SWAP,
    Control,
    ShadowAnswer,
)
from feeds.errors import InputError

MAX_UNTOLD: Final = 1_024  # moves and notes kept for whoever tells them; older ones go

# Where a model that an event of the tape names comes from: its hash and folder.
Load = Callable[[int, str], Loaded]


class Move(NamedTuple):
    """A transition, and the inference that led to it.

    Attributes
    ----------
    number : int
        Counts the moves of this run from 1.
    transition : Transition
    at_ns : int
        Receive time of the event that it follows from.
    slot : int
        Instrument, -1 for none.
    ticket : int
        Inference, 0 for none.
    answer : ShadowAnswer or None
        What the shadow said to it, where that is what led here.
    """

    number: int
    transition: Transition
    at_ns: int
    slot: int
    ticket: int
    answer: ShadowAnswer | None = None


class Note(NamedTuple):
    """Something that a person should know and that moved nothing."""

    at_ns: int
    severity: str
    text: str


class TrustKeeper:
    """The serving models and the state machine over them.

    Parameters
    ----------
    config : Config
    names : list of (str, str)
        Venue and symbol of each slot.
    loaded : Loaded or None
        The model to serve; None where nothing infers. It is closed here.
    load : callable, optional
        Gives the model that a swap on the tape names; without it only those given to `offer`.
    take_over : callable
        Told the bundle that serves from now on.
    n_outputs : int

    Attributes
    ----------
    failover : Failover
    serving : Serving or None
    precision, numerics : int
        Of what answers; see `engine.trust`.
    recent : Recent
    moves, notes : deque of Move, deque of Note
        Untold; whoever tells them takes them out.
    on_move : callable or None
        Told each move as it happens, while all is as the rule saw it.
    retired : list of Loaded
        Models that no rollback can reach, for their owner to close.
    late : dict of int to (int, int)
        By slot: signal_seq and nanoseconds of inferences that the tape says were late.
    disagreements, swaps : int
        So far: answers of the shadow of another class, and models that took over.
    """

    def __init__(
        self,
        config: Config,
        names: list[tuple[str, str]],
        loaded: Loaded | None,
        *,
        load: Load | None,
        take_over: Callable[[Bundle], None],
        n_outputs: int,
    ) -> None:
        self.failover: Final = Failover(
            config.failover,
            fp32_only=config.model.precision == "fp32",
            start_halted=config.controls.start_halted,
        )
        self.recent: Final = Recent(len(names), N_FEATURES, n_outputs)
        self.moves: Final[deque[Move]] = deque(maxlen=MAX_UNTOLD)
        self.notes: Final[deque[Note]] = deque(maxlen=MAX_UNTOLD)
        self.on_move: Callable[[Move], None] | None = None
        self.retired: Final[list[Loaded]] = []
        self.disagreements = self.swaps = 0
        self.precision = self.numerics = 0
        self._names = names
        self._load = load
        self._take_over = take_over
        self.late: Final[dict[int, tuple[int, int]]] = {}
        self._shelf: dict[int, Loaded] = {}
        self.serving: Serving | None = None
        if loaded is not None:
            self.serving = Serving(loaded, len(names), self.recent)
            self._serve()

    @property
    def loaded(self) -> Loaded | None:
        """The model that serves."""
        return None if self.serving is None else self.serving.loaded

    @property
    def shadow_answers(self) -> int:
        """Answers of the shadow that were held against an inference."""
        return self.failover.tally.answers

    @property
    def previous(self) -> Loaded | None:
        """The model that a rollback would bring back."""
        return None if self.serving is None else self.serving.previous

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Layers of the value check's bits from `engine.trust.CHECK_LAYERS` on."""
        checks = None if self.loaded is None else self.loaded.bundle.manifest.checks
        return () if checks is None else checks.int8

    @property
    def model_hash(self) -> int:
        """Of the model that serves; 0 without one."""
        return 0 if self.loaded is None else self.loaded.bundle.model_hash

    def offer(self, loaded: Loaded) -> None:
        """Have a model at hand for the swap that will name it."""
        self._shelf[loaded.bundle.model_hash] = loaded

    def told_late(self, slot: int, signal_seq: int) -> int:
        """What the tape says that this signal's inference took, if it was late; else 0."""
        seq, took_ns = self.late.get(slot, (0, 0))
        if seq != signal_seq:
            return 0
        del self.late[slot]
        return took_ns

    def judge(
        self, slot: int, ticket: int, at_ns: int, reasons: int, value_check: int, late_ns: int
    ) -> None:
        """Let the rules see a suppressed signal.

        Parameters
        ----------
        slot, ticket : int
            Instrument and inference.
        at_ns : int
            Receive time of what made the signal due.
        reasons, value_check : int
            As they stand in the signal.
        late_ns : int
            What its inference took where that was over its budget, else 0.
        """
        failover = self.failover
        if value_check & CHECKS_OF_INPUT:
            detail = "; ".join(check_names(value_check))
            self._moved(failover.bad_input(ticket, detail), at_ns, slot, ticket)
        elif value_check or reasons & REASON_INFERENCE_FAILED:
            detail = "; ".join(check_names(value_check, self.layer_names)) or "inference failed"
            self._moved(failover.violated(ticket, detail), at_ns, slot, ticket)
        if late_ns:
            self._moved(failover.late(late_ns), at_ns, slot, ticket)

    def take(self, event: Control | ShadowAnswer, at_ns: int) -> None:
        """Take one event, received at ``at_ns``.

        Raises
        ------
        InputError
            For a swap to a model that cannot be had.
        """
        if isinstance(event, ShadowAnswer):
            self._take_answer(event, at_ns)
        else:
            self._take_control(event, at_ns)

    def _take_answer(self, answer: ShadowAnswer, at_ns: int) -> None:
        """Hold the shadow's answer against what was answered on the hot path."""
        row = self.recent.find(answer.ticket)
        if row is None or len(answer.fp32) != len(row.outputs):
            return
        self.failover.tally.answers += 1
        if answer.flags & SETTLING:
            return
        # While FP32 answers, the shadow tells what INT8 would have said.
        int8 = row.outputs if row.mode == MODE_INT8 else answer.int8
        divergence = float(np.abs(int8 - answer.fp32).max())
        other = bool(np.argmax(int8) != np.argmax(answer.fp32))
        self.disagreements += other
        move = self.failover.answered(divergence, other)
        self._moved(move, at_ns, row.slot, row.ticket, answer)

    def _take_control(self, event: Control, at_ns: int) -> None:
        failover, command, by = self.failover, event.command, event.by
        move = None
        if command == HALT:
            move = failover.halt(by, event.text)
        elif command == ARM:
            move = failover.arm(by)
        elif command == DEMOTE:
            move = failover.demote(by, event.text)
        elif command == PROMOTE:
            move = failover.promote(by)
        elif command in (SWAP, ROLLBACK):
            self._swap(event, at_ns)
        elif command == SHADOW_UP:
            failover.shadow_up()
        elif command == SHADOW_LOST:
            move = failover.shadow_lost(event.text)
        elif command == INFERENCE_LATE:
            if (event.venue, event.symbol) in self._names:
                slot = self._names.index((event.venue, event.symbol))
                self.late[slot] = (event.signal_seq, event.value)
            return
        self._moved(move, at_ns)
        if move is None:
            severity = "warning" if command >= SHADOW_LOST else "info"
            name = COMMAND_NAMES.get(command, f"command {command}")
            text = ": ".join(part for part in (name, by, event.text) if part)
            self.notes.append(Note(at_ns, severity, text))

    def _swap(self, event: Control, at_ns: int) -> None:
        """Serve another model from the next inference on."""
        serving = self.serving
        if serving is None:
            return
        loaded = self._shelf.pop(event.model_hash, None)
        previous = serving.previous
        if loaded is None and previous and previous.bundle.model_hash == event.model_hash:
            loaded = previous
        if loaded is None:
            if self._load is None:
                raise InputError(
                    "a swap to a model that is not at hand",
                    where=f"trust event at {at_ns}",
                    expected=f"model {event.model_hash:016x}",
                    found=event.text,
                )
            loaded = self._load(event.model_hash, event.text)
        retired = serving.replace(loaded)
        if retired is not None:
            self.retired.append(retired)
        self._take_over(loaded.bundle)
        self.failover.swapped()
        self._serve()
        self.swaps += 1

    def _serve(self) -> None:
        """Let the model of the mode in force answer."""
        serving = self.serving
        if serving is None:
            return
        serving.switch(self.failover.serving)
        info = serving.backend.info()
        self.precision = PRECISIONS.index(info.precision)
        self.numerics = NUMERICS.index(info.numerics)

    def _moved(
        self,
        transition: Transition | None,
        at_ns: int,
        slot: int = -1,
        ticket: int = 0,
        answer: ShadowAnswer | None = None,
    ) -> None:
        if transition is None:
            return
        self._serve()
        move = Move(self.failover.transitions, transition, at_ns, slot, ticket, answer)
        self.moves.append(move)
        if self.on_move is not None:
            self.on_move(move)

    def close(self) -> None:
        """Give every model back. Closing twice is fine."""
        for loaded in (*self._shelf.values(), *self.retired):
            loaded.close()
        self._shelf.clear()
        self.retired.clear()
        if self.serving is not None:
            self.serving.close()
            self.serving = None
