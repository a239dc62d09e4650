"""Who answers: INT8, FP32 or nobody, as an explicit state machine.

::

            violations, divergences,            violations, lateness,
            class changes, lateness             halt
      INT8 ───────────────────────▶ FP32 ───────────────────────▶ HALTED
       ▲   ◀─────────────────────── │                               │
       │     promote, or m shadow   │                               │
       │     answers that agree     │                               │
       └────────────────────────────┴──────────── arm ──────────────┘

`Failover` is told what happened and decides; it reads no clock and knows no model. Every move
happens between two signals, is a `Transition`, and follows from events that stand on the tape. A
HALTED engine answers to nobody but a named person: `arm` takes it back to where its own rules
would have it, FP32 where it had been demoted, else INT8.

Each demotion doubles the number of agreeing answers that the next promotion by rule asks for, up
to `MAX_BACKOFF` times: a model that flaps stays with FP32.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from engine.agreement import Tally
from engine.trust import (
    MODE_FP32,
    MODE_HALTED,
    MODE_INT8,
    MODES,
    SHADOW_AGREEING,
    SHADOW_DIVERGED,
    SHADOW_LOST,
)

MAX_BACKOFF: Final = 64
MAX_WINDOW: Final = 1 << 20

Window = Annotated[int, Meta(ge=1, le=MAX_WINDOW)]
Threshold = Annotated[int, Meta(ge=0, le=MAX_WINDOW)]
Rate = Annotated[float, Meta(ge=0.0, le=1.0)]


class FailoverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When INT8 is believed no longer, and when again; 0 turns a rule off.

    Attributes
    ----------
    violations, violations_in : int
        So many inferences that the value check holds against the model (saturated layers, an
        output that is no number or does not move), or that failed, among the last so many:
        INT8 → FP32, FP32 → HALTED.
    input_violations, input_violations_in : int
        So many inputs that no model could answer (not finite, out of range, stuck): → HALTED.
    divergence : float
        An INT8 score that differs by more from FP32's diverges.
    divergences, divergences_in : int
        So many diverging answers among the last so many of the shadow: INT8 → FP32.
    disagreement_rate, disagreements_in : float, int
        A greater share of other classes among the last so many: INT8 → FP32.
    inference_budget_ns : int
        An inference that takes longer is late: its signal is suppressed. Measured live, on the
        tape as an event.
    late : str
        What a late inference does: "fp32" (INT8 → FP32 → HALTED), "halt", or "tell".
    hang_ns : int
        An inference that takes longer has hung, and what waited behind it is old: → HALTED.
    shadow_lost : str
        What the loss of the shadow does: "halt", or "tell" (signals say so either way).
    stuck_outputs : int
        So many inferences of an instrument in a row with the same scores for different inputs are
        a violation.
    promote_after : int
        So many agreeing answers in a row while FP32 answers: FP32 → INT8. 0: only by a person.
    """

    violations: Threshold = 3
    violations_in: Window = 100
    input_violations: Threshold = 0
    input_violations_in: Window = 100
    divergence: Annotated[float, Meta(gt=0.0)] = 1.0
    divergences: Threshold = 8
    divergences_in: Window = 64
    disagreement_rate: Rate = 0.2
    disagreements_in: Window = 256
    inference_budget_ns: Annotated[int, Meta(ge=0, le=86_400_000_000_000)] = 100_000_000
    late: Literal["fp32", "halt", "tell"] = "fp32"
    hang_ns: Annotated[int, Meta(ge=0, le=86_400_000_000_000)] = 1_000_000_000
    shadow_lost: Literal["halt", "tell"] = "tell"
    stuck_outputs: Threshold = 2_000
    promote_after: Threshold = 0


class Transition(NamedTuple):
    """One move of the engine.

    Attributes
    ----------
    before, after : int
        `engine.trust.MODES`.
    rule : str
        What made it: a key of the config, or a command.
    detail : str
        The figures that the rule saw.
    by : str
        The person, or "" where a rule decided.
    """

    before: int
    after: int
    rule: str
    detail: str
    by: str = ""

    def __str__(self) -> str:
        who = f" by {self.by}" if self.by else ""
        return f"{MODES[self.before]} -> {MODES[self.after]}{who}: {self.rule}: {self.detail}"


class Failover:
    """The state machine; one for the whole engine, as all instruments share the model.

    Parameters
    ----------
    config : FailoverConfig
    fp32_only : bool
        The config asks for FP32: there is nothing to be demoted from.
    start_halted : bool

    Attributes
    ----------
    mode : int
        What answers the next signal.
    tally : Tally
        What the shadow's last answers said; a kernel takes those that agree.
    transitions : int
        Moves so far.
    """

    def __init__(
        self, config: FailoverConfig, *, fp32_only: bool = False, start_halted: bool = False
    ) -> None:
        self._config = config
        self._base = MODE_FP32 if fp32_only else MODE_INT8
        self.mode = MODE_HALTED if start_halted else self._base
        self.halted_why = "start_halted" if start_halted else ""
        self.tally: Final = Tally(self._base, config.divergences_in, config.disagreements_in)
        self.transitions = 0
        self._violations: deque[int] = deque()
        self._input_violations: deque[int] = deque()
        self._demotions = 0

    @property
    def serving(self) -> int:
        """MODE_INT8 or MODE_FP32: which model runs, halted or not."""
        return self.tally.serving

    @property
    def shadow(self) -> int:
        """`engine.trust.SHADOW_STATES`."""
        return self.tally.shadow

    # What the pipeline saw of an inference.

    def violated(self, ticket: int, detail: str) -> Transition | None:
        """An inference that speaks against the model that answered."""
        rule = self._config
        if not _k_in_n(self._violations, ticket, rule.violations, rule.violations_in):
            return None
        what = f"{rule.violations} in {rule.violations_in}, last: {detail}"
        return self._worse("violations", what)

    def bad_input(self, ticket: int, detail: str) -> Transition | None:
        """An input that speaks against the data."""
        rule = self._config
        if not _k_in_n(
            self._input_violations, ticket, rule.input_violations, rule.input_violations_in
        ):
            return None
        what = f"{rule.input_violations} in {rule.input_violations_in}, last: {detail}"
        return self._halt("input_violations", what)

    def late(self, took_ns: int) -> Transition | None:
        """An inference over its budget."""
        what = f"{took_ns:,} ns, budget {self._config.inference_budget_ns:,} ns"
        if 0 < self._config.hang_ns < took_ns:
            return self._halt("hang_ns", what)
        if self._config.late == "tell":
            return None
        if self._config.late == "halt":
            return self._halt("inference_budget_ns", what)
        return self._worse("inference_budget_ns", what)

    # What the shadow said.

    def answered(self, divergence: float, other_class: bool) -> Transition | None:
        """The shadow's answer for one inference; ``divergence`` NaN where a score is no number."""
        rule, tally = self._config, self.tally
        diverges = not divergence <= rule.divergence
        tally.diverged.add(diverges)
        tally.disagreed.add(other_class)
        diverged = tally.diverged.count
        many = 0 < rule.divergences <= diverged
        rate = tally.disagreed.count / tally.disagreed.seen
        differ = 0.0 < rule.disagreement_rate < rate and tally.disagreed.full
        tally.agreeing = 0 if diverges or other_class else tally.agreeing + 1
        if many or differ:
            tally.shadow = SHADOW_DIVERGED
        elif tally.shadow != SHADOW_DIVERGED or tally.agreeing >= rule.divergences_in:
            tally.shadow = SHADOW_AGREEING  # once diverged, it takes a whole window to be believed
        if tally.serving == MODE_FP32:
            return self._promote_by_rule()
        if many:
            what = f"{diverged} of the last {tally.diverged.seen} by more than "
            return self._worse("divergences", what + f"{rule.divergence:g}, last {divergence:.4g}")
        if differ:
            what = f"{rate:.1%} of the last {tally.disagreed.seen}"
            return self._worse("disagreement_rate", what)
        return None

    def shadow_up(self) -> None:
        """The shadow answers, or does again: what it said before is forgotten."""
        self.tally.shadow = SHADOW_AGREEING
        self.tally.forget()

    def shadow_lost(self, why: str) -> Transition | None:
        """The shadow does not answer."""
        self.tally.shadow = SHADOW_LOST
        self.tally.agreeing = 0
        return self._halt("shadow_lost", why) if self._config.shadow_lost == "halt" else None

    # What a person commanded.

    def halt(self, by: str, why: str) -> Transition | None:
        """Stop; None where it stands already."""
        return self._halt("halt", why or "commanded", by)

    def arm(self, by: str) -> Transition | None:
        """Go on after a halt."""
        if self.mode != MODE_HALTED:
            return None
        self._clear_rules()
        return self._move(self.tally.serving, "arm", f"after {self.halted_why}", by)

    def demote(self, by: str, why: str) -> Transition | None:
        """INT8 → FP32; a halted engine stays halted, and goes on with FP32 once armed."""
        if self.tally.serving == MODE_FP32:
            return None
        self._demoted()
        return self._move(self._stands(), "demote", why or "commanded", by)

    def promote(self, by: str) -> Transition | None:
        """FP32 → INT8."""
        if self.tally.serving == self._base:
            return None
        return self._promoted("promote", "commanded", by)

    def swapped(self) -> None:
        """Another model answers from here on: what was seen of the one before is forgotten.

        A demotion speaks against the model that was demoted, so the new one starts with INT8. A
        halt stands.
        """
        self.tally.serving = self._base
        if self.mode != MODE_HALTED:
            self.mode = self.tally.serving
        self._demotions = 0
        self._clear_rules()
        if self.tally.shadow == SHADOW_DIVERGED:
            self.tally.shadow = SHADOW_AGREEING

    # Moves.

    def _stands(self) -> int:
        return MODE_HALTED if self.mode == MODE_HALTED else self.tally.serving

    def _move(self, after: int, rule: str, detail: str, by: str = "") -> Transition:
        before, self.mode = self.mode, after
        self.transitions += 1
        return Transition(before, after, rule, detail, by)

    def _halt(self, rule: str, detail: str, by: str = "") -> Transition | None:
        if self.mode == MODE_HALTED:
            return None
        self.halted_why = f"{rule}: {detail}"
        return self._move(MODE_HALTED, rule, detail, by)

    def _worse(self, rule: str, detail: str) -> Transition | None:
        """INT8 → FP32 → HALTED."""
        if self.mode == MODE_HALTED:
            return None
        if self.tally.serving == MODE_FP32:
            return self._halt(rule, detail)
        self._demoted()
        return self._move(MODE_FP32, rule, detail)

    def _demoted(self) -> None:
        self.tally.serving = MODE_FP32
        self._demotions += 1
        self._clear_rules()

    def _promote_by_rule(self) -> Transition | None:
        wanted = self._config.promote_after
        if wanted == 0 or self._base == MODE_FP32:
            return None
        wanted *= min(1 << max(self._demotions - 1, 0), MAX_BACKOFF)
        if self.tally.agreeing < wanted:
            return None
        return self._promoted("promote_after", f"{self.tally.agreeing} agreeing answers in a row")

    def _promoted(self, rule: str, detail: str, by: str = "") -> Transition:
        self.tally.serving = MODE_INT8
        self._clear_rules()
        return self._move(self._stands(), rule, detail, by)

    def _clear_rules(self) -> None:
        self.tally.forget()
        self._violations.clear()
        self._input_violations.clear()


def _k_in_n(marks: deque[int], ticket: int, k: int, n: int) -> bool:
    """Note that ``ticket`` counted: are there ``k`` among the ``n`` tickets up to it?"""
    if k == 0:
        return False
    marks.append(ticket)
    while marks[0] <= ticket - n:
        marks.popleft()
    return len(marks) >= k
