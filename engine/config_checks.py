"""What a config's types cannot say: endpoints, names, and keys that have to fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from feeds.endpoint import check_endpoint, is_local
from feeds.errors import InputError
from feeds.instruments import MAX_INSTRUMENTS

if TYPE_CHECKING:
    from engine.config import Config

MAX_FEEDS: Final = 64


def check_config(config: Config, where: str) -> None:
    """Refuse a config that cannot be served.

    Parameters
    ----------
    config : Config
    where : str
        Its file, for errors.

    Raises
    ------
    InputError
        With the key, what is expected there, and what was found.
    """
    bound: dict[str, str] = {}
    for index, feed in enumerate(config.feeds):
        check_endpoint(feed.endpoint, key=f"feed[{index}].endpoint", where=where)
        _once(bound, feed.endpoint, f"feed[{index}].endpoint", where)
        if feed.snapshot_endpoint:
            key = f"feed[{index}].snapshot_endpoint"
            check_endpoint(feed.snapshot_endpoint, key=key, where=where)
            _once(bound, feed.snapshot_endpoint, key, where)
    if config.publish.endpoint:
        check_endpoint(config.publish.endpoint, key="publish.endpoint", where=where, binds=True)
        _once(bound, config.publish.endpoint, "publish.endpoint", where)
    if config.control.endpoint:
        check_endpoint(config.control.endpoint, key="control.endpoint", where=where, binds=True)
        _once(bound, config.control.endpoint, "control.endpoint", where)
        locked = config.control.curve_secret_key_file and config.control.curve_clients_folder
        if not locked and not is_local(config.control.endpoint):
            raise InputError(
                "'control.endpoint' could be reached from other machines",
                where=where,
                expected="ipc:// or tcp:// on 127.0.0.1, or curve_secret_key_file and"
                " curve_clients_folder",
                found=config.control.endpoint,
            )
    if config.metrics.address:
        check_endpoint(f"tcp://{config.metrics.address}", key="metrics.address", where=where)
    _at_most(len(config.feeds), MAX_FEEDS, "feed", where)
    _at_most(len(config.instruments), MAX_INSTRUMENTS, "instrument", where)
    if not config.instruments:
        raise InputError(
            "no instrument to follow",
            where=where,
            expected="at least one [[instrument]] with venue and symbol",
            found="none",
        )
    seen: dict[tuple[str, str], int] = {}
    for index, item in enumerate(config.instruments):
        _check_name(item.venue, 16, f"instrument[{index}].venue", where, dots=False)
        _check_name(item.symbol, 32, f"instrument[{index}].symbol", where, dots=True)
        first = seen.setdefault((item.venue, item.symbol), index)
        if first != index:
            raise InputError(
                f"'instrument[{index}]' is named twice",
                where=where,
                found=f"{item.venue} {item.symbol}, also instrument[{first}]",
                fix="remove one",
            )
    for key, text in (("backend", config.model.backend), ("device", config.model.device)):
        if not text:
            raise InputError(f"'model.{key}' is empty", where=where, expected="a name")


def _once(bound: dict[str, str], endpoint: str, key: str, where: str) -> None:
    first = bound.setdefault(endpoint, key)
    if first != key:
        raise InputError(
            f"'{key}' is the endpoint of '{first}' too",
            where=where,
            expected="an endpoint of its own for each",
            found=endpoint,
        )


def _at_most(count: int, limit: int, key: str, where: str) -> None:
    if count > limit:
        raise InputError(
            f"too many [[{key}]]", where=where, expected=f"at most {limit}", found=str(count)
        )


def _check_name(text: str, length: int, key: str, where: str, *, dots: bool) -> None:
    good = 0 < len(text) <= length and all("!" <= char <= "~" for char in text)
    if not good or (not dots and "." in text):
        raise InputError(
            f"'{key}' is no name that fits the wire",
            where=where,
            expected=f"1 to {length} printable ASCII characters without spaces"
            + ("" if dots else " or dots"),
            found=repr(text),
        )
