"""The synchronisation state machine, transition by transition."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from feeds import codec, sync, wire


class Stream:
    """One instrument's row, and what became of the messages given to it."""

    def __init__(self, max_pending_bytes: int = 1 << 16) -> None:
        self.row = np.zeros(sync.ROW_FIELDS, dtype=np.int64)
        self.held = np.zeros(max_pending_bytes, dtype=np.uint8)
        self.applied: list[int] = []
        self.replaced: list[tuple[int, bool]] = []

    def take(self, message: bytes) -> None:
        buf = np.frombuffer(message, dtype=np.uint8).copy()
        action = sync.classify(self.row, self.held, buf, 0)
        if action == sync.HOLD:
            sync.hold(self.row, self.held, buf, 0, len(buf))
        if action in (sync.DROP, sync.HOLD):
            return
        seq = int.from_bytes(message[wire.AT_SEQ : wire.AT_SEQ + 8], "little")
        if action == sync.APPLY:
            self.applied.append(seq)
        else:
            self.replaced.append((seq, action == sync.REPLACE_AND_RESET))
        at = 0
        while (at := sync.take_next(self.row, self.held, at)) >= 0:
            self.applied.append(
                int(np.frombuffer(self.held[at + wire.AT_SEQ :][:8].tobytes(), "<i8")[0])
            )
        sync.settle(self.row, self.held)

    def send(self, *seqs: int, epoch: int = 1, flags: int = 0) -> Stream:
        for seq in seqs:
            self.take(
                codec.encode_book(wire.DELTA, 1, 0, epoch, seq, 0, 0, [(10, seq + 1)], [], flags)
            )
        return self

    def snapshot(self, seq: int, *, epoch: int = 1, answer: bool = False) -> Stream:
        flags = wire.FLAG_ANSWER if answer else 0
        self.take(codec.encode_book(wire.SNAPSHOT, 1, 0, epoch, seq, 0, 0, [(10, 1)], [], flags))
        return self

    def heartbeat(self, seq: int, *, epoch: int = 1, flags: int = 0) -> Stream:
        self.take(codec.encode_heartbeat(1, 0, epoch, seq, 0, 0, flags))
        return self

    @property
    def state(self) -> str:
        return sync.STATES[self.row[sync.STATE]]

    def count(self, column: int) -> int:
        return int(self.row[column])


def synced(last: int = 1) -> Stream:
    stream = Stream().snapshot(1).send(*range(2, last + 1))
    assert stream.state == "SYNCED"
    return stream


def test_starts_without_a_book_and_holds_what_comes() -> None:
    stream = Stream().send(5, 6, 7)
    assert stream.state == "SYNCING"
    assert stream.applied == []
    assert stream.count(sync.WANT_SNAPSHOT) == 1


def test_a_late_joiner_applies_only_what_follows_the_snapshot() -> None:
    stream = Stream().send(5, 6, 7, 8).snapshot(6, answer=True)
    assert stream.applied == [7, 8]
    assert stream.replaced == [(6, True)]
    assert stream.state == "SYNCED"
    assert stream.count(sync.LOST) == 0
    assert stream.count(sync.WANT_SNAPSHOT) == 0
    assert stream.send(9).applied == [7, 8, 9]


def test_a_snapshot_older_than_what_is_held_leaves_the_hole_open() -> None:
    stream = Stream().send(9, 10).snapshot(5, answer=True)
    assert stream.state == "GAP"
    assert stream.count(sync.WANT_SNAPSHOT) == 1
    stream.snapshot(9, answer=True)
    assert stream.state == "SYNCED"
    assert stream.applied == [10]


def test_a_snapshot_ahead_of_the_stream_covers_what_is_still_on_its_way() -> None:
    stream = Stream().snapshot(8, answer=True).send(6, 7, 8, 9)
    assert stream.applied == [9]
    assert stream.state == "SYNCED"
    assert stream.count(sync.COVERED) == 3
    assert stream.count(sync.LOST) == stream.count(sync.DUPLICATES) == 0


@pytest.mark.parametrize("n", [1, 2, 17])
def test_a_hole_of_n_stops_the_book_and_a_snapshot_heals_it(n: int) -> None:
    stream = synced(last=3)
    after = 4 + n
    stream.send(after, after + 1)
    assert stream.state == "GAP"
    assert stream.applied == [2, 3]
    assert stream.count(sync.GAPS) == 1
    assert stream.count(sync.LOST) == n
    stream.snapshot(after, answer=True)
    assert stream.state == "SYNCED"
    assert stream.applied == [2, 3, after + 1]
    assert stream.replaced[-1] == (after, True)


def test_a_late_message_closes_its_hole_without_a_snapshot() -> None:
    stream = synced(last=3).send(5, 6, 4, 7)
    assert stream.applied == [2, 3, 4, 5, 6, 7]
    assert stream.state == "SYNCED"
    assert (stream.count(sync.LATE), stream.count(sync.LOST)) == (1, 0)
    assert stream.count(sync.GAPS) == 1
    assert len(stream.replaced) == 1


def test_two_holes_close_one_after_the_other() -> None:
    stream = synced(last=1).send(3, 5)
    assert stream.count(sync.LOST) == 2
    stream.send(4)
    assert stream.state == "GAP"
    assert stream.applied == []
    stream.send(2)
    assert stream.applied == [2, 3, 4, 5]
    assert stream.state == "SYNCED"


def test_a_snapshot_between_two_holes_leaves_the_second_open() -> None:
    stream = synced(last=1).send(3, 5).snapshot(3, answer=True)
    assert stream.state == "GAP"
    assert stream.applied == []
    stream.send(4)
    assert stream.applied == [4, 5]
    assert stream.state == "SYNCED"


def test_duplicates_are_counted_and_dropped_in_every_state() -> None:
    stream = synced(last=3).send(3, 2)
    assert stream.applied == [2, 3]
    assert stream.count(sync.DUPLICATES) == 2
    stream.send(5, 5, 3)
    assert stream.state == "GAP"
    assert stream.count(sync.DUPLICATES) == 4
    stream.send(4)
    assert stream.applied == [2, 3, 4, 5]


def test_a_heartbeat_finds_a_lost_tail() -> None:
    stream = synced(last=3).heartbeat(3)
    assert stream.state == "SYNCED"
    stream.heartbeat(5)
    assert stream.state == "GAP"
    assert stream.count(sync.LOST) == 2
    stream.send(4, 5)
    assert stream.state == "SYNCED"
    assert stream.count(sync.LOST) == 0


def test_a_new_epoch_starts_over_and_the_old_one_is_ignored_from_then_on() -> None:
    stream = synced(last=9).send(1, epoch=2)
    assert stream.state == "SYNCING"
    assert stream.count(sync.RESETS) == 1
    stream.send(10, epoch=1)
    assert stream.count(sync.OLD_EPOCH) == 1
    stream.snapshot(1, epoch=2).send(2, epoch=2)
    assert stream.state == "SYNCED"
    assert stream.applied[-1] == 2
    assert stream.count(sync.LOST) == 0


def test_a_sequence_that_runs_backwards_is_a_source_that_started_over() -> None:
    last = 2 * sync.MAX_REPEATS
    stream = synced(last).send(*range(2, 2 + sync.MAX_REPEATS))
    assert stream.state == "SYNCED", "so far they may be duplicates"
    assert stream.applied == list(range(2, last + 1))
    stream.send(2 + sync.MAX_REPEATS)
    assert stream.state == "SYNCING"
    assert stream.count(sync.WANT_SNAPSHOT) == 1
    assert stream.count(sync.RESETS) == 1
    seq = 2 + sync.MAX_REPEATS
    stream.snapshot(seq, answer=True).send(seq + 1)
    assert stream.state == "SYNCED"
    assert stream.applied[-1] == seq + 1
    assert stream.count(sync.LOST) == 0


def test_a_book_that_opens_again_further_back_is_taken_at_once() -> None:
    stream = synced(last=9).snapshot(1).send(2, 3)
    assert stream.state == "SYNCED"
    assert stream.replaced[-1] == (1, True)
    assert stream.applied[-2:] == [2, 3]
    assert stream.count(sync.RESETS) == 1


def test_duplicates_with_progress_between_them_are_no_new_sequence() -> None:
    stream = synced(last=2)
    for seq in range(3, 3 + 3 * sync.MAX_REPEATS):
        stream.send(seq, seq)
    assert stream.state == "SYNCED"
    assert stream.count(sync.RESETS) == 0
    assert stream.count(sync.DUPLICATES) == 3 * sync.MAX_REPEATS


def test_an_in_band_snapshot_in_sequence_loses_nothing_and_resets_nothing() -> None:
    stream = synced(last=3).snapshot(4)
    assert stream.replaced[-1] == (4, False)
    assert stream.send(5).state == "SYNCED"


def test_an_in_band_snapshot_after_a_hole_heals_at_once_and_counts_the_loss() -> None:
    stream = synced(last=3).snapshot(7)
    assert stream.state == "SYNCED"
    assert stream.replaced[-1] == (7, True)
    assert stream.count(sync.LOST) == 3
    assert stream.count(sync.GAPS) == 1


def test_an_answer_nobody_needs_any_more_changes_nothing() -> None:
    stream = synced(last=3).send(5, 4).snapshot(5, answer=True).snapshot(9, answer=True)
    assert stream.state == "SYNCED"
    assert len(stream.replaced) == 1
    assert stream.send(6).applied[-1] == 6


def test_a_gap_of_the_source_is_healed_by_a_snapshot_only() -> None:
    stream = synced(last=3).send(4, flags=wire.FLAG_SOURCE_GAP).send(5)
    assert stream.state == "GAP"
    assert stream.applied == [2, 3]
    stream.snapshot(3, answer=True)
    assert stream.state == "GAP", "older than the loss"
    stream.snapshot(6)
    assert stream.state == "SYNCED"
    assert stream.send(7).applied == [2, 3, 7]


def test_held_messages_never_carry_the_book_across_a_gap_of_the_source() -> None:
    stream = Stream().send(5).send(6, flags=wire.FLAG_SOURCE_GAP).send(7)
    stream.snapshot(4, answer=True)
    assert stream.applied == [5]
    assert stream.state == "GAP"
    stream.snapshot(7, answer=True)
    assert stream.state == "SYNCED"


def test_held_messages_have_a_limit_and_reaching_it_is_counted() -> None:
    stream = Stream(max_pending_bytes=300).send(*range(5, 20))
    assert stream.count(sync.OVERFLOWS) >= 1
    assert stream.row[sync.HELD_BYTES] <= 300
    stream.snapshot(19, answer=True).send(20)
    assert stream.state == "SYNCED"
    assert stream.applied[-1] == 20


def test_random_disorder_never_skips_and_never_repeats() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        order = list(range(2, 40))
        for _ in range(int(rng.integers(0, 12))):
            kind, at = int(rng.integers(0, 3)), int(rng.integers(0, len(order)))
            if kind == 0:
                order.pop(at)
            elif kind == 1:
                order.insert(at, order[at])
            else:
                other = min(at + int(rng.integers(1, 6)), len(order) - 1)
                order[at], order[other] = order[other], order[at]
        stream = Stream().snapshot(1).send(*order)
        position = 1
        for seq in stream.applied:
            assert seq == position + 1
            position = seq
        missing = sorted(set(range(2, max(order) + 1)) - set(order))
        assert stream.count(sync.LOST) == len(missing)
        assert stream.state == ("GAP" if missing else "SYNCED")
        if missing:
            assert stream.applied == list(range(2, missing[0]))
            stream.snapshot(39, answer=True)
            assert stream.state == "SYNCED"


def test_an_answers_definition_that_overtakes_the_stream_is_no_sign_of_a_loss() -> None:
    stream = synced(10)
    stream.take(
        codec.encode_instrument(
            1, 0, 1, 150, "sim", "ALPHA", Decimal(1), Decimal(1), flags=wire.FLAG_ANSWER
        )
    )
    stream.snapshot(150, answer=True)
    assert stream.state == "SYNCED"
    stream.send(*range(11, 160))
    assert stream.applied == list(range(2, 160))
    assert [stream.count(column) for column in (sync.LOST, sync.GAPS, sync.DUPLICATES)] == [0, 0, 0]


def test_an_answer_made_before_the_subscription_took_hold_is_no_gap() -> None:
    for first in ("message", "heartbeat"):
        stream = Stream().snapshot(5, answer=True)
        assert stream.state == "SYNCED"
        if first == "heartbeat":
            stream.heartbeat(8)
            assert stream.state == "SYNCING"
        stream.send(9, 10)
        assert stream.state == "SYNCING"
        assert stream.count(sync.WANT_SNAPSHOT) == 1
        stream.snapshot(10, answer=True).send(11)
        assert stream.state == "SYNCED"
        assert stream.applied == [11]
        assert stream.count(sync.GAPS) == stream.count(sync.LOST) == 0
