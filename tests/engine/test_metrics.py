"""`GET /metrics` over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine import metrics
from engine.metrics import MetricsServer
from engine.trust import MODE_FP32, REASONS, SHADOW_LOST
from feeds import wire
from feeds.errors import InputError

WAIT_S = 10.0


def values() -> dict[str, Any]:
    """Every field of EngineState, each another number."""
    names = [name for name in wire.ENGINE_STATE_DTYPE.names or () if "padding" not in name]
    found: dict[str, Any] = {name: n for n, name in enumerate(names, start=1)}
    return found | {
        "mode": MODE_FP32,
        "shadow_state": SHADOW_LOST,
        "divergence_p50": 0.25,
        "latency_p99_ns": 1_500,
        "drift_alerts": 7,
        "drift_alarms": 3,
        "suppressed": {name: n for n, (_, name) in enumerate(REASONS)},
        "divergence_by_output": {"down": (0.25, 0.5), "up": (0.125, 1.0)},
    }


@pytest.fixture
async def server() -> AsyncIterator[MetricsServer]:
    made = MetricsServer("127.0.0.1:0", values)
    await made.start()
    yield made
    await made.stop()
    await made.stop()


def port(server: MetricsServer) -> int:
    assert server._server is not None
    number: int = server._server.sockets[0].getsockname()[1]
    return number


async def ask(server: MetricsServer, request: bytes) -> tuple[str, dict[str, str], str]:
    """Status, headers and body of an answer; the server closes behind it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    head, _, body = answer.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert len(body.encode()) == int(headers["Content-Length"])
    return status, headers, body


async def test_what_is_answered_is_what_prometheus_reads(server: MetricsServer) -> None:
    status, headers, body = await ask(server, b"GET /metrics HTTP/1.1\r\nHost: engine\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    told = values()
    for name in ("messages", "signals", "tradable", "transitions", "swaps", "shadow_missed"):
        assert samples[f"octick_{name}_total",] == told[name], name
    for name in ("instruments", "synced", "drift", "drift_alarms"):
        assert samples[f"octick_{name}",] == told[name], name
    modes = {key[1]: value for key, value in samples.items() if key[0] == "octick_mode"}
    assert modes == {"INT8": 0.0, "FP32": 1.0, "HALTED": 0.0}
    assert samples["octick_shadow", "lost"] == 1.0
    assert samples["octick_output_divergence", "down", "0.99"] == 0.5
    assert samples["octick_suppressed_total", "HALTED"] == told["suppressed"]["HALTED"]
    assert samples["octick_latency_seconds", "0.99"] == 1.5e-6
    assert samples["octick_divergence", "0.5"] == 0.25
    (info,) = (key for key in samples if key[0] == "octick_engine_info")
    assert f"{told['model_hash']:016x}" in info


async def test_a_path_that_is_not_known_is_not_found(server: MetricsServer) -> None:
    for request in (b"GET /secret HTTP/1.1\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n"):
        status, _, body = await ask(server, request)
        assert status == "HTTP/1.1 404 Not Found"
        assert "octick_" not in body


async def test_who_is_slow_or_says_too_much_is_dropped(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REQUEST_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    writer.write(b"GET /metr")
    # Others are answered meanwhile.
    status, _, _ = await ask(server, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
    writer.close()
    _, writer = await asyncio.open_connection("127.0.0.1", port(server))
    writer.close()  # without a word
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    writer.write(b"x" * 200_000)
    with contextlib.suppress(ConnectionResetError):  # it left the rest unread
        assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
    writer.close()
    status, _, _ = await ask(server, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"


async def test_an_address_that_is_taken_is_refused(server: MetricsServer) -> None:
    with pytest.raises(InputError, match=r"metrics\.address"):
        await MetricsServer(f"127.0.0.1:{port(server)}", values).start()
