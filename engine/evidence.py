"""What a transition leaves behind: one JSON file with all that the rule had before it.

The file is a function of the pipeline's state at the move, so a replay of the tape writes the same
one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from engine.config import Config, config_hash, semantic
from engine.feature_specs import NAMES
from engine.features import SCHEMA_HASH
from engine.hashes import code_hash
from engine.model_input import normalised
from engine.pipeline import Pipeline
from engine.trust import MODE_FP32, MODE_INT8, MODES
from engine.trust_keeper import Move
from feeds.errors import InputError

BOOK_LEVELS: Final = 20  # a side


def gather(pipeline: Pipeline, config: Config, move: Move) -> dict[str, Any]:
    """Everything about a move, as plain JSON values.

    To be called before the pipeline takes its next event. The book is the instrument's now;
    features, inputs and scores are those of the inference that led here.

    Returns
    -------
    dict
        ``number``, ``at_ns``, ``from``, ``to``, ``rule``, ``detail``, ``by``, ``hashes``,
        ``config``, and where an inference led here ``instrument``, ``signal_seq``, ``inference``,
        ``features``, ``inputs``, ``scores`` (of each precision) and ``book``.
    """
    transition = move.transition
    found: dict[str, Any] = {
        "number": move.number,
        "at_ns": move.at_ns,
        "from": MODES[transition.before],
        "to": MODES[transition.after],
        "rule": transition.rule,
        "detail": transition.detail,
        "by": transition.by,
        "hashes": {
            "model": f"{pipeline.trust.model_hash:016x}",
            "config": f"{config_hash(config):016x}",
            "features": f"{SCHEMA_HASH:016x}",
            "code": f"{code_hash():016x}",
        },
        "config": semantic(config),
    }
    row = pipeline.trust.recent.find(move.ticket)
    if row is None or pipeline.trust.loaded is None:
        return found
    venue, symbol = pipeline.names[row.slot]
    bundle = pipeline.trust.loaded.bundle
    x = normalised(row.vector[None], bundle)
    scores = {MODES[row.mode].lower(): plain(row.outputs)}
    if move.answer is not None:
        scores["fp32"] = plain(move.answer.fp32)
        if row.mode == MODE_FP32:
            scores["int8"] = plain(move.answer.int8)
    else:
        scores |= _other_model(pipeline, row.mode, x)
    return found | {
        "instrument": {"venue": venue, "symbol": symbol},
        "signal_seq": row.signal_seq,
        "inference": row.ticket,
        "answered_by": MODES[row.mode],
        "features": dict(zip(NAMES, plain(row.vector), strict=True)),
        "inputs": plain(x[0]),
        "classes": list(bundle.classes),
        "scores": scores,
        "book": {
            side: pipeline.book(row.slot, i)[:BOOK_LEVELS].tolist()
            for i, side in enumerate(("bids", "asks"))
        },
    }


def _other_model(pipeline: Pipeline, mode: int, x: np.ndarray) -> dict[str, list[float | None]]:
    """What the twin of the model that answered says, where it has no state that has moved on."""
    loaded = pipeline.trust.loaded
    other = MODE_FP32 if mode == MODE_INT8 else MODE_INT8
    if loaded is None or loaded.has_state(other):
        return {}
    out = np.zeros(loaded.bundle.n_outputs, dtype=np.float32)
    try:
        loaded.backend(other).infer(0, x, out)
    except (InputError, RuntimeError):
        return {}
    return {MODES[other].lower(): plain(out)}


def plain(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON; what is none is null."""
    return [float(value) if np.isfinite(value) else None for value in values.tolist()]


def write(folder: str, found: dict[str, Any]) -> Path:
    """Write one evidence file, whole or not at all; returns its path.

    Named by time, running number and move: ``1700000000000000000-0001-INT8-FP32.json``.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    name = f"{found['at_ns']}-{found['number']:04d}-{found['from']}-{found['to']}.json"
    partial = path / f".{name}.partial"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    os.replace(partial, path / name)
    return path / name
