"""Labels, parts and streams: nothing of a later part reaches an earlier one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import features
from feeds.errors import InputError
from models.dataset import Rows
from models.labels import CLASSES
from models.sequences import (
    EMBARGO,
    NO_LABEL,
    TEST,
    TRAIN,
    VALIDATION,
    Dataset,
    LabelKind,
    class_shares,
    find_leaks,
    load_dataset,
    make_dataset,
    split_in_time,
)

HORIZON = 20


def random_rows(n: int = 6_000, slots: int = 2, seed: int = 0) -> Rows:
    """A random walk of several instruments, interleaved."""
    rng = np.random.default_rng(seed)
    slot = rng.integers(0, slots, n)
    mid = np.zeros(n, dtype=np.int64)
    for k in range(slots):
        own = slot == k
        mid[own] = 20_000 + np.cumsum(rng.integers(-1, 2, own.sum()))
    starts = np.zeros(n, dtype=bool)
    starts[np.unique(slot, return_index=True)[1]] = True
    return Rows(
        rng.normal(size=(n, features.N_FEATURES)),
        slot,
        mid,
        rng.integers(1, 4, n),
        np.cumsum(rng.integers(1, 2_000_000, n)),
        np.arange(n),
        starts,
    )


@given(
    st.lists(st.integers(0, 10_000), min_size=1, max_size=200),
    st.floats(0.05, 0.4),
    st.floats(0.05, 0.4),
    st.integers(0, 500),
)
def test_parts_follow_each_other_with_an_embargo_between(
    times: list[int], validation: float, test: float, embargo_ns: int
) -> None:
    time_ns = np.array(times, dtype=np.int64)
    part = split_in_time(time_ns, validation, test, embargo_ns)
    order = np.argsort(time_ns, kind="stable")
    kept = part[order][part[order] != EMBARGO]
    assert np.all(np.diff(kept) >= 0)
    for earlier, later in ((TRAIN, VALIDATION), (VALIDATION, TEST), (TRAIN, TEST)):
        if (part == earlier).any() and (part == later).any():
            gap = time_ns[part == later].min() - time_ns[part == earlier].max()
            assert gap >= embargo_ns


@pytest.mark.parametrize("label", ["smoothed", "fixed", "triple-barrier"])
def test_no_label_ends_in_a_later_part(label: LabelKind) -> None:
    data = make_dataset(random_rows(), horizon=HORIZON, label=label, embargo_ns=0)
    for first, after in data.streams():
        for code in (TRAIN, VALIDATION):
            rows = first + np.flatnonzero(
                (data.part[first:after] == code) & (data.label[first:after] != NO_LABEL)
            )
            ends = data.time_ns[rows + HORIZON]
            assert ends.max() < data.time_ns[data.part > max(code, EMBARGO)].min()
    assert find_leaks(data) == []
    assert set(class_shares(data, TRAIN)) == set(CLASSES)


def test_a_planted_leak_is_found() -> None:
    data = make_dataset(random_rows(), horizon=HORIZON)
    assert find_leaks(data) == []
    x = data.x.copy()
    x[:, 41] = data.label - 1.0 + np.random.default_rng(0).normal(scale=0.1, size=len(data))
    (told,) = find_leaks(replace(data, x=x))
    assert features.NAMES[41] in told

    bare = make_dataset(random_rows(), horizon=HORIZON, embargo_ns=0)
    label = np.where(bare.label == NO_LABEL, 1, bare.label)
    assert any("end in a later part" in leak for leak in find_leaks(replace(bare, label=label)))

    late = np.where(data.part == EMBARGO, VALIDATION, data.part).astype(np.int8)
    assert any("within the embargo" in leak for leak in find_leaks(replace(data, part=late)))


def test_what_is_normalised_is_the_training_part_alone() -> None:
    rows = random_rows()
    data = make_dataset(rows, horizon=HORIZON)
    other = replace(rows, vector=rows.vector.copy())
    late = rows.time_ns >= data.time_ns[data.part == TEST].min()
    other.vector[late] += 100.0
    again = make_dataset(other, horizon=HORIZON)
    assert again.facts.mean == data.facts.mean
    assert np.array_equal(again.x[again.part == TRAIN], data.x[data.part == TRAIN])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_stretches_answer_for_every_row_of_a_part_once(seed: int, warm_up: int) -> None:
    data = make_dataset(random_rows(seed=seed), horizon=HORIZON)
    found = np.concatenate([np.arange(s.first, s.stop) for s in data.stretches(TEST, warm_up)])
    assert np.array_equal(np.sort(found), np.flatnonzero(data.part == TEST))
    for stretch in data.stretches(TEST, warm_up):
        assert stretch.first - stretch.begin <= warm_up
        assert len(np.unique(data.slot[stretch.begin : stretch.stop])) == 1
        assert not data.starts[stretch.begin + 1 : stretch.stop].any()


def test_a_stream_that_was_lost_is_two_streams() -> None:
    rows = random_rows(slots=1)
    rows.starts[3_000] = True
    data = make_dataset(rows, horizon=HORIZON)
    assert data.streams() == [(0, 3_000), (3_000, 6_000)]
    assert np.all(data.label[3_000 - HORIZON : 3_000] == NO_LABEL)


def test_a_data_set_is_read_as_it_was_written(tmp_path: Path) -> None:
    data = make_dataset(random_rows(), horizon=HORIZON, source="here")
    data.save(tmp_path)
    again: Dataset = load_dataset(tmp_path)
    assert again.facts == data.facts
    for name in ("x", "label", "move", "part", "starts", "spread_ticks"):
        assert np.array_equal(getattr(again, name), getattr(data, name)), name
    (tmp_path / "columns.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="no data set"):
        load_dataset(tmp_path)


def test_a_horizon_longer_than_the_tape_is_refused() -> None:
    with pytest.raises(InputError, match="horizon of 9000 signals"):
        make_dataset(random_rows(), horizon=9_000)
