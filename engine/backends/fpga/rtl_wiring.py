"""The top module as it grows: values, the wires they come on, and the modules that move them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from engine.backends.fpga.rtl_checks import Count, counter_module, counter_name, counter_ready
from engine.backends.fpga.rtl_library import (
    CODE_BITS,
    COLLECT_CYCLES,
    LIBRARY,
    SERIALISE_CYCLES,
)
from engine.backends.fpga.rtl_text import identifier, unsigned_bits, vector
from engine.backends.fpga.rtl_value import Value
from engine.backends.integer_graph import Point

TOP: Final = "octick_top"


@dataclass(frozen=True, eq=False)
class Part:
    """Some columns of a value of the graph, in a value of the design.

    Attributes
    ----------
    value : Value
    columns : ndarray of int
        Which columns of the graph's value its elements are.
    """

    value: Value
    columns: np.ndarray


class Wiring:
    """The inside of the top module.

    Parameters
    ----------
    draft : bool
        Whether nothing is written, only planned.

    Attributes
    ----------
    wires, body : list of str
        Declarations, and instances of modules.
    counts : list of Count
        Of the value check.
    """

    def __init__(self, draft: bool = False) -> None:
        self.draft = draft
        self.wires: list[str] = []
        self.body: list[str] = []
        self.counts: list[Count] = []
        self._files = {f"{name}.sv": text for name, text in LIBRARY.items()}
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._names = {TOP, *LIBRARY}
        self._collected: dict[str, Value] = {}
        self._joined: dict[str, Value] = {}

    def unique(self, name: str) -> str:
        """An identifier for a name, unlike any other in the design."""
        plain = found = identifier(name)
        number = 1
        while found in self._names:
            number += 1
            found = f"{plain}_{number}"
        self._names.add(found)
        return found

    def _keep(self, name: str, value: Value) -> None:
        self._parts[name] = (Part(value, np.arange(value.size)),)

    def _declare(self, value: Value) -> None:
        if self.draft:
            return
        self.wires += [
            f"  wire {value.signal}_ahead;",
            f"  wire {vector(value.width)} {value.signal};",
        ]

    def _instance(
        self, module: str, ports: dict[str, str], name: str = "", **parameters: object
    ) -> None:
        if self.draft:
            return
        given = ", ".join(f".{key}({value})" for key, value in parameters.items())
        wired = ", ".join(f".{port}({wire})" for port, wire in ports.items())
        self.body += [
            f"  {module} #({given}) {name or 'u_' + module} (",
            f"    .clk(clk), {wired}",
            "  );",
        ]

    def _single(self, name: str) -> Value:
        """A value of the graph as one value of the design, in beats or whole."""
        parts = self._parts[name]
        if len(parts) == 1 and (parts[0].columns == np.arange(parts[0].value.size)).all():
            return parts[0].value
        found = self._joined.get(name)
        if found is None:
            found = self._joined[name] = self._join(name, parts)
        return found

    def _join(self, name: str, parts: tuple[Part, ...]) -> Value:
        """Parts as one value, in the graph's order."""
        at: dict[int, tuple[Value, int]] = {}
        for part in parts:
            value = self._collect(part.value)
            at |= {int(column): (value, n) for n, column in enumerate(part.columns)}
        return self._wired(name, [at[column] for column in range(len(at))])

    def _wired(self, name: str, chosen: list[tuple[Value, int]]) -> Value:
        """A value of codes of others, which are whole."""
        latest = max((value for value, _ in chosen), key=lambda value: value.ahead)
        size = len(chosen)
        found = Value(name, self.unique(name), size, CODE_BITS, size, latest.ahead)
        self._declare(found)
        codes = [f"{value.signal}[{CODE_BITS * n} +: {CODE_BITS}]" for value, n in reversed(chosen)]
        self.body += [
            f"  assign {found.signal}_ahead = {latest.signal}_ahead;",
            f"  assign {found.signal} = {{{', '.join(codes)}}};",
        ]
        return found

    def _whole(self, name: str) -> Value:
        """A value of the graph when all of it is there."""
        return self._collect(self._single(name))

    def _collect(self, value: Value, *, always: bool = False) -> Value:
        """A value when all its beats are there."""
        if value.whole and not always:
            return value
        found = self._collected.get(value.signal)
        if found is not None:
            return found
        signal = self.unique(f"{value.signal}_whole")
        ahead = value.last_ahead + COLLECT_CYCLES
        found = Value(value.name, signal, value.size, value.bits, value.size, ahead)
        self._declare(found)
        self._instance(
            "collect",
            {
                "rst": "rst",
                "beat_ahead": f"{value.signal}_ahead",
                "beat": value.signal,
                "whole_ahead": f"{signal}_ahead",
                "whole": signal,
            },
            f"u_{signal}",
            BEATS=value.beats,
            BEAT_BITS=value.width,
            BITS=found.width,
            COUNT_BITS=unsigned_bits(value.beats - 1),
        )
        self._collected[value.signal] = found
        return found

    def _count(self, point: Point | None, value: Value) -> None:
        """Count a value's saturated codes where the value check does."""
        if point is None or point.group < 0 or not (point.low or point.high):
            return
        bits = unsigned_bits(value.size)
        signal = self.unique(f"{point.name}_saturated")
        module = counter_name(value.beat)
        if not self.draft:
            self._files[f"{module}.sv"] = counter_module(value.beat)
        self.wires.append(f"  wire {vector(bits)} {signal};")
        self._instance(
            module,
            {
                "rst": "rst",
                "start": "accept",
                "codes_ahead": f"{value.signal}_ahead",
                "codes": value.signal,
                "count": signal,
            },
            f"u_{signal}",
            HOLD="HOLD",
            LOW=f"1'b{int(point.low)}",
            HIGH=f"1'b{int(point.high)}",
            COUNT_BITS=bits,
        )
        self.counts.append(Count(signal, bits, point.group, counter_ready(value)))

    def _serialise(self, value: Value, lanes: int) -> Value:
        """A whole value in beats of about so many codes."""
        beat = max(
            n for n in range(1, value.size + 1) if value.size % n == 0 and n <= max(lanes, 1)
        )
        if beat == value.size:
            return value
        signal = self.unique(f"{value.signal}_beats")
        found = replace(value, signal=signal, beat=beat, ahead=value.ahead + SERIALISE_CYCLES)
        self._declare(found)
        ports = {
            "rst": "rst",
            "whole_ahead": f"{value.signal}_ahead",
            "whole": value.signal,
            "beat_ahead": f"{signal}_ahead",
            "beat": signal,
        }
        beats = value.size // beat
        self._instance(
            "serialise",
            ports,
            f"u_{signal}",
            BEATS=beats,
            BEAT_BITS=found.width,
            COUNT_BITS=unsigned_bits(beats - 1),
        )
        return found
