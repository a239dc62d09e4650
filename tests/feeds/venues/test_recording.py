"""Recordings are read whole, in bounded blocks, whatever compresses them; damage is named."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from feeds.errors import InputError
from feeds.venues.recording import Recording

LINES = [f"line {i} ".encode() + b"x" * (i % 97) for i in range(3000)]
TEXT = b"".join(line + b"\n" for line in LINES)


def packed(kind: str, text: bytes = TEXT) -> bytes:
    if kind == "gz":
        return gzip.compress(text)
    if kind == "xz":
        return lzma.compress(text)
    if kind == "zst":
        return zstandard.compress(text)
    return text


def lines_of(recording: Recording) -> list[bytes]:
    found = []
    for block in recording.blocks():
        assert block.first_line == len(found) + 1
        assert block.buf[block.stop - 1] == 10
        assert block.buf[block.stop] == 10, "a newline stands behind the block as a sentinel"
        assert block.offset == sum(len(line) + 1 for line in found)
        found += block.buf[: block.stop].tobytes().split(b"\n")[:-1]
    assert recording.lines == len(found)
    return found


def save(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["txt", "gz", "xz", "zst"])
@pytest.mark.parametrize("block_bytes", [1, 333, 1 << 20])
def test_every_line_comes_once(tmp_path, kind, block_bytes):
    path = save(tmp_path, f"a.{kind}", packed(kind))
    assert lines_of(Recording(path, block_bytes=block_bytes)) == LINES


@pytest.mark.parametrize("kind", ["txt", "gz", "xz", "zst"])
def test_a_last_line_without_a_newline_is_a_line(tmp_path, kind):
    path = save(tmp_path, f"a.{kind}", packed(kind, TEXT + b"last"))
    assert lines_of(Recording(path)) == [*LINES, b"last"]


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_streams_laid_end_to_end_are_one_recording(tmp_path, kind):
    path = save(tmp_path, f"a.{kind}", packed(kind) + packed(kind))
    assert lines_of(Recording(path)) == LINES + LINES


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_a_cut_file_gives_its_whole_lines_and_then_an_error(tmp_path, kind, part):
    text = b"".join(line + b"\n" for line in LINES * 40)
    data = packed(kind, text)
    recording = Recording(save(tmp_path, f"a.{kind}", data[: int(len(data) * part)]))
    found: list[bytes] = []

    def read() -> None:
        for block in recording.blocks():
            found.extend(block.buf[: block.stop].tobytes().split(b"\n")[:-1])

    with pytest.raises(InputError, match=r"cut short") as caught:
        read()
    assert found == (LINES * 40)[: len(found)]
    assert f"after line {len(found)}" in str(caught.value)
    assert f"the {len(found)} lines before it are good" in str(caught.value)


def test_a_flipped_byte_in_gzip_is_damage(tmp_path):
    data = bytearray(packed("gz", TEXT * 20))
    data[len(data) // 2] ^= 0x40
    recording = Recording(save(tmp_path, "a.gz", bytes(data)))
    with pytest.raises(InputError, match=r"damaged gzip data|cut short"):
        list(recording.blocks())


def test_the_compression_is_told_by_the_first_bytes(tmp_path):
    assert lines_of(Recording(save(tmp_path, "a.bin", packed("xz")))) == LINES
    with pytest.raises(InputError, match="not a gzip file"):
        Recording(save(tmp_path, "b.gz", TEXT))


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="empty recording"):
        Recording(save(tmp_path, "a", b""))
    with pytest.raises(InputError, match="cannot be read"):
        Recording(tmp_path / "none")


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("feeds.venues.recording.MAX_LINE_BYTES", 1000)
    recording = Recording(save(tmp_path, "a", b"ok\n" + b"x" * 500_000), block_bytes=64)
    with pytest.raises(InputError, match=r"line 2 \(byte 3\): line too long"):
        list(recording.blocks())


def test_a_place_names_line_and_byte(tmp_path):
    recording = Recording(save(tmp_path, "a.gz", packed("gz")), block_bytes=4096)
    blocks = list(recording.blocks())
    text = recording.where(blocks[1], 0)
    assert f"line {blocks[1].first_line} (byte {blocks[1].offset} of the uncompressed" in text


def test_progress_reaches_the_size_of_the_file(tmp_path):
    seen: list[int] = []
    recording = Recording(save(tmp_path, "a.gz", packed("gz")), progress=seen.append)
    list(recording.blocks())
    assert seen[-1] == recording.file_bytes
    assert seen == sorted(seen)
