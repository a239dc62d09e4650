"""What the pipeline had before it when one signal was due, copied before anything moves on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from engine import trust
from engine.advance import LAST_RECEIVED
from engine.book import ASK, BID
from engine.bundle import Bundle
from engine.feature_state import BOOK_UPDATES, TRADE_COUNT
from engine.model_input import RUN
from engine.pipeline import Pipeline
from engine.trust_keeper import Move
from feeds import codec, sync, wire

# A signal with one of these has no feature vector of its own.
NOT_COMPUTED: Final = (
    trust.REASON_SYNCING
    | trust.REASON_GAP
    | trust.REASON_STALE
    | trust.REASON_CROSSED
    | trust.REASON_WARMING_UP
    | trust.REASON_EMPTY_SIDE
)


@dataclass(frozen=True, eq=False)
class Moment:
    """One signal and all that led to it.

    Attributes
    ----------
    message : bytes
        The signal as replayed.
    signal : ndarray scalar of SIGNAL_DTYPE
        Its block.
    bundle : Bundle or None
        The model that served.
    layers : tuple of str
        Names of the value check's bits that are the model's own.
    bids, asks : ndarray of int64, shape (levels, 2)
        The book, best level first: price in ticks, quantity in lots.
    book_updates, trades : int
        Since the features were last reset.
    gaps, lost : int
        Of the instrument's messages so far.
    last_received_ns : int
        When a message last said that the book is current.
    vector : ndarray of float64, shape (n_features,)
        Raw features.
    x : ndarray of float32, shape (n_features,)
        The model's input.
    run : ndarray of float32, shape (n_features,)
        Inputs before this one that had the same value.
    computed, inferred : bool
        Whether features were computed for this signal, and whether a model answered.
    scores : ndarray of float32, shape (n_outputs,), or None
        What the model said, also where the signal was then suppressed.
    late_ns : int
        What the inference took where that was over its budget, else 0.
    mode, serving, shadow : int
        See `engine.trust`.
    halted_why : str
    guard_before, guard, scores_before : ndarray
        The controls before and after this signal, and the scores before it; see
        `engine.controls`.
    moves : list of Move
        Before this signal.
    caused : list of Move
        What the rules made of this signal.
    """

    message: bytes
    signal: np.void
    bundle: Bundle | None
    layers: tuple[str, ...]
    bids: np.ndarray
    asks: np.ndarray
    book_updates: int
    trades: int
    gaps: int
    lost: int
    last_received_ns: int
    vector: np.ndarray
    x: np.ndarray
    run: np.ndarray
    computed: bool
    inferred: bool
    scores: np.ndarray | None
    late_ns: int
    mode: int
    serving: int
    shadow: int
    halted_why: str
    guard_before: np.ndarray
    guard: np.ndarray
    scores_before: np.ndarray
    moves: list[Move]
    caused: list[Move]


def answer(pipeline: Pipeline) -> Moment:
    """Let the pipeline answer the signal that is due, and tell of it."""
    slot = pipeline.slot
    loaded, failover = pipeline.trust.loaded, pipeline.trust.failover
    layers = pipeline.trust.layer_names
    row, features = pipeline.sync[slot], pipeline._fi[slot]
    ticket, failures = pipeline.ticket, pipeline.inference_failures
    mode, serving, shadow, why = (
        failover.mode,
        failover.serving,
        failover.shadow,
        failover.halted_why,
    )
    moves, transitions = list(pipeline.trust.moves), failover.transitions
    guard, scores = pipeline.guards[slot].copy(), pipeline.scores[slot].copy()
    last_received_ns = int(pipeline._track[slot, LAST_RECEIVED])
    message = bytes(pipeline.answer())
    signal = codec.decode_block(message, wire.SIGNAL_DTYPE)
    inferred = pipeline.ticket > ticket
    made = pipeline.trust.recent.find(pipeline.ticket) if inferred else None
    failed = pipeline.inference_failures > failures
    return Moment(
        message=message,
        signal=signal,
        bundle=None if loaded is None else loaded.bundle,
        layers=layers,
        bids=pipeline.book(slot, BID).copy(),
        asks=pipeline.book(slot, ASK).copy(),
        book_updates=int(features[BOOK_UPDATES]),
        trades=int(features[TRADE_COUNT]),
        gaps=int(row[sync.GAPS]),
        lost=int(row[sync.LOST]),
        last_received_ns=last_received_ns,
        vector=pipeline.vector.copy(),
        x=pipeline.x[0].copy(),
        run=pipeline.seen[slot, RUN].copy(),
        computed=not int(signal["reasons"]) & NOT_COMPUTED,
        inferred=inferred,
        scores=None if made is None or failed else made.outputs.copy(),
        late_ns=pipeline.late_ns,
        mode=mode,
        serving=serving,
        shadow=shadow,
        halted_why=why,
        guard_before=guard,
        guard=pipeline.guards[slot].copy(),
        scores_before=scores,
        moves=moves,
        caused=[move for move in pipeline.trust.moves if move.number > transitions],
    )
