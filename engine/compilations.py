"""How many functions Numba compiled in this process since it was asked to watch.

Every compiler of Numba, whether for a jitted function, a C callback, a ufunc or a lifted loop, runs
its passes through one pass manager, which tells of each of them; a function that is loaded from the
cache runs none. The event "numba:compile" would not do: it comes from dispatchers alone, and the
compiled backend's entry point is a C callback.

Source: Numba documentation, "Event API"; ``numba.core.compiler_machinery.PassManager``.
"""

from __future__ import annotations

from typing import Any, Final

from numba.core import event

PASS: Final = "numba:run_pass"
MAX_NAMED: Final = 16


class Compilations(event.Listener):
    """Compilations from `watch` to `close`, of any thread.

    Attributes
    ----------
    count : int
    functions : list of str
        The first `MAX_NAMED` of them, as ``module.function``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.functions: list[str] = []
        self._first: dict[tuple[str, str, str], str] = {}
        self._watching = False

    def watch(self) -> None:
        """Count from now on."""
        event.register(PASS, self)
        self._watching = True

    def on_start(self, event: Any) -> None:
        """A pass begins: a compilation where it is the one that its function began with."""
        data = event.data
        key = (data["module"], data["qualname"], data["args"])
        if self._first.setdefault(key, data["name"]) == data["name"]:
            self.count += 1
            if len(self.functions) < MAX_NAMED:
                self.functions.append(f"{data['module']}.{data['qualname']}")

    def on_end(self, event: Any) -> None:
        """A pass ended."""

    def close(self) -> None:
        """Stop counting; what was counted stays. Closing twice is fine."""
        if self._watching:
            event.unregister(PASS, self)
            self._watching = False
