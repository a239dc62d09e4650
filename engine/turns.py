"""When the hot path has its turn on the event loop, and what has its turn in between.

The hot path waits for messages by itself (`engine.waiting`) and comes back where the loop has
something to do. Then the loop has some rounds of its own: what is ready in one may make something
else ready in the next (a future, then whoever awaits it), and no descriptor tells that.

Beside the hot path stand the descriptors and timers of the loop. ZeroMQ's descriptors are
edge-triggered, so a slow poll looks after an edge that was missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

SLOW_POLL_S: Final = 0.1  # each costs messages what Python takes that has left the caches
ROUNDS: Final = 6  # of the loop, before the hot path sleeps again

Reader = tuple[int, Callable[[], object]]


class Turns:
    """The hot path's turns on an event loop, from `start` to `stop`.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
    drain : callable
        Takes what comes; told whether it may sleep where nothing does, it says whether it has.
    on_slow_poll : callable
        What edges may have been missed of.
    on_timer : callable
        Called every ``timer_s``.
    timer_s : float
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        drain: Callable[[bool], bool],
        *,
        on_slow_poll: Callable[[], None],
        on_timer: Callable[[], None],
        timer_s: float,
    ) -> None:
        self._loop = loop
        self._drain = drain
        self._on_slow_poll = on_slow_poll
        self._on_timer = on_timer
        self._timer_s = timer_s
        self._readers: list[Reader] = []
        self._timers: list[asyncio.Handle] = []

    def start(self, readers: Sequence[Reader]) -> None:
        """Begin; ``readers`` are descriptors, and what to call when something has come there."""
        self._readers = list(readers)
        for fd, call in self._readers:
            self._loop.add_reader(fd, call)
        self._timers = [self._loop.call_soon(self._slow_poll), self._loop.call_soon(self._timer)]

    def stop(self) -> None:
        """End. Stopping twice is fine."""
        for timer in self._timers:
            timer.cancel()
        for fd, _ in self._readers:
            self._loop.remove_reader(fd)
        self._timers, self._readers = [], []

    async def run(self, stopped: asyncio.Event, seconds: float) -> None:
        """Go on until ``stopped`` is set, or ``seconds`` have passed (0: no limit)."""
        deadline = self._loop.time() + seconds
        rounds = ROUNDS
        while not stopped.is_set() and (seconds <= 0 or self._loop.time() < deadline):
            slept = self._drain(rounds == 0)
            rounds = ROUNDS if slept else max(rounds - 1, 0)
            await asyncio.sleep(0)

    def _slow_poll(self) -> None:
        self._on_slow_poll()
        self._timers[0] = self._loop.call_later(SLOW_POLL_S, self._slow_poll)

    def _timer(self) -> None:
        self._on_timer()
        self._timers[1] = self._loop.call_later(self._timer_s, self._timer)
