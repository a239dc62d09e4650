"""What a generated design is planned in: lanes, and values with the cycles in which they come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lanes:
    """Multipliers of one layer.

    Attributes
    ----------
    inputs, outputs : int
        Of one step: each of ``outputs`` sums takes ``inputs`` products.
    dsp : int
        How many of the ``inputs * outputs`` lanes are to be multiplier blocks of the device, output
        by output, since such blocks lie side by side; the others are made of its logic.
    """

    inputs: int
    outputs: int
    dsp: int = 0

    @property
    def count(self) -> int:
        """Multipliers."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Parallelism:
    """Multipliers by layer name; a cell's are those of its sums.

    Attributes
    ----------
    layers : dict of str to Lanes
        Layers that are not named get one sum at a time, over up to `Lanes.inputs` of ``other``.
    other : Lanes
    """

    layers: dict[str, Lanes] = field(default_factory=dict)
    other: Lanes = field(default_factory=lambda: Lanes(16, 1))

    def of(self, name: str) -> Lanes:
        """The lanes of a layer."""
        return self.layers.get(name, self.other)


@dataclass(frozen=True)
class Value:
    """A value between modules; see `engine.backends.fpga.rtl_library` for how it moves.

    Attributes
    ----------
    name : str
        In the integer graph.
    signal : str
        In the design: its codes stand on ``<signal>``, announced by ``<signal>_ahead``.
    size : int
        Elements.
    bits : int
        Of each element.
    beat : int
        Elements that come at once; the last beat may have more than are left.
    ahead : int
        Cycle, counted from the input's handshake, in which the first beat is announced.
    interval : int
        Cycles from beat to beat.
    """

    name: str
    signal: str
    size: int
    bits: int
    beat: int
    ahead: int
    interval: int = 1

    def __post_init__(self) -> None:
        assert self.interval == 1 or not self.whole, "beats follow one another, a whole does not"

    @property
    def beats(self) -> int:
        """How many beats bring it."""
        return -(-self.size // self.beat)

    @property
    def whole(self) -> bool:
        """Whether it comes at once, and then stays."""
        return self.beats == 1

    @property
    def last_ahead(self) -> int:
        """Cycle in which its last beat is announced."""
        return self.ahead + (self.beats - 1) * self.interval

    @property
    def width(self) -> int:
        """Bits of its signal."""
        return self.bits * self.beat
