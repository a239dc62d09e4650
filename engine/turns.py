"""When the event loop takes what waits at the feeds, and what has its turn in between.

The sockets' descriptors are edge-triggered: one says that something has come, and then nothing
more until all of it was taken. So a turn that ends at its budget goes on in the next round of the
loop, and a slow poll looks after an edge that was missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from engine.config import LoopConfig

SLOW_POLL_S: Final = 0.05

Reader = tuple[int, Callable[[], object]]


class Turns:
    """The hot path's turns on an event loop, from `start` to `stop`.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
    config : LoopConfig
    drain : callable
        Takes what waits, looking for it for so many nanoseconds; True where more may be waiting.
    on_slow_poll : callable
        What else edges may have been missed of.
    on_timer : callable
        Called every ``timer_s``.
    timer_s : float
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: LoopConfig,
        drain: Callable[[int], bool],
        *,
        on_slow_poll: Callable[[], None],
        on_timer: Callable[[], None],
        timer_s: float,
    ) -> None:
        self._loop = loop
        self._config = config
        self._drain = drain
        self._on_slow_poll = on_slow_poll
        self._on_timer = on_timer
        self._timer_s = timer_s
        self._going_on = self._stopped = False
        self._readers: list[Reader] = []
        self._timers: list[asyncio.Handle] = []

    def start(self, feeds: Sequence[int], others: Sequence[Reader]) -> None:
        """Begin.

        Parameters
        ----------
        feeds : sequence of int
            Descriptors of the feeds.
        others : sequence of (int, callable)
            Other descriptors, and what to call when something has come there.
        """
        own = [] if self._config.busy_poll else [(fd, self._on_feed) for fd in feeds]
        self._readers = [*own, *others]
        for fd, call in self._readers:
            self._loop.add_reader(fd, call)
        self._timers = [self._loop.call_soon(self._slow_poll), self._loop.call_soon(self._timer)]

    def stop(self) -> None:
        """End. Stopping twice is fine."""
        self._stopped = True  # a turn that goes on is on its way already
        for timer in self._timers:
            timer.cancel()
        for fd, _ in self._readers:
            self._loop.remove_reader(fd)
        self._timers, self._readers = [], []

    async def run(self, stopped: asyncio.Event, seconds: float) -> None:
        """Go on until ``stopped`` is set, or ``seconds`` have passed (0: no limit)."""
        if not self._config.busy_poll:
            with suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), seconds if seconds > 0 else None)
            return
        deadline = self._loop.time() + seconds
        while not stopped.is_set() and (seconds <= 0 or self._loop.time() < deadline):
            self._drain(self._config.spin_ns)
            await asyncio.sleep(0)

    def _on_feed(self) -> None:
        # One turn at a time: a busy feed would gain another with each wake-up, and everything
        # else would wait for all of them.
        if not self._going_on:
            self._go_on()

    def _go_on(self) -> None:
        self._going_on = not self._stopped and self._drain(0)
        if self._going_on:
            self._loop.call_soon(self._go_on)

    def _slow_poll(self) -> None:
        self._on_feed()
        self._on_slow_poll()
        self._timers[0] = self._loop.call_later(SLOW_POLL_S, self._slow_poll)

    def _timer(self) -> None:
        self._on_timer()
        self._timers[1] = self._loop.call_later(self._timer_s, self._timer)
