"""The control socket: what is a command, who may give one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from engine.config import ControlConfig, parse_config
from engine.control import Command, ControlServer, ask, make_keys
from feeds.errors import InputError

TIMEOUT_S = 10.0


class Answering:
    """A server that says of each command what it was, on a thread."""

    def __init__(self, config: ControlConfig) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.server = ControlServer(self.context, config)
        self.seen: list[Command] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            for request in self.server.poll():
                self.seen.append(request.command)
                self.server.answer(request, {"ok": True, "command": request.command.command})

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.server.close()
        self.context.term()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Answering]:
    answering = Answering(ControlConfig(endpoint=f"ipc://{tmp_path}/control"))
    yield answering
    answering.close()


def test_a_command_arrives_whole_and_is_answered_once(local: Answering) -> None:
    command = Command("swap", by="Ada", reason="better", bundle="/models/b")
    assert ask(local.server.endpoint, command, timeout_s=TIMEOUT_S) == {
        "ok": True,
        "command": "swap",
    }
    assert local.seen == [command]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "truncated"),
        (b"\xff\x00", "malformed"),
        (b'{"command": "\xff"}', "utf-8"),
        (b"[]", "object"),
        (b'{"command": "sell"}', "sell"),
        (b'{"command": "halt", "until": 5}', "until"),
        (b'{"command": "arm"}', "nobody named"),
        (b'{"command": "promote", "by": ""}', "nobody named"),
        (b'{"command": "swap", "by": "Ada"}', "no bundle named"),
        (json.dumps({"command": "arm", "by": "x" * 33}).encode(), "bad name"),
        (json.dumps({"command": "arm", "by": "Zoë"}).encode(), "bad name"),
        (json.dumps({"command": "halt", "by": "two\nlines"}).encode(), "bad name"),
    ],
)
def test_what_is_no_command_is_answered_in_one_line(
    local: Answering, body: bytes, said: str
) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(local.server.endpoint)
    socket.send(body)
    assert socket.poll(int(TIMEOUT_S * 1_000))
    answer = json.loads(socket.recv())
    socket.close()
    context.term()
    assert answer["ok"] is False
    assert said.lower() in answer["error"].lower()
    assert "\n" not in answer["error"]
    assert local.seen == []


def test_nobody_there_is_said_in_time(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no engine answered"):
        ask(f"ipc://{tmp_path}/nowhere", Command("status"), timeout_s=0.1)


def test_a_taken_endpoint_is_refused(local: Answering) -> None:
    with pytest.raises(InputError, match="taken"):
        ControlServer(local.context, ControlConfig(endpoint=local.server.endpoint))


def test_only_a_known_key_commands_behind_curve(tmp_path: Path) -> None:
    engine_public, engine_secret = make_keys(str(tmp_path / "engine"))
    ada_public, ada_secret = make_keys(str(tmp_path / "ada"))
    _, mallory_secret = make_keys(str(tmp_path / "mallory"))
    known = tmp_path / "known"
    known.mkdir()
    shutil.copy(ada_public, known / "ada.key")
    assert engine_secret.stat().st_mode & 0o077 == 0
    answering = Answering(
        ControlConfig(
            endpoint="tcp://127.0.0.1:*",
            curve_secret_key_file=str(engine_secret),
            curve_clients_folder=str(known),
        )
    )
    try:
        endpoint, key = answering.server.endpoint, str(engine_public)
        found = ask(
            endpoint,
            Command("status"),
            timeout_s=TIMEOUT_S,
            server_key_file=key,
            client_key_file=str(ada_secret),
        )
        assert found["ok"]
        for keys in (
            {"server_key_file": key, "client_key_file": str(mallory_secret)},
            {"server_key_file": key},
            {},
        ):
            with pytest.raises(InputError, match="no engine answered"):
                ask(endpoint, Command("halt"), timeout_s=0.5, **keys)
        assert [command.command for command in answering.seen] == ["status"]
    finally:
        answering.close()
    with pytest.raises(InputError, match="keys exist already"):
        make_keys(str(tmp_path / "ada"))


@pytest.mark.parametrize(
    ("section", "good"),
    [
        ('endpoint = "tcp://127.0.0.1:5558"', True),
        ('endpoint = "ipc://control"', True),
        ('endpoint = "tcp://0.0.0.0:5558"', False),
        ('endpoint = "tcp://*:5558"', False),
        ('endpoint = "tcp://0.0.0.0:5558"\ncurve_secret_key_file = "k"', False),
        (
            'endpoint = "tcp://0.0.0.0:5558"\ncurve_secret_key_file = "k"\n'
            'curve_clients_folder = "c"',
            True,
        ),
    ],
)
def test_other_machines_reach_it_only_behind_curve(section: str, good: bool) -> None:
    import tomllib

    text = f'[[instrument]]\nvenue = "sim"\nsymbol = "A"\n[control]\n{section}\n'
    if good:
        assert parse_config(tomllib.loads(text), where="test").control.endpoint
        return
    with pytest.raises(InputError, match="reached from other machines"):
        parse_config(tomllib.loads(text), where="test")
