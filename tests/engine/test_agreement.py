"""Answers of the shadow: what a kernel takes by itself changes what Python would have changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import trust
from engine.agreement import ANSWERS, Window
from engine.failover import FailoverConfig
from engine.trust_events import SETTLING, SHADOW_UP, SWAP_REFUSED, Control, ShadowAnswer
from tests.engine.bundles import make_bundle
from tests.engine.records import VENUE, Run, config, flow, opening, records

WARM = 450
ANSWERED = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "one"
    make_bundle(path, seed=1)
    return path


def _run(folder: Path, **failover: object) -> Run:
    run = Run(config(("A",), failover=FailoverConfig(**failover)), folder)
    return run.send(
        *(*opening(0), *flow(0, 2, WARM, seed=1), Control(SHADOW_UP, 0).encode()),
    )


def _answers(run: Run, rng: np.random.Generator, odd: float) -> list[bytes]:
    """What a shadow may say: mostly that it agrees, and of ``odd`` something else."""
    found = []
    for ticket in rng.integers(1, run.pipeline.ticket + 1, ANSWERED).tolist():
        row = run.pipeline.trust.recent.find(ticket)
        assert row is not None
        fp32, flags = row.outputs + rng.normal(0, 0.01, 3).astype(np.float32), 0
        what = rng.integers(8) if rng.random() < odd else -1
        if what == 0:
            ticket += 1 << 20
        elif what == 1:
            flags = SETTLING
        elif what == 2:
            fp32 = -row.outputs
        elif what == 3:
            fp32 = row.outputs[:2]
        elif what == 4:
            fp32 = row.outputs * np.float32(np.nan)
        elif what >= 5:
            fp32 = row.outputs + np.float32(0.6)
        found.append(
            ShadowAnswer(ticket, row.signal_seq, VENUE, "A", flags, fp32, row.outputs).encode()
        )
    return found


def _state(run: Run) -> dict[str, Any]:
    keeper = run.pipeline.trust
    tally = keeper.failover.tally
    return {
        "numbers": tally.numbers.tolist(),
        "diverged": tally.diverged.marks.tolist(),
        "disagreed": tally.disagreed.marks.tolist(),
        "mode": keeper.failover.mode,
        "moves": [str(move.transition) for move in keeper.moves],
        "other class": keeper.disagreements,
    }


@pytest.mark.parametrize("seed", range(6))
def test_a_kernel_and_python_take_answers_alike(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rules: dict[str, object] = {
        "divergence": 0.5,
        "divergences": int(rng.integers(0, 9)),
        "divergences_in": int(rng.integers(1, 20)),
        "disagreement_rate": float(rng.choice([0.0, 0.1, 0.3])),
        "disagreements_in": int(rng.integers(1, 40)),
        "promote_after": int(rng.choice([0, 15])),
    }
    ours, theirs = _run(folder, **rules), _run(folder, **rules)
    answers = _answers(ours, rng, odd=[0.0, 0.02, 0.2][seed % 3])
    by_kernel, by_python = 0, []
    take = ours.pipeline.trust.take

    def note(*event: Any) -> None:
        by_python.append(event)
        take(*event)

    ours.pipeline.trust.take = note  # type: ignore[method-assign]
    for answer in answers:
        buf = np.frombuffer(records([answer]), dtype=np.uint8).copy()
        end = len(buf)
        before = ours.pipeline.trust.shadow_answers
        by_python.clear()
        assert ours.pipeline.serve(buf, 0, end) == end
        if not by_python:
            by_kernel += ours.pipeline.trust.shadow_answers - before
        assert theirs.pipeline.advance(buf, 0, end) == end
        assert _state(ours) == _state(theirs)
    if seed % 3 == 0:
        assert by_kernel == ANSWERED
    else:
        assert 0 < by_kernel < ANSWERED
    assert theirs.pipeline.trust.shadow_answers >= by_kernel


def test_events_behind_an_answer_are_still_taken(folder: Path) -> None:
    run = _run(folder)
    row = run.pipeline.trust.recent.find(run.pipeline.ticket)
    assert row is not None
    answer = ShadowAnswer(row.ticket, 1, VENUE, "A", 0, row.outputs, row.outputs).encode()
    run.pipeline.trust.notes.clear()
    run.send(answer, answer, Control(SWAP_REFUSED, 0, "Ada").encode(), answer)
    assert run.pipeline.trust.shadow_answers == 3
    assert len(run.pipeline.trust.notes) == 1


def test_another_run_s_answers_are_passed_over(folder: Path) -> None:
    run = Run(config(("A",)), folder, follow_trust_events=False)
    run.send(*opening(0), *flow(0, 2, WARM, seed=1))
    row = run.pipeline.trust.recent.find(run.pipeline.ticket)
    assert row is not None
    seen = len(run.signals)
    answer = ShadowAnswer(row.ticket, 1, VENUE, "A", 0, row.outputs, row.outputs).encode()
    run.send(answer, *flow(0, WARM + 2, 20, seed=9))
    assert run.pipeline.trust.failover.tally.numbers[ANSWERS] == 0
    assert run.pipeline.trust.failover.shadow == trust.SHADOW_OFF
    assert len(run.signals) > seen


def test_a_window_counts_what_is_in_it() -> None:
    rng = np.random.default_rng(7)
    marks = rng.random(500) < 0.3
    window = Window(np.zeros(3, dtype=np.int64), 0, 37)
    for i, mark in enumerate(marks.tolist()):
        window.add(mark)
        last = marks[max(0, i - 36) : i + 1]
        assert (window.count, window.seen, window.full) == (last.sum(), len(last), i >= 36)
    window.clear()
    assert (window.count, window.seen, window.full) == (0, 0, False)
