"""What the name of a LOBSTER message file says, and where its orderbook file is.

Source: "Output Structure", lobsterdata.com.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from feeds.errors import InputError

MAX_LEVELS: Final = 2_000
_EXCHANGE_TIME_ZONE: Final = "America/New_York"
_DAY_S: Final = 86_400
_NAME: Final = re.compile(
    r"(?P<symbol>[A-Za-z0-9.\-]+)_(?P<date>\d{4}-\d{2}-\d{2})_(?P<start>\d+)_(?P<end>\d+)"
    r"_message_(?P<levels>\d+)\.csv(?P<suffix>\.gz|\.xz|\.zst)?"
)


class Files(NamedTuple):
    """A message file and what its name says; ``midnight_ns`` is the day's start, UTC."""

    message: Path
    orderbook: Path
    symbol: str
    midnight_ns: int
    levels: int


def find_files(message: Path, symbol: str | None) -> Files:
    """What a message file's name says, and the orderbook file beside it.

    Raises
    ------
    InputError
        If the name is not LOBSTER's, the symbol another, or the orderbook file missing.
    """
    match = _NAME.fullmatch(message.name)
    if match is None:
        raise InputError(
            "not the name of a LOBSTER message file",
            where=str(message),
            expected="TICKER_YYYY-MM-DD_start_end_message_LEVEL.csv",
            found=message.name,
            fix="keep LOBSTER's own names: the date and the levels stand in them",
        )
    if symbol is not None and symbol != match["symbol"]:
        raise InputError(
            "unknown symbol", where=str(message), expected=symbol, found=match["symbol"]
        )
    levels = int(match["levels"])
    if not 1 <= levels <= MAX_LEVELS:
        raise InputError(
            "levels out of range", where=str(message), expected=f"1 to {MAX_LEVELS}",
            found=match["levels"],
        )  # fmt: skip
    name = message.name.replace("_message_", "_orderbook_")
    plain = name.removesuffix(match["suffix"] or "")
    candidates = [message.with_name(n) for n in (name, plain, *(plain + s for s in _SUFFIXES))]
    orderbook = next((path for path in candidates if path.is_file()), None)
    if orderbook is None:
        raise InputError(
            "no orderbook file beside the message file",
            where=str(message),
            expected=str(candidates[0]),
            fix="put it there: the messages alone have no starting book",
        )
    return Files(message, orderbook, match["symbol"], _midnight_ns(message, match["date"]), levels)


_SUFFIXES: Final = (".gz", ".xz", ".zst")


def _midnight_ns(message: Path, date: str) -> int:
    """00:00 of the exchange's wall clock on that trading day, in ns UTC."""
    try:
        noon = datetime.fromisoformat(date).replace(hour=12, tzinfo=ZoneInfo(_EXCHANGE_TIME_ZONE))
    except ValueError:
        raise InputError("no date", where=str(message), found=date) from None
    except ZoneInfoNotFoundError:
        raise InputError(
            "no time zone data on this machine",
            where=_EXCHANGE_TIME_ZONE,
            fix="install the system's tzdata, or the Python package tzdata",
        ) from None
    # The offset of noon holds for all trading hours; the clock changes on Sunday nights.
    return (int(noon.timestamp()) - _DAY_S // 2) * 1_000_000_000
