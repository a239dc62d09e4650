"""Third level of verification: both precisions of a bundle in the real pipeline over a tape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from engine.backends.registry import open_backend
from engine.bundle import Bundle
from engine.config import Config, ModelConfig, default_config
from engine.digest import Digest
from engine.pipeline import Pipeline
from engine.signals import AT_BEST_ASK, AT_BEST_BID, AT_OUTPUTS
from feeds.errors import InputError
from feeds.simulator import Simulator
from feeds.tape import InstrumentMeta
from feeds.tape_reader import Chunk, TapeReader
from models.labels import CLASSES, classify, smoothed_move
from models.step_session import StepSession
from models.verify import Checks

MIN_AGREEMENT: Final = 0.97
MIN_SIGNALS: Final = 100
MAX_SIGNALS: Final = 200_000
LATENCY_RUNS: Final = 2_000
SCORED_ROWS: Final = 2_000
SIMULATED_MESSAGES: Final = 60_000
SIMULATED_SEED: Final = 2_026
SIMULATED_INSTRUMENTS: Final = 2


@dataclass(frozen=True)
class Session:
    """What one precision said over the tape.

    Attributes
    ----------
    digest : str
    signals : int
        Suppressed ones included.
    scores : ndarray of float32, shape (n, classes)
        Of the tradable ones.
    mid_half_ticks, slot : ndarray of int64, shape (n,)
    inputs : ndarray of float32, shape (m, features)
        Model inputs of the first tradable signals of one instrument, in order.
    """

    digest: str
    signals: int
    scores: np.ndarray
    mid_half_ticks: np.ndarray
    slot: np.ndarray
    inputs: np.ndarray


def run_pipeline(
    bundle: Bundle,
    precision: str,
    chunks: Iterable[Chunk],
    instruments: Iterable[InstrumentMeta],
    *,
    threads: int = 1,
) -> Session:
    """Run daemon's and replay's own pipeline over tape records with a bundle."""
    config: Config = msgspec.structs.replace(
        default_config((item.venue, item.symbol) for item in instruments),
        model=ModelConfig(precision=precision),  # type: ignore[arg-type]
    )
    backend = open_backend("onnx", bundle, threads=threads, precision=precision)
    # Commands on the tape were given to another model.
    pipeline = Pipeline(config, bundle, backend, follow_trust_events=False)
    digest = Digest()
    scores: list[np.ndarray] = []
    inputs: list[np.ndarray] = []
    mids: list[int] = []
    slots: list[int] = []
    for buf, start, after, _ in chunks:
        at = start
        while at < after:
            at = pipeline.advance(buf, at, after)
            if not pipeline.fired:
                continue
            slot, tradable = pipeline.slot, pipeline.tradable
            message = pipeline.answer()
            digest.update(message)
            if pipeline.tradable == tradable:
                continue
            block = np.frombuffer(message, dtype=np.uint8)
            scores.append(block[AT_OUTPUTS:].view(np.float32).copy())
            mids.append(int(_int64(block, AT_BEST_BID)) + int(_int64(block, AT_BEST_ASK)))
            slots.append(slot)
            if slot == slots[0] and len(inputs) < SCORED_ROWS:
                inputs.append(pipeline.x[0].copy())
        if len(scores) >= MAX_SIGNALS:
            break
    backend.close()
    return Session(
        digest.hexdigest(),
        digest.signals,
        np.array(scores, dtype=np.float32).reshape(len(scores), bundle.n_outputs),
        np.array(mids, dtype=np.int64),
        np.array(slots, dtype=np.int64),
        np.array(inputs, dtype=np.float32).reshape(len(inputs), bundle.n_features),
    )


class Records(Protocol):
    """Tape records that can be read from their start again, the same each time."""

    @property
    def instruments(self) -> Sequence[InstrumentMeta]:
        """Whose they are."""
        ...

    def chunks(self) -> Iterable[Chunk]:
        """The records, from the first."""
        ...


class TapeSource:
    """A tape that can be read from its start again; a simulated session where none is named.

    Parameters
    ----------
    path : Path or None
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        market = Simulator(seed=SIMULATED_SEED, n_instruments=SIMULATED_INSTRUMENTS)
        self.instruments = market.instruments if path is None else TapeReader(path).meta.instruments

    def chunks(self) -> Iterable[Chunk]:
        """The records, from the first."""
        if self._path is not None:
            return TapeReader(self._path).chunks()
        market = Simulator(seed=SIMULATED_SEED, n_instruments=SIMULATED_INSTRUMENTS)
        return market.chunks(SIMULATED_MESSAGES)


def recorded_rows(bundle: Bundle, tape: Records) -> np.ndarray:
    """Model inputs of one instrument as the pipeline makes them, float32 of shape (n, features).

    Raises
    ------
    InputError
        If the tape has too few tradable signals.
    """
    session = run_pipeline(bundle, "int8", tape.chunks(), tape.instruments)
    if len(session.inputs) < MIN_SIGNALS:
        raise InputError(
            "too few tradable signals to verify with",
            where="the tape",
            expected=f"at least {MIN_SIGNALS} of one instrument",
            found=str(len(session.inputs)),
            fix="take a longer tape",
        )
    return session.inputs


def _int64(block: np.ndarray, at: int) -> np.int64:
    value: np.int64 = block[at : at + 8].copy().view(np.int64)[0]
    return value


def system_level(bundle: Bundle, tape: Records, checks: Checks) -> dict[str, Any]:
    """Run the third level.

    Returns
    -------
    dict
        Signals, digests, agreement, accuracy of both precisions, latency.
    """
    int8 = run_pipeline(bundle, "int8", tape.chunks(), tape.instruments)
    again = run_pipeline(bundle, "int8", tape.chunks(), tape.instruments, threads=2)
    fp32 = run_pipeline(bundle, "fp32", tape.chunks(), tape.instruments)
    same = int8.digest == again.digest
    if bundle.numerics == "exact-int8":
        detail = "0 if one and two threads give one digest"
        checks.add("system", "digest", 0.0 if same else 1.0, 0.0, detail)
    agreement = float((int8.scores.argmax(axis=1) == fp32.scores.argmax(axis=1)).mean())
    detail = f"share of {len(int8.scores)} tradable signals with the class of FP32"
    checks.at_least("system", "agreement", agreement, MIN_AGREEMENT, detail)
    facts: dict[str, Any] = {
        "signals": int8.signals,
        "tradable": len(int8.scores),
        "digest": int8.digest,
        "digest_two_threads": again.digest,
        "agreement": round(agreement, 6),
    }
    facts |= _accuracies(bundle, {"int8": int8, "fp32": fp32})
    for precision in ("int8", "fp32"):
        session = StepSession(bundle.model_bytes(precision), bundle.state(precision))
        p50, p99 = session.latency(int8.inputs, LATENCY_RUNS)
        facts[f"{precision}_p50_us"], facts[f"{precision}_p99_us"] = round(p50, 2), round(p99, 2)
    return facts


def _accuracies(bundle: Bundle, sessions: dict[str, Session]) -> dict[str, Any]:
    """Accuracy on the tape, where the bundle says what its labels are."""
    label = bundle.manifest.training.get("label", {})
    if label.get("kind") != "smoothed" or bundle.classes != CLASSES:
        return {}
    horizon = int(label["horizon"])
    found: dict[str, Any] = {}
    for precision, session in sessions.items():
        moves, named = [], []
        for slot in np.unique(session.slot):
            own = np.flatnonzero(session.slot == slot)
            ahead = smoothed_move(session.mid_half_ticks[own], horizon)
            moves.append(ahead)
            named.append(session.scores[own[: len(ahead)]].argmax(axis=1))
        move, predicted = np.concatenate(moves), np.concatenate(named)
        if not len(move):
            return {}
        threshold = round(float(label["threshold"]) * horizon)
        truth = classify(move, threshold)
        found[f"{precision}_accuracy"] = round(float((predicted == truth).mean()), 6)
        found["majority_accuracy"] = round(float(np.bincount(truth).max() / len(truth)), 6)
    return found
