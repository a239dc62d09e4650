"""The digest of a run: SHA-256 over the canonical bytes of its signals.

Canonical are the first `feeds.wire.SIGNAL_CANONICAL_BLOCK` bytes of the block (no wall clock, no
engine epoch, no backend name, no build) and the outputs. Two runs with one digest gave the same
signals, suppressed ones included, in the same order.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

from feeds import wire

_BLOCK_END: Final = wire.HEADER_BYTES + wire.SIGNAL_CANONICAL_BLOCK
_OUTPUTS: Final = wire.HEADER_BYTES + wire.SIGNAL_BLOCK + wire.GROUP_HEADER_BYTES
MAX_BUFFERED_BYTES: Final = 1 << 16


def canonical(message: bytes | memoryview) -> bytes:
    """The part of a Signal that must be the same live and replayed."""
    return bytes(message[wire.HEADER_BYTES : _BLOCK_END]) + bytes(message[_OUTPUTS:])


class Digest:
    """Streaming digest over signals.

    Examples
    --------
    >>> Digest().hexdigest()[:8]
    'e3b0c442'
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._buffer = bytearray()
        self.signals = 0

    def update(self, message: bytes | memoryview) -> None:
        """Count in one SBE Signal."""
        buffer = self._buffer
        buffer += message[wire.HEADER_BYTES : _BLOCK_END]
        buffer += message[_OUTPUTS:]
        self.signals += 1
        if len(buffer) > MAX_BUFFERED_BYTES:
            self._sha.update(buffer)
            buffer.clear()

    def update_all(self, messages: memoryview, size: int) -> None:
        """Count in SBE Signals of ``size`` bytes each, one behind the other."""
        rows = np.frombuffer(messages, dtype=np.uint8).reshape(-1, size)
        kept = np.concatenate([rows[:, wire.HEADER_BYTES : _BLOCK_END], rows[:, _OUTPUTS:]], axis=1)
        self._buffer += kept.data.cast("B")
        self.signals += len(rows)
        if len(self._buffer) > MAX_BUFFERED_BYTES:
            self._sha.update(self._buffer)
            self._buffer.clear()

    def hexdigest(self) -> str:
        """The digest so far, 64 hex digits."""
        sha = self._sha.copy()
        sha.update(self._buffer)
        return sha.hexdigest()
