"""All there is to say about one signal, gathered from the pipeline and from the tape."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from engine import trust
from engine.config import config_hash, semantic
from engine.digest import canonical
from engine.feature_specs import NAMES, SPECS
from engine.trust_events import COMMAND_NAMES, SETTLING, Control
from engine.trust_keeper import Move
from feeds.describe import describe
from feeds.tape import TapeMeta
from replay.moment import Moment
from replay.opening import Setting
from replay.rules import LAST_BIT, Rule, rules, unclipped
from replay.tape_search import Found
from replay.verify import explain

BOOK_LEVELS: Final = 10  # a side
LAST_MOVES: Final = 10

_Json = dict[str, Any]


class Input(msgspec.Struct, frozen=True):
    """One feature: raw, normalised, and what the model got, which is that within the clip.

    ``marks`` says what is unusual: "most extreme", "clipped", "beyond its bound", "not finite".
    """

    name: str
    unit: str
    raw: float
    normalised: float
    model_input: float
    marks: list[str]


class Story(msgspec.Struct, frozen=True):
    """All there is to say about one signal.

    Attributes
    ----------
    id, tape : str
    signal : dict
        Every field, decoded.
    recorded : dict
        ``found``, ``equal`` (None where there is none) and ``fields`` that differ.
    inputs : list of Input
        Empty where the signal was suppressed before any feature was computed.
    scores : dict or None
        What the model said by class, also where the signal was then suppressed.
    shadow_answer : dict or None
        What the shadow said of the same inference.
    book, model, config, times, messages : dict
    rules : list of Rule
        In the order in which the engine asks.
    engine : dict
        ``mode``, ``answers`` (the model that runs, halted or not), ``halted_why``,
        ``shadow_state``, and ``trust_events``: "followed", "none recorded", or "not followed"
        where those of the tape belong to another model or config.
    moves, caused : list of dict
        Moves between INT8, FP32 and HALTED before it, the last ones, and those it led to.
    events : list of dict
        Trust events before it, the last ones: commands, drift alerts, swaps.
    """

    id: str
    tape: str
    signal: _Json
    recorded: _Json
    inputs: list[Input]
    scores: dict[str, float] | None
    shadow_answer: _Json | None
    book: _Json
    model: _Json | None
    config: _Json
    times: _Json
    messages: _Json
    rules: list[Rule]
    engine: _Json
    moves: list[_Json]
    caused: list[_Json]
    events: list[_Json]


def tell(path: str, meta: TapeMeta, setting: Setting, moment: Moment, found: Found) -> Story:
    """The story of a signal.

    Parameters
    ----------
    path, meta
        The tape and its header.
    setting : Setting
        What replayed it.
    moment : Moment
        What the pipeline had.
    found : Found
        What the tape holds.
    """
    epoch = f"{meta.engine_epoch}:" if meta.engine_epoch else ""
    plain = describe(moment.message)
    return Story(
        id=f"{epoch}{plain['venue']}.{plain['symbol']}/{plain['signal_seq']}",
        tape=path,
        signal=_signal(moment),
        recorded=_recorded(moment, found),
        inputs=_inputs(moment),
        scores=_scores(moment),
        shadow_answer=_shadow_answer(found),
        book=_book(moment, meta),
        model=_model(moment),
        config=_config(setting, meta),
        times=_times(moment, found),
        messages={
            "epoch": int(moment.signal["source_epoch"]),
            "first_seq": int(moment.signal["first_seq"]),
            "last_seq": int(moment.signal["last_seq"]),
            "kinds": dict(sorted(found.kinds.items())),
            "last": found.last,
            "made_due": found.made_due,
        },
        rules=rules(moment, setting.config),
        engine={
            "mode": trust.MODES[moment.mode],
            "answers": trust.MODES[moment.serving],
            "halted_why": moment.halted_why if moment.mode == trust.MODE_HALTED else "",
            "shadow_state": trust.SHADOW_STATES[moment.shadow],
            "trust_events": _trust_events(setting, meta),
        },
        moves=[_move(move) for move in moment.moves[-LAST_MOVES:]],
        caused=[_move(move) for move in moment.caused],
        events=[_event(at_ns, event) for at_ns, event in found.events],
    )


def _trust_events(setting: Setting, meta: TapeMeta) -> str:
    if setting.followed:
        return "followed"
    return "not followed" if meta.hashes else "none recorded"


def _signal(moment: Moment) -> _Json:
    plain = describe(moment.message)
    mask, best = plain["value_check"], plain["predicted_class"]
    classes = () if moment.bundle is None else moment.bundle.classes
    return plain | {
        "tradable": plain["reasons"] == 0,
        "reasons": list(trust.reason_names(plain["reasons"])),
        "book_state": trust.BOOK_STATES[plain["book_state"]],
        "warm": bool(plain["warm"]),
        "precision": trust.PRECISIONS[plain["precision"]],
        "numerics": trust.NUMERICS[plain["numerics"]],
        "shadow_state": trust.SHADOW_STATES[plain["shadow_state"]],
        "predicted_class": None if best == trust.NO_CLASS else best,
        "class_name": classes[best] if best < len(classes) else None,
        "value_check_names": list(trust.check_names(mask, moment.layers)),
    }


def _recorded(moment: Moment, found: Found) -> _Json:
    if found.recorded is None:
        return {"found": False, "equal": None, "fields": []}
    equal = canonical(found.recorded) == canonical(moment.message)
    fields = [] if equal else explain(0, found.recorded, moment.message).fields
    return {"found": True, "equal": equal, "fields": msgspec.to_builtins(fields)}


def _inputs(moment: Moment) -> list[Input]:
    bundle = moment.bundle
    if bundle is None or not moment.computed:
        return []
    z = unclipped(moment, bundle)
    finite = np.isfinite(z)
    size = np.where(finite, np.abs(z), np.inf)
    most = int(np.argmax(size))
    bound = np.broadcast_to(np.asarray(bundle.input_bound, dtype=np.float64), len(z))
    return [
        Input(
            NAMES[i],
            SPECS[i].unit,
            float(moment.vector[i]),
            float(z[i]),
            float(moment.x[i]),
            [
                mark
                for mark, there in (
                    ("most extreme", i == most),
                    ("not finite", not finite[i]),
                    ("clipped", finite[i] and size[i] > bundle.clip),
                    ("beyond its bound", finite[i] and size[i] > bound[i]),
                )
                if there
            ],
        )
        for i in range(len(z))
    ]


def _scores(moment: Moment) -> dict[str, float] | None:
    if moment.scores is None or moment.bundle is None:
        return None
    return dict(zip(moment.bundle.classes, moment.scores.tolist(), strict=True))


def _shadow_answer(found: Found) -> _Json | None:
    said = found.answer
    if said is None:
        return None
    gap = float(np.abs(said.int8 - said.fp32).max()) if said.int8.size == said.fp32.size else None
    return {
        "ticket": said.ticket,
        "fp32": said.fp32.tolist(),
        "int8": said.int8.tolist(),
        "greatest_difference": gap,
        "settling": bool(said.flags & SETTLING),
    }


def _book(moment: Moment, meta: TapeMeta) -> _Json:
    name = tuple(moment.signal[part].decode() for part in ("venue", "symbol"))
    steps = [
        (item.tick, item.lot) for item in meta.instruments if (item.venue, item.symbol) == name
    ]
    tick, lot = steps[0] if steps else ("", "")
    return {
        "state": trust.BOOK_STATES[moment.signal["book_state"]],
        "tick": tick,
        "lot": lot,
        "bid_levels": len(moment.bids),
        "ask_levels": len(moment.asks),
        "bids": moment.bids[:BOOK_LEVELS].tolist(),
        "asks": moment.asks[:BOOK_LEVELS].tolist(),
    }


def _model(moment: Moment) -> _Json | None:
    bundle = moment.bundle
    if bundle is None:
        return None
    return {
        "name": bundle.name,
        "hash": f"{bundle.model_hash:016x}",
        "path": str(bundle.path),
        "numerics": bundle.numerics,
        "classes": list(bundle.classes),
        "value_check_layers": [
            {"bit": min(trust.CHECK_LAYERS + i, LAST_BIT), "layer": name}
            for i, name in enumerate(moment.layers)
        ],
    }


def _config(setting: Setting, meta: TapeMeta) -> _Json:
    used = semantic(setting.config)
    return {
        "hash": f"{config_hash(setting.config):016x}",
        "recorded": meta.config,
        "used": used,
        "used_is_recorded": None if meta.config is None else used == meta.config,
    }


def _times(moment: Moment, found: Found) -> _Json:
    """When it happened; a replay emits nothing, so the time of emission is the recorded one."""
    block = describe(moment.message)
    emitted = None if found.recorded is None else describe(found.recorded).get("emitted_ns")
    exchange, source = block["exchange_time_ns"], block["source_time_ns"]
    received = block["received_ns"]
    return {
        "exchange_ns": exchange,
        "source_ns": source,
        "received_ns": received,
        "emitted_ns": emitted,
        "exchange_to_source_us": (source - exchange) / 1e3,
        "source_to_received_us": (received - source) / 1e3,
        "received_to_emitted_us": None if emitted is None else (emitted - received) / 1e3,
    }


def _move(move: Move) -> _Json:
    step = move.transition
    return {
        "number": move.number,
        "at_ns": move.at_ns,
        "from": trust.MODES[step.before],
        "to": trust.MODES[step.after],
        "rule": step.rule,
        "detail": step.detail,
        "by": step.by,
    }


def _event(at_ns: int, event: Control) -> _Json:
    plain: _Json = {
        "at_ns": at_ns,
        "event": COMMAND_NAMES.get(event.command, f"command {event.command}"),
        "by": event.by,
        "text": event.text,
    }
    if event.value:
        plain["value"] = event.value
    if event.model_hash:
        plain["model_hash"] = f"{event.model_hash:016x}"
    if event.symbol:
        plain["signal"] = f"{event.venue}.{event.symbol}/{event.signal_seq}"
    return plain
