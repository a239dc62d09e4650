"""The Pareto front of a search: who is beaten by nobody, and what the front is worth."""

from __future__ import annotations

from collections.abc import Iterable

from models.search.space import Point
from models.search.trial_log import Trial


def points_of(trials: Iterable[Trial]) -> list[Point]:
    """Objectives of the trials that could be quantised."""
    return [trial.measured.objectives for trial in trials if not trial.measured.refused]


def pareto_front(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Trials that no other one beats in one objective without losing in the other.

    Sorted by disagreement. Of several with the same objectives the one with the least divergence
    stands for all, then the earliest; refused choices are none.
    """
    able = [trial for trial in trials if not trial.measured.refused]
    able.sort(key=lambda t: (*t.measured.objectives, t.measured.divergence, t.number))
    front: list[Trial] = []
    for trial in able:
        if not front or trial.measured.latency_ratio < front[-1].measured.latency_ratio:
            front.append(trial)
    return tuple(front)


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """Area that points dominate, up to a reference point; both objectives are to be small.

    Source: Zitzler and Thiele (1999), "Multiobjective Evolutionary Algorithms".
    """
    area, lowest = 0.0, reference[1]
    for first, second in sorted(points):
        if first < reference[0] and second < lowest:
            area += (reference[0] - first) * (lowest - second)
            lowest = second
    return area
