"""What a session of the daemon did."""

from __future__ import annotations

import msgspec


class Totals(msgspec.Struct):
    """What a session did, for the closing line and ``--json``.

    Attributes
    ----------
    collections : int
        Of garbage, once events were being taken; `longest_gc_pause_us` is the longest of them.
    compilations : int
        Functions that Numba compiled after READY, not those that it loaded from its cache; the
        first of them are named in `compiled`.
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
