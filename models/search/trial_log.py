"""The log of a search: every trial on disk before the next begins, so that it can be resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from feeds.errors import InputError
from models.search.evaluator import Measured
from models.search.space import Choice


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First line of a log: whose trials follow.

    Attributes
    ----------
    searcher : str
    seed : int
    evaluator : str
        `Judge.fingerprint`.
    decisions : dict of str to tuple of str
        Name and options of each.
    """

    searcher: str
    seed: int
    evaluator: str
    decisions: dict[str, tuple[str, ...]]


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A choice that a search asked for, and what came out; ``number`` counts from 0."""

    number: int
    choice: Choice
    measured: Measured


class TrialLog:
    """A file of trials, one line each, safely on disk before the search goes on.

    Use `create` or `resume`.

    Attributes
    ----------
    path : Path
    finished : tuple of Trial
        What was there already.
    """

    def __init__(self, path: Path, file: BinaryIO, finished: tuple[Trial, ...]) -> None:
        self.path, self.finished, self._file = path, finished, file

    @classmethod
    def create(cls, path: Path, header: Header) -> TrialLog:
        """Start a log.

        Raises
        ------
        InputError
            If the file is there already, or cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        log = cls(path, _open(path, "xb"), ())
        log._write(header)
        return log

    @classmethod
    def resume(cls, path: Path, header: Header) -> TrialLog:
        """Go on with a log; a last line that was cut off is taken away.

        Raises
        ------
        InputError
            If there is no such file, it is damaged, or another search's.
        """
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(
                "no log of a search",
                where=str(path),
                expected="a file that an earlier search wrote",
                found=str(error),
                fix="start without resuming",
            ) from None
        whole, finished = lines[:-1], []
        for number, line in enumerate(whole, 1):
            try:
                if number == 1:
                    _check_header(path, msgspec.json.decode(line, type=Header), header)
                else:
                    finished.append(msgspec.json.decode(line, type=Trial))
            except msgspec.MsgspecError as error:
                raise InputError(
                    "damaged log of a search",
                    where=f"{path}:{number}",
                    expected="a line of JSON as a search writes it",
                    found=str(error),
                    fix="start anew with another file",
                ) from None
        file = _open(path, "r+b")
        file.truncate(sum(len(line) + 1 for line in whole))
        file.seek(0, os.SEEK_END)
        log = cls(path, file, tuple(finished))
        if not whole:
            log._write(header)
        return log

    def append(self, trial: Trial) -> None:
        """Write a trial; it is on disk when this returns."""
        self._write(trial)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, item: Header | Trial) -> None:
        self._file.write(msgspec.json.encode(item) + b"\n")
        os.fsync(self._file.fileno())


def _open(path: Path, mode: str) -> Any:
    try:
        return path.open(mode, buffering=0)
    except OSError as error:
        raise InputError(
            "the log of a search cannot be written",
            where=str(path),
            expected="a file that can be written" if mode == "r+b" else "a new file",
            found=str(error),
            fix="resume it, or name another file",
        ) from None


def _check_header(path: Path, found: Header, wanted: Header) -> None:
    for name in Header.__struct_fields__:
        if getattr(found, name) != getattr(wanted, name):
            raise InputError(
                f"the log belongs to a search with another {name}",
                where=f"{path}:1",
                expected=str(getattr(wanted, name)),
                found=str(getattr(found, name)),
                fix="start anew with another file",
            )
