"""Where things lie: weights and tables in one blob, values in shared memory, a stream's state.

Everything begins at a multiple of `ALIGNMENT_BYTES`, so that a kernel may read whole vectors, up
to the padding behind a value too: the weights there are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.backends.integer_graph import Delay

ALIGNMENT_BYTES: Final = 16  # the widest load of one thread: 128 bits
CODES_A_WORD: Final = 4  # what one dp4a takes


def aligned(size: int, to: int = ALIGNMENT_BYTES) -> int:
    """The next multiple."""
    return -(-size // to) * to


class Blob:
    """What is uploaded once: weights, biases, shifts and tables, one after the other."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self.size = 0

    def add(self, array: np.ndarray) -> int:
        """Append an array's bytes; returns the offset at which they begin."""
        at = self.size
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype=np.uint8)
        self._parts.append(np.pad(data, (0, aligned(len(data)) - len(data))))
        self.size += len(self._parts[-1])
        return at

    def join(self) -> np.ndarray:
        """All of it, uint8; never empty."""
        return np.concatenate([*self._parts, np.zeros(ALIGNMENT_BYTES, dtype=np.uint8)])


class Places:
    """Offsets by name in one stretch of memory, in bytes."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self.size = 0

    def add(self, name: str, size: int) -> int:
        """A new place; returns its offset."""
        assert name not in self._at, name
        self._at[name] = self.size
        self.size += aligned(size)
        return self._at[name]

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def __getitem__(self, name: str) -> int:
        return self._at[name]


@dataclass(frozen=True)
class PackedWeights:
    """Weights as dp4a takes them, four inputs a word.

    Thread ``j`` computes output ``j``, so that neighbours read neighbouring vectors: vector ``k``
    of output ``j`` is number ``k * outputs + j``.

    Attributes
    ----------
    data : ndarray of int8
    vector : int
        Words of one vector: 4, 2 or 1; 0 where rows begin at any byte and codes are put together
        into words one by one.
    count : int
        Vectors of one output.
    """

    data: np.ndarray
    vector: int
    count: int


def pack_weights(weight: np.ndarray, rows: int) -> PackedWeights:
    """The widest packing that the rows' alignment allows.

    Parameters
    ----------
    weight : ndarray of int8, shape (outputs, inputs)
    rows : int
        Of the codes that it multiplies.
    """
    outputs, inputs = weight.shape
    if rows == 1:  # what stands behind one row is padding
        vector = 4 if inputs > ALIGNMENT_BYTES // 2 else 1
    else:
        vector = next((v for v in (4, 2, 1) if inputs % (CODES_A_WORD * v) == 0), 0)
    block = CODES_A_WORD * max(vector, 1)
    padded = np.zeros((outputs, aligned(inputs, block)), dtype=np.int8)
    padded[:, :inputs] = weight
    count = padded.shape[1] // block
    data = padded.reshape(outputs, count, block).transpose(1, 0, 2)
    return PackedWeights(np.ascontiguousarray(data), vector, count)


def ring_slots(delay: Delay) -> int:
    """Steps that a delay's ring holds: those it remembers and the present one, a power of two.

    So no step overwrites what it reads, and a step that failed may be done again.
    """
    return 1 << delay.steps.bit_length()
