"""The tape: what is written comes back, and nothing that is damaged passes."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from feeds import codec, tape, wire
from feeds.errors import InputError
from feeds.tape import InstrumentMeta, TapeMeta
from feeds.tape_reader import TapeReader
from feeds.tape_writer import TOUCH_BYTES, TapeWriter

META = TapeMeta(
    created_ns=1_700_000_000_000_000_000,
    source="test",
    instruments=[InstrumentMeta("sim", "AAA", 7, 1, "0.01", "1")],
)
PAGE = 4096
ZSTD_CHECKSUM_BYTES = 4  # RFC 8878, 3.1.1: Content_Checksum
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def delta(seq: int, bids=((100, 5),), asks=((101, 7),)) -> bytes:
    return codec.encode_book(wire.DELTA, 7, 1, 1, seq, 1000 + seq, 1001 + seq, bids, asks)


def payloads(count: int) -> list[bytes]:
    trade = codec.encode_trade(7, 1, 1, 2, 3, 4, 100, 5, 6, 1)
    odd = codec.encode_timer(5) + b"xyz"
    return [(delta(i), trade, odd, b"")[i % 4] for i in range(count)]


def write(path: Path, bodies: list[bytes], **options) -> Path:
    with TapeWriter(path, META, **options) as writer:
        for i, body in enumerate(bodies):
            writer.append(tape.MARKET, 10 * i + 1, body)
    return path


def read(path: Path, **options) -> list[tuple[int, int, bytes]]:
    reader = TapeReader(path, **options)
    return [(r.kind, r.recv_ns, bytes(r.payload)) for r in reader.records()]


@given(st.lists(st.binary(max_size=300), max_size=30), st.integers(64, 700))
@RELAXED
def test_what_is_written_comes_back_in_order(tmp_path, bodies, chunk_bytes) -> None:
    path = tmp_path / "a.tape"
    write(path, bodies, overwrite=True)
    expected = [(tape.MARKET, 10 * i + 1, body) for i, body in enumerate(bodies)]
    assert read(path) == expected
    assert read(path, chunk_bytes=chunk_bytes) == expected
    reader = TapeReader(path)
    assert reader.meta == META
    assert not reader.sealed
    assert reader.truncated_at is None
    assert path.stat().st_size % 8 == 0


def test_offsets_are_where_the_records_stand(tmp_path: Path) -> None:
    path = tmp_path / "a.tape"
    with TapeWriter(path, META) as writer:
        offsets = [writer.append(tape.MARKET, 1, body) for body in payloads(9)]
    found = list(TapeReader(path, chunk_bytes=256).records())
    assert [record.offset for record in found] == offsets
    assert [bytes(record.payload) for record in found] == list(payloads(9)), "chunks later"
    data = path.read_bytes()
    for offset, body in zip(offsets, payloads(9), strict=True):
        assert offset % 8 == 0
        assert data[offset + tape.RECORD_HEADER_BYTES :][: len(body)] == body


def test_windows_move_along_the_file(tmp_path: Path) -> None:
    """Records that lie across the edges of small windows, and one larger than a window."""
    bodies = [bytes([i % 251]) * (i * 37 % 1500) for i in range(200)] + [b"w" * (3 * PAGE)] * 2
    path = write(tmp_path / "a.tape", bodies, window_bytes=PAGE)
    assert [body for _, _, body in read(path)] == bodies
    large = write(tmp_path / "b.tape", bodies)
    assert path.read_bytes() == large.read_bytes()


def test_what_is_written_next_is_touched_and_nothing_that_was_written(tmp_path: Path) -> None:
    bodies = [bytes([1 + i % 251]) * (i * 37 % 1500) for i in range(1_500)]
    touching = tmp_path / "a.tape"
    with TapeWriter(touching, META, window_bytes=TOUCH_BYTES) as writer:
        for i, body in enumerate(bodies):
            writer.append(tape.MARKET, 10 * i + 1, body)
            writer.touch_ahead()
            pages = _faults()
            end = min(writer.position + TOUCH_BYTES // 4, len(writer.arena))
            writer.arena[writer.position : end : PAGE] = 0
            assert _faults() - pages < 4, "there already"
    plain = write(tmp_path / "b.tape", bodies)
    assert touching.read_bytes() == plain.read_bytes()


def test_a_thread_makes_windows_ready_and_the_tape_is_the_same(tmp_path: Path, monkeypatch) -> None:
    """Whoever appends reserves the first window, and one for a record larger than was said."""
    by: list[int] = []
    reserve = os.posix_fallocate

    def watched(fd: int, offset: int, length: int) -> None:
        by.append(threading.get_ident())
        reserve(fd, offset, length)

    bodies = [bytes([1 + i % 251]) * (i * 37 % 1500) for i in range(1_500)]
    monkeypatch.setattr(os, "posix_fallocate", watched)
    ahead = write(tmp_path / "a.tape", bodies, window_bytes=4 * PAGE, most=PAGE)
    assert len(by) > 50
    assert by.count(threading.get_ident()) == 1
    by.clear()
    larger = [*bodies, b"w" * (9 * PAGE), *bodies]
    oversized = write(tmp_path / "b.tape", larger, window_bytes=4 * PAGE, most=PAGE)
    assert by.count(threading.get_ident()) == 2
    monkeypatch.undo()
    assert ahead.read_bytes() == write(tmp_path / "c.tape", bodies).read_bytes()
    assert oversized.read_bytes() == write(tmp_path / "d.tape", larger).read_bytes()


@pytest.mark.parametrize("most", [0, PAGE])
def test_a_full_disk_is_told_and_what_was_written_is_kept(
    tmp_path: Path, monkeypatch, most: int
) -> None:
    path, body, full = tmp_path / "a.tape", b"b" * 1000, 20 * PAGE
    reserve = os.posix_fallocate

    def limited(fd: int, offset: int, length: int) -> None:
        if offset + length > full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    writer = TapeWriter(path, META, window_bytes=4 * PAGE, most=most)
    until_full = [body] * (full // len(body))
    with pytest.raises(InputError, match=r"no room to go on.*No space left"):
        collections.deque((writer.append(tape.MARKET, 1, body) for body in until_full), maxlen=0)
    assert writer.records > 10 * PAGE // len(body)
    monkeypatch.undo()  # there is room again: it goes on
    writer.append(tape.MARKET, 1, body)
    writer.close()
    assert [kept for _, _, kept in read(path)] == [body] * writer.records


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_native_code_writes_the_same_records(tmp_path: Path) -> None:
    body = delta(3)
    one = write(tmp_path / "a.tape", [body])
    with TapeWriter(tmp_path / "b.tape", META) as writer:
        arena, at = writer.room(tape.RECORD_HEADER_BYTES + len(body) + 8)
        start = at + tape.RECORD_HEADER_BYTES
        arena[start : start + len(body)] = np.frombuffer(body, dtype=np.uint8)
        writer.advance(tape.put_record(arena, at, tape.MARKET, 1, len(body)))
    assert one.read_bytes() == (tmp_path / "b.tape").read_bytes()


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tape", payloads(3))
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        TapeWriter(path, META)
    assert path.read_bytes() == before
    write(path, payloads(1), overwrite=True)
    assert len(read(path)) == 1


def test_a_folder_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.tape"):
        with pytest.raises(InputError, match=str(path)):
            TapeReader(path)
    with pytest.raises(InputError):
        TapeWriter(tmp_path, META)


# Damage.


def test_every_cut_of_the_last_records_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tape", payloads(5))
    data = path.read_bytes()
    records = list(TapeReader(path).records())
    ends = [record.offset for record in records[1:]]
    ends += [len(data) - tape.RECORD_HEADER_BYTES - tape.END_PAYLOAD_BYTES]
    cut = tmp_path / "cut.tape"
    for length in range(records[2].offset, len(data)):
        cut.write_bytes(data[:length])
        whole = sum(1 for end in ends if end <= length)
        with pytest.raises(InputError, match=f"the {whole} records before it are good"):
            read(cut)
        reader = TapeReader(cut)
        kept = list(reader.records(allow_truncated=True))
        assert len(kept) == whole
        assert reader.truncated_at == ([records[2].offset] + [e for e in ends if e <= length])[-1]


def test_a_cut_header_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tape", payloads(2))
    data = path.read_bytes()
    first = next(iter(TapeReader(path).records())).offset
    cut = tmp_path / "cut.tape"
    for length in range(first):
        cut.write_bytes(data[:length])
        with pytest.raises(InputError):
            TapeReader(cut)


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tape") / "good.tape"
    return write(path, payloads(12)).read_bytes()


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_flipped_bit_anywhere_is_found(tmp_path, good_bytes, data) -> None:
    at = data.draw(st.integers(0, len(good_bytes) - 1))
    bit = data.draw(st.integers(0, 7))
    broken = bytearray(good_bytes)
    broken[at] ^= 1 << bit
    path = tmp_path / "broken.tape"
    path.write_bytes(broken)
    with pytest.raises(InputError, match=str(path)):
        read(path)


def _offsets_into(found: list[int], records) -> None:
    for record in records:
        found.append(record.offset)


def test_records_before_a_flipped_bit_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tape", payloads(12))
    records = list(TapeReader(path).records())
    offsets = [record.offset for record in records]
    data = bytearray(path.read_bytes())
    data[offsets[8] + tape.RECORD_HEADER_BYTES + 1] ^= 4
    path.write_bytes(data)
    for options in ({}, {"chunk_bytes": 64}):
        seen: list[int] = []
        records = TapeReader(path, **options).records(allow_truncated=True)
        with pytest.raises(InputError, match=f"byte {offsets[8]}.* 8 records before"):
            _offsets_into(seen, records)
        assert seen == offsets[:8]


def test_bytes_behind_the_end_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tape", payloads(3))
    twice = tmp_path / "b.tape"
    twice.write_bytes(path.read_bytes() * 2)
    with pytest.raises(InputError, match="after the END record"):
        read(twice)
    for chunk_bytes in (64, 128, 256, path.stat().st_size):
        with pytest.raises(InputError, match="after the END record"):
            read(twice, chunk_bytes=chunk_bytes)


def test_a_wrong_count_at_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tape"
    writer = TapeWriter(path, META)
    writer.append(tape.MARKET, 1, delta(1))
    writer.records = 9
    writer.close()
    with pytest.raises(InputError, match="counts 9 records"):
        read(path)


def test_what_is_no_tape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tape"
    for data in (b"", b"OCTAPE", b"hello world, this is no tape at all.", bytes(100)):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a tape"):
            TapeReader(path)
    path.write_bytes(zstandard.compress(b"something else entirely, compressed"))
    with pytest.raises(InputError, match="not a tape"):
        TapeReader(path)
    good = write(tmp_path / "b.tape", []).read_bytes()
    path.write_bytes(good[:8] + struct.pack("<I", 2) + good[12:])
    with pytest.raises(InputError, match="version"):
        TapeReader(path)


_CRASH = """
import os, signal, sys
from feeds import tape
from feeds.tape_writer import TapeWriter
from tests.feeds.test_tape import META, payloads
writer = TapeWriter(sys.argv[1], META, window_bytes=4096)
for i, body in enumerate(payloads(500)):
    writer.append(tape.MARKET, 10 * i + 1, body)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_that_is_killed_leaves_a_readable_tape(tmp_path: Path) -> None:
    path = tmp_path / "killed.tape"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _CRASH, str(path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="cut short"):
        read(path)
    reader = TapeReader(path)
    kept = [bytes(record.payload) for record in reader.records(allow_truncated=True)]
    assert kept == payloads(500)
    assert reader.truncated_at is not None


# Sealed.


@given(st.lists(st.binary(max_size=300), max_size=30), st.integers(64, 700))
@RELAXED
@example([b"x" * 200] * 30, 64)
def test_a_sealed_tape_reads_as_the_raw_one(tmp_path, bodies, chunk_bytes) -> None:
    raw = write(tmp_path / "a.tape", bodies, overwrite=True)
    sealed = tmp_path / "a.tape.zst"
    tape.seal(raw, sealed)
    assert TapeReader(sealed).sealed
    assert read(sealed) == read(raw)
    assert read(sealed, chunk_bytes=chunk_bytes) == read(raw)
    with open(sealed, "rb") as file:
        unsealed = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    assert unsealed == raw.read_bytes()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_flipped_bit_in_a_sealed_tape_is_found(tmp_path, good_bytes, data) -> None:
    raw, path = tmp_path / "raw.tape", tmp_path / "broken.tape.zst"
    raw.write_bytes(good_bytes)
    tape.seal(raw, path)
    broken = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(broken) - 1))
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(broken)
    records = None
    with contextlib.suppress(InputError):
        records = read(path)
    # Only a bit that zstd itself ignores may pass (RFC 8878, 3.1.1.1.1: the unused bit).
    assert records is None or records == read(raw)


def test_a_cut_sealed_tape_is_refused(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.tape", payloads(40))
    tape.seal(raw, tmp_path / "a.tape.zst")
    data = (tmp_path / "a.tape.zst").read_bytes()
    cut = tmp_path / "cut.tape.zst"
    for length in range(len(data) - ZSTD_CHECKSUM_BYTES):
        cut.write_bytes(data[:length])
        with pytest.raises(InputError):
            read(cut)
    cut.write_bytes(data[:-1])  # every byte of the tape is there, and its own CRCs are good
    assert read(cut) == read(raw)


def test_a_record_that_its_writer_did_not_finish_ends_the_tape(tmp_path: Path) -> None:
    path = tmp_path / "killed.tape"
    with TapeWriter(path, META) as writer:
        for number in range(3):
            writer.append(tape.MARKET, number, bytes([number + 1]) * 40)
    data = bytearray(path.read_bytes())
    records = list(TapeReader(path).records())
    last = records[-1].offset
    data[last : last + 4] = bytes(4)  # its CRC is written last
    killed = bytes(data[: last + tape.RECORD_HEADER_BYTES + 40]) + bytes(4_096)
    path.write_bytes(killed)
    reader = TapeReader(path)
    assert len(list(reader.records(allow_truncated=True))) == 2
    assert reader.truncated_at == last
    # In the middle of a tape it is damage: something was written behind it.
    middle = bytearray(data)
    first = records[0].offset
    middle[first : first + 4] = bytes(4)
    path.write_bytes(middle)
    with pytest.raises(InputError, match="damaged record"):
        list(TapeReader(path).records(allow_truncated=True))
