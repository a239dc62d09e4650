"""What `octick subscribe` does: follow an engine's messages until told to stop."""

from __future__ import annotations

import os
import signal as signals
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import msgspec

from engine.board import SignalBoard, line_text, totals_text
from engine.client import SignalClient
from engine.messages import Message, as_json

SILENT_AFTER_S: Final = 2.0
REFRESH_S: Final = 0.25


def follow(client: SignalClient, *, as_lines: bool, count: int = 0, seconds: float = 0.0) -> int:
    """Show what a client receives, until ``count`` messages, ``seconds``, or Ctrl-C.

    Parameters
    ----------
    client : SignalClient
        Not closed here.
    as_lines : bool
        One JSON object a line on stdout; otherwise a live table on a terminal, or plain lines.
    count, seconds : int, float
        Where to stop; 0 means nowhere.

    Returns
    -------
    int
        Exit code: 1 if fewer than ``count`` came within ``seconds``, else 0.
    """
    with ExitStack() as stack:
        previous = signals.signal(signals.SIGTERM, signals.default_int_handler)
        stack.callback(signals.signal, signals.SIGTERM, previous)
        show, idle = _output(client, as_lines, stack)
        try:
            _loop(client, show, idle, count, seconds)
        except KeyboardInterrupt:
            count = 0
        except BrokenPipeError:
            # Whoever read our lines has gone; nothing may be written at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            count = 0
    print(totals_text(client), file=sys.stderr)
    if client.received < count:
        print(f"{client.received} of {count} messages came in {seconds:g} s", file=sys.stderr)
        return 1
    return 0


def _loop(
    client: SignalClient,
    show: Callable[[Message], None],
    idle: Callable[[], None],
    count: int,
    seconds: float,
) -> None:
    started = time.monotonic()
    deadline = started + seconds if seconds else float("inf")
    silence_told = False
    refreshed = started
    while not count or client.received < count:
        message = client.receive_now()
        now = time.monotonic()
        if message is None:
            idle()
            refreshed = now
            message = client.receive(max(0.0, min(REFRESH_S, deadline - now)))
            now = time.monotonic()
        elif now - refreshed > REFRESH_S:
            idle()
            refreshed = now
        if message is not None:
            show(message)
        elif not silence_told and not client.received and now - started >= SILENT_AFTER_S:
            silence_told = True
            what = (
                f"connected, but nothing published under {', '.join(client.topics)} yet"
                if client.connected
                else "nothing there yet"
            )
            print(f"{client.endpoint}: {what}; waiting (Ctrl-C stops)", file=sys.stderr)
        if now >= deadline:
            break
    idle()


def _output(
    client: SignalClient, as_lines: bool, stack: ExitStack
) -> tuple[Callable[[Message], None], Callable[[], None]]:
    """What to do with a message, and what to do when none is waiting."""
    if as_lines or not sys.stdout.isatty():
        encode = msgspec.json.Encoder().encode

        def write_json(message: Message) -> None:
            sys.stdout.write(encode(as_json(message)).decode() + "\n")

        def write_line(message: Message) -> None:
            sys.stdout.write(line_text(message) + "\n")

        return (write_json if as_lines else write_line), sys.stdout.flush

    from rich.live import Live

    board = SignalBoard()
    live: Any = stack.enter_context(Live(auto_refresh=False))

    def refresh() -> None:
        live.update(board.render(client), refresh=True)

    return board.update, refresh
