"""Several tapes as one stream: ordered by time and name, whatever the files are called."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feeds import codec, tape
from feeds.errors import InputError
from feeds.tape import InstrumentMeta, TapeMeta
from feeds.tape_writer import TapeWriter
from replay import merge
from replay.merge import TapeStream

START_NS = 1_000_000


def write(
    path: Path,
    symbol: str,
    times: list[int],
    *,
    epoch: int = 1,
    first_seq: int = 0,
    end: bool = True,
) -> Path:
    """A tape of heartbeats whose seq counts from ``first_seq``; all tapes use the same ids."""
    meta = TapeMeta(
        created_ns=START_NS,
        source="test",
        instruments=[InstrumentMeta("sim", symbol, 7, 1, "0.01", "1")],
    )
    with TapeWriter(path, meta, overwrite=True) as writer:
        for i, recv_ns in enumerate(times):
            seq = first_seq + i
            body = codec.encode_heartbeat(7, 1, epoch, seq, recv_ns, recv_ns)
            if i == 0:
                body = codec.encode_instrument(
                    7, 1, epoch, seq, "sim", symbol, Decimal("0.01"), Decimal(1)
                )
            writer.append(tape.MARKET, recv_ns, body)
    if not end:
        path.write_bytes(path.read_bytes()[:-32])
    return path


def events(paths: list[Path], **options) -> list[tuple[int, int, int, int]]:
    """(receive time, source id, epoch, seq) of every record of the merged stream."""
    return list(_events(TapeStream(paths, **options)))


def _events(stream: TapeStream) -> Iterator[tuple[int, int, int, int]]:
    for buf, start, stop in stream.chunks():
        at = start
        while at < stop:
            length, recv_ns = struct.unpack_from("<Iq", buf, at + 4)
            body = at + tape.RECORD_HEADER_BYTES
            source, _, epoch, seq = struct.unpack_from("<IIQQ", buf, body + 8)
            yield recv_ns, source, epoch, seq
            at = body + tape.padded(length)


@pytest.fixture(params=[1 << 12, 1 << 20])
def _chunks(request, monkeypatch) -> None:
    monkeypatch.setattr(merge, "CHUNK_BYTES", request.param)


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=2, max_size=4))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_events_come_by_time_then_name_then_position(tmp_path: Path, times) -> None:
    """Against a plain sort, in which a clock that stepped back counts as standing still."""
    paths, expected = [], []
    for rank, own in enumerate(times):
        paths.append(write(tmp_path / f"{9 - rank}.tape", f"S{rank}", own))
        latest = itertools.accumulate(own, max)
        expected += [
            (held, rank, seq, recv_ns)
            for seq, (recv_ns, held) in enumerate(zip(own, latest, strict=True))
        ]
    found = events(paths)
    assert [(time, seq) for time, _, _, seq in found] == [
        (time, seq) for _, _, seq, time in sorted(expected)
    ]
    for order in itertools.permutations(paths):
        assert events(list(order)) == found


@pytest.mark.usefixtures("_chunks")
def test_chunks_of_any_size_give_the_same_stream(tmp_path: Path) -> None:
    a = write(tmp_path / "a.tape", "AAA", list(range(0, 3000, 3)))
    b = write(tmp_path / "b.tape", "BBB", list(range(1, 2000, 2)))
    c = write(tmp_path / "c.tape", "CCC", list(range(5000, 5100)))
    found = events([b, c, a])
    assert [time for time, *_ in found] == sorted(
        [*range(0, 3000, 3), *range(1, 2000, 2), *range(5000, 5100)]
    )
    for symbol_events in (range(1000), range(1000), range(100)):
        assert set(symbol_events) <= {seq for *_, seq in found}


def test_equal_ids_on_two_tapes_stay_apart(tmp_path: Path) -> None:
    a = write(tmp_path / "a.tape", "AAA", [1, 3, 5])
    b = write(tmp_path / "b.tape", "BBB", [2, 4, 6])
    sources = [source for _, source, _, _ in events([a, b])]
    assert sources[0::2] == [sources[0]] * 3
    assert sources[1::2] == [sources[1]] * 3
    assert sources[0] != sources[1]


def test_a_second_day_that_starts_again_gets_a_later_epoch(tmp_path: Path) -> None:
    days = [
        write(tmp_path / f"{day}.tape", "AAA", [100 * day + i for i in range(5)])
        for day in range(3)
    ]
    epochs = [epoch for _, _, epoch, _ in events([days[2], days[0], days[1]])]
    assert epochs == [1] * 5 + [2] * 5 + [3] * 5


def test_a_sequence_that_goes_on_keeps_its_epoch(tmp_path: Path) -> None:
    a = write(tmp_path / "a.tape", "AAA", [1, 2, 3], epoch=50)
    b = write(tmp_path / "b.tape", "AAA", [11, 12], epoch=50, first_seq=2)
    c = write(tmp_path / "c.tape", "AAA", [21, 22], epoch=99)
    assert [epoch for _, _, epoch, _ in events([c, b, a])] == [50] * 5 + [99] * 2


def test_one_instrument_on_two_tapes_at_once_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.tape", "AAA", [1, 5])
    b = write(tmp_path / "b.tape", "AAA", [3, 7])
    with pytest.raises(InputError, match=r"sim\.AAA at the same time"):
        events([a, b])
    with pytest.raises(InputError):
        events([a, a])


def test_a_single_tape_is_given_as_it_is(tmp_path: Path) -> None:
    a = write(tmp_path / "a.tape", "AAA", [3, 1, 2], epoch=4)
    assert events([a]) == [(3, 7, 4, 0), (1, 7, 4, 1), (2, 7, 4, 2)]


def test_empty_tapes_and_cut_ones(tmp_path: Path) -> None:
    a = write(tmp_path / "a.tape", "AAA", [1, 2])
    empty = write(tmp_path / "e.tape", "EEE", [])
    cut = write(tmp_path / "c.tape", "CCC", [3, 4], end=False)
    assert len(events([empty])) == 0
    assert len(events([a, empty])) == 2
    with pytest.raises(InputError, match=str(cut)):
        events([a, cut])
    stream = TapeStream([a, cut], allow_truncated=True)
    assert len(list(_events(stream))) == 4
    assert stream.truncated


def test_more_open_tapes_than_the_limit_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(merge, "MAX_OPEN_TAPES", 2)
    paths = [write(tmp_path / f"{i}.tape", f"S{i}", [i, 100 + i]) for i in range(3)]
    with pytest.raises(InputError, match="too many tapes"):
        events(paths)
    chained = [write(tmp_path / f"{i}.tape", f"S{i}", [10 * i, 10 * i + 1]) for i in range(5)]
    assert len(events(chained)) == 10
