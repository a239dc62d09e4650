"""What a session of the daemon did so far: the fields of EngineState, and the closing totals."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from engine import latency
from engine.compilations import Compilations
from engine.config import Config, config_hash
from engine.features import SCHEMA_HASH
from engine.gc_pauses import GcPauses
from engine.hashes import code_hash
from engine.live_link import LiveLink
from engine.pipeline import Pipeline
from engine.recorder import Recorder
from engine.shadow import Shadow
from engine.shadow_ring import STAT_NAMES
from engine.start_up import StartUp
from engine.trust import MODES


class Totals(msgspec.Struct):
    """What a session did, for the closing line and ``--json``.

    Attributes
    ----------
    collections : int
        Of garbage, once events were being taken; `longest_gc_pause_us` is the longest of them.
    compilations : int
        Functions that Numba compiled after READY, not those that it loaded from its cache; the
        first of them are named in `compiled`.
    rehearsals : int
        Of the hot path while it waited.
    start_up_s : dict
        Seconds that each stage took, from the process's start to READY.
    """

    seconds: float
    messages: int
    signals: int
    tradable: int
    lost: int
    gaps: int
    duplicates: int
    rejected: int
    instruments: int
    synced: int
    subscriber_drops: int
    mode: str
    transitions: int
    shadow_answers: int
    disagreements: int
    swaps: int
    conflations: int
    rehearsals: int
    lag_max_ms: float
    latency_p50_us: float
    latency_p99_us: float
    latency_max_us: float
    collections: int
    longest_gc_pause_us: float
    compilations: int
    compiled: list[str]
    start_up_s: dict[str, float]
    tape: str
    tape_records: int
    engine_epoch: int
    model_hash: str
    config_hash: str
    code_hash: str


class Account:
    """Keeps account of one session.

    Parameters
    ----------
    config : Config
    pipeline : Pipeline
    link : LiveLink
    epoch : int
        When the session began, ns since the UNIX epoch; names it.

    Attributes
    ----------
    shadow : Shadow or None
    state_seq : int
        Of the last EngineState.
    conflations : int
        Times that messages began to be conflated.
    gc_pauses : GcPauses
    compilations : Compilations
    """

    def __init__(self, config: Config, pipeline: Pipeline, link: LiveLink, epoch: int) -> None:
        self._config = config
        self._pipeline = pipeline
        self._link = link
        self._epoch = epoch
        self._lag_max_ns = 0
        self.shadow: Shadow | None = None
        self.state_seq = self.conflations = 0
        self.gc_pauses: Final = GcPauses()
        self.compilations: Final = Compilations()

    def close_lag(self) -> None:
        """An EngineState has told the longest lag; the next tells that from here on."""
        self._lag_max_ns = max(self._lag_max_ns, self._link.longest_lag_ns)
        self._link.forget_lag()

    def state_values(self, now_ns: int, malformed: int) -> dict[str, Any]:
        """The fields of EngineState as they are now.

        Parameters
        ----------
        now_ns : int
            Since the UNIX epoch.
        malformed : int
            Messages dropped because they were none.
        """
        pipeline, link, shadow = self._pipeline, self._link, self.shadow
        counters = pipeline.counters
        return {
            "engine_epoch": self._epoch,
            "seq": self.state_seq,
            "now_ns": now_ns,
            "messages": counters["messages"],
            "signals": counters["signals"],
            "tradable": counters["tradable"],
            "lost": counters["lost"],
            "duplicates": counters["duplicates"],
            "gaps": counters["gaps"],
            "rejected": counters["rejected"] + malformed,
            "instruments": len(pipeline.names),
            "synced": pipeline.synced(),
            "latency_p50_ns": latency.quantile(link.latencies, 0.50),
            "latency_p99_ns": latency.quantile(link.latencies, 0.99),
            "code_hash": code_hash(),
            "model_hash": pipeline.trust.model_hash,
            "config_hash": config_hash(self._config),
            "feature_hash": SCHEMA_HASH,
            "mode": pipeline.trust.failover.mode,
            "shadow_state": pipeline.trust.failover.shadow,
            "transitions": pipeline.trust.failover.transitions,
            "violations": pipeline.suppressed["VALUE_CHECK"],
            "shadow_answers": pipeline.trust.shadow_answers,
            "shadow_missed": 0 if shadow is None else shadow.missed,
            "disagreements": pipeline.trust.disagreements,
            "swaps": pipeline.trust.swaps,
            "lag_ns": link.longest_lag_ns,
            "conflations": self.conflations,
            "conflating": link.conflating,
            **(dict.fromkeys(STAT_NAMES, 0.0) if shadow is None else shadow.stats),
        }

    def totals(
        self,
        values: dict[str, Any],
        recorder: Recorder | None,
        subscriber_drops: int,
        rehearsals: int,
        start_up: StartUp,
    ) -> Totals:
        """What the session did so far; ``values`` are the `state_values`."""
        path = getattr(recorder, "path", "")
        return Totals(
            seconds=(values["now_ns"] - self._epoch) / 1e9,
            messages=values["messages"],
            signals=values["signals"],
            tradable=values["tradable"],
            lost=values["lost"],
            gaps=values["gaps"],
            duplicates=values["duplicates"],
            rejected=values["rejected"],
            instruments=values["instruments"],
            synced=values["synced"],
            subscriber_drops=subscriber_drops,
            mode=MODES[values["mode"]],
            transitions=values["transitions"],
            shadow_answers=values["shadow_answers"],
            disagreements=values["disagreements"],
            swaps=values["swaps"],
            conflations=self.conflations,
            rehearsals=rehearsals,
            lag_max_ms=max(self._lag_max_ns, values["lag_ns"]) / 1e6,
            latency_p50_us=values["latency_p50_ns"] / 1e3,
            latency_p99_us=values["latency_p99_ns"] / 1e3,
            latency_max_us=latency.quantile(self._link.latencies, 1.0) / 1e3,
            collections=self.gc_pauses.collections,
            longest_gc_pause_us=self.gc_pauses.longest_ns / 1e3,
            compilations=self.compilations.count,
            compiled=self.compilations.functions,
            start_up_s=start_up.seconds,
            tape=str(path),
            tape_records=0 if recorder is None else recorder.records,
            engine_epoch=self._epoch,
            model_hash=f"{values['model_hash']:016x}",
            config_hash=f"{values['config_hash']:016x}",
            code_hash=f"{values['code_hash']:016x}",
        )

    def close(self) -> None:
        """Watch nothing any more. Closing twice is fine."""
        self.compilations.close()
