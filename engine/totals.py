"""What a session of the daemon did."""

from __future__ import annotations

import msgspec


class Totals(msgspec.Struct):
    """What a session did, for the closing line and ``--json``."""

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
    tape: str
    tape_records: int
    engine_epoch: int
    model_hash: str
    config_hash: str
    code_hash: str
