"""Figures for a Prometheus server: ``GET /metrics`` on a port of the daemon's own loop.

They are computed when asked for, on the loop and not in a thread beside it, which would take the
interpreter from the hot path for as long as it likes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from engine.trust import MODES, SHADOW_STATES
from feeds.errors import InputError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_TIMEOUT_S: Final = 5.0

_COUNTERS: Final = {
    "messages": "Market messages taken.",
    "signals": "Signals published, suppressed ones included.",
    "tradable": "Signals that nothing speaks against.",
    "lost": "Market messages lost on the way.",
    "duplicates": "Market messages seen twice.",
    "gaps": "Times that a book was lost.",
    "rejected": "Malformed messages refused.",
    "transitions": "Moves between INT8, FP32 and HALTED.",
    "violations": "Signals that the value check suppressed.",
    "shadow_answers": "Inferences that the shadow answered.",
    "shadow_missed": "Inferences that the shadow had no room for.",
    "disagreements": "Shadow answers of another class.",
    "swaps": "Models that took over.",
    "conflations": "Times that messages came too fast for a signal each.",
    "drift_alerts": "Drift alarms that began.",
}
_GAUGES: Final = {
    "instruments": "Instruments followed.",
    "synced": "Instruments with a whole book.",
    "conflating": "1 while messages come too fast for a signal each.",
    "drift": "Worst population stability index of an input: to look at, not to alarm by.",
    "drift_alarms": "Drift alarms that stand: inputs, layers, divergence.",
}


class _Collector:
    """The engine's state as metric families."""

    def __init__(self, values: Callable[[], dict[str, Any]]) -> None:
        self._values = values

    def collect(self) -> Iterator[Metric]:
        values = self._values()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"octick_{name}", text, value=values[name])
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"octick_{name}", text, value=values[name])
        yield _one_of("octick_mode", "What answers.", "mode", MODES, values["mode"])
        yield _one_of(
            "octick_shadow", "The FP32 shadow.", "state", SHADOW_STATES, values["shadow_state"]
        )
        suppressed = CounterMetricFamily(
            "octick_suppressed", "Signals by the reason against them.", labels=["reason"]
        )
        for reason, count in values["suppressed"].items():
            suppressed.add_metric([reason], count)
        yield suppressed
        latency = GaugeMetricFamily(
            "octick_latency_seconds", "Receipt to sent.", labels=["quantile"]
        )
        divergence = GaugeMetricFamily(
            "octick_divergence",
            "Greatest difference of a score, INT8 against FP32.",
            labels=["quantile"],
        )
        for quantile, key in (("0.5", "p50"), ("0.99", "p99")):
            latency.add_metric([quantile], values[f"latency_{key}_ns"] / 1e9)
            divergence.add_metric([quantile], values[f"divergence_{key}"])
        divergence.add_metric(["1"], values["divergence_max"])
        by_output = GaugeMetricFamily(
            "octick_output_divergence",
            "Difference of one score, INT8 against FP32.",
            labels=["output", "quantile"],
        )
        for output, pair in values["divergence_by_output"].items():
            for quantile, value in zip(("0.5", "0.99"), pair, strict=True):
                by_output.add_metric([output, quantile], value)
        yield by_output
        yield GaugeMetricFamily(
            "octick_lag_seconds", "Longest lag behind the market.", value=values["lag_ns"] / 1e9
        )
        yield latency
        yield divergence
        yield InfoMetricFamily(
            "octick_engine",
            "What runs.",
            value={
                name: f"{values[name]:016x}"
                for name in ("model_hash", "config_hash", "feature_hash", "code_hash")
            },
        )


def _one_of(
    name: str, text: str, label: str, options: tuple[str, ...], chosen: int
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for i, option in enumerate(options):
        family.add_metric([option], float(i == chosen))
    return family


class MetricsServer:
    """Answers ``GET /metrics`` on a running loop.

    Parameters
    ----------
    address : str
        ``host:port``.
    values : callable
        Gives the fields of EngineState, ``suppressed`` by reason, and ``divergence_by_output``:
        p50 and p99 by class.
    """

    def __init__(self, address: str, values: Callable[[], dict[str, Any]]) -> None:
        self.address = address
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(values))  # type: ignore[arg-type]
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind.

        Raises
        ------
        InputError
            If the address is taken or cannot be bound.
        """
        host, _, port = self.address.rpartition(":")
        try:
            self._server = await asyncio.start_server(self._serve, host, int(port))
        except OSError as error:
            raise InputError(
                "'metrics.address' cannot be bound", where=self.address, found=str(error)
            ) from None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_TIMEOUT_S)
            known = head.startswith((b"GET /metrics ", b"GET /metrics?", b"GET / "))
            body = generate_latest(self._registry) if known else b"see /metrics\n"
            status = "200 OK" if known else "404 Not Found"
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                + body
            )
            await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass  # whoever asked is gone, or spoke something else
        finally:
            writer.close()

    async def stop(self) -> None:
        """Close. Stopping twice is fine."""
        if self._server is not None:
            self._server.close()
            self._server = None
