"""The control socket: commands to a running engine, each answered in JSON.

A ROUTER takes one JSON object a message, on ``ipc://``, on loopback, or behind CURVE (the ZeroMQ
authentication of RFC 26) for clients whose public keys lie in a folder. What a command does is the
daemon's; here it is only parsed, and answered once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from engine.config import ControlConfig
from engine.trust_events import MAX_BY
from feeds.endpoint import bind, check_endpoint
from feeds.errors import InputError

MAX_REQUEST_BYTES: Final = 1 << 16
MAX_REQUESTS_A_POLL: Final = 64
LINGER_MS: Final = 500
# Long enough for a swap, which judges the candidate first.
DEFAULT_TIMEOUT_S: Final = 120.0

CommandName = Literal[
    "status", "halt", "arm", "demote", "promote", "swap", "rollback", "recalibrate"
]
NAMED: Final = frozenset({"arm", "promote"})  # only a named person may


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request.

    Attributes
    ----------
    command : str
    by : str
        Who asks.
    reason : str
    bundle : str
        Of a swap: a folder that the engine can read.
    """

    command: CommandName
    by: str = ""
    reason: str = ""
    bundle: str = ""


class Request(NamedTuple):
    """A command and whom to answer."""

    sender: list[bytes]
    command: Command


class ControlServer:
    """The engine's end.

    Parameters
    ----------
    context : zmq.Context
    config : ControlConfig
        With an endpoint.

    Attributes
    ----------
    endpoint : str
        Where it is bound.
    """

    def __init__(self, context: zmq.Context[Any], config: ControlConfig) -> None:
        self._gate: ThreadAuthenticator | None = None
        if config.curve_secret_key_file:
            if not Path(config.curve_clients_folder).is_dir():
                raise InputError(
                    "no keys of clients",
                    where="config key 'control.curve_clients_folder'",
                    expected="a folder of their public keys",
                    found=repr(config.curve_clients_folder),
                )
            self._gate = ThreadAuthenticator(context)
            self._gate.start()
            self._gate.configure_curve(domain="*", location=config.curve_clients_folder)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        if config.curve_secret_key_file:
            public, secret = load_keys(config.curve_secret_key_file)
            self._socket.curve_server = True
            self._socket.curve_publickey, self._socket.curve_secretkey = public, secret
        try:
            self.endpoint = bind(self._socket, config.endpoint, key="control.endpoint")
        except InputError:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """File descriptor for an event loop; edge-triggered."""
        return int(self._socket.getsockopt(zmq.FD))

    def poll(self) -> list[Request]:
        """Commands that have come; what is none is answered here."""
        found: list[Request] = []
        for _ in range(MAX_REQUESTS_A_POLL):
            try:
                *sender, body = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                command = msgspec.json.decode(body, type=Command)
                _check(command)
            except (msgspec.DecodeError, UnicodeDecodeError, InputError) as error:
                self.answer(Request(sender, Command("status")), {"ok": False, "error": str(error)})
                continue
            found.append(Request(sender, command))
        return found

    def answer(self, request: Request, values: dict[str, Any]) -> None:
        """Answer a request; one whose sender is gone is dropped."""
        try:
            body = msgspec.json.encode(values)
            self._socket.send_multipart([*request.sender, body], zmq.NOBLOCK)
        except zmq.ZMQError:
            pass

    def close(self) -> None:
        """Close the socket. Closing twice is fine."""
        self._socket.close()
        if self._gate is not None:
            self._gate.stop()
            self._gate = None


def _check(command: Command) -> None:
    where = f"command {command.command}"
    if command.command in NAMED and not command.by:
        raise InputError("nobody named", where=where, expected="by: a person's name")
    if len(command.by) > MAX_BY or not command.by.isascii() or not command.by.isprintable():
        if command.by:
            expected = f"at most {MAX_BY} printable ASCII characters"
            raise InputError("bad name", where=where, expected=expected, found=repr(command.by))
    if command.command == "swap" and not command.bundle:
        raise InputError("no bundle named", where=where, expected="bundle: a folder")


def load_keys(path: str) -> tuple[bytes, bytes]:
    """Public and secret key of a CURVE certificate file, as ``zmq.auth`` writes it.

    Raises
    ------
    InputError
        If it cannot be read or holds no secret key.
    """
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise InputError(
            "CURVE key cannot be read",
            where=path,
            found=str(error),
            fix="make a pair with 'octick control keys FOLDER'",
        ) from None
    if secret is None:
        raise InputError("no secret key", where=path, expected="a .key_secret file")
    return public, secret


def ask(
    endpoint: str,
    command: Command,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    server_key_file: str = "",
    client_key_file: str = "",
) -> dict[str, Any]:
    """Send one command to an engine, and wait for the answer.

    Raises
    ------
    InputError
        If no engine answers there in time.
    """
    check_endpoint(endpoint, key="endpoint", where="octick control")
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        if server_key_file:
            server_public, _ = zmq.auth.load_certificate(server_key_file)
            socket.curve_publickey, socket.curve_secretkey = (
                load_keys(client_key_file) if client_key_file else zmq.curve_keypair()
            )
            socket.curve_serverkey = server_public
        socket.connect(endpoint)
        socket.send(msgspec.json.encode(command))
        if not socket.poll(int(timeout_s * 1000)):
            raise InputError(
                "no engine answered",
                where=endpoint,
                expected=f"an answer within {timeout_s:g} s",
                fix="check control.endpoint in the engine's config, and that it runs",
            )
        answer: dict[str, Any] = msgspec.json.decode(socket.recv())
        return answer
    except (OSError, zmq.ZMQError) as error:
        raise InputError("cannot reach the engine", where=endpoint, found=str(error)) from None
    finally:
        socket.close()
        context.term()


def make_keys(folder: str) -> tuple[Path, Path]:
    """A new CURVE pair: ``engine.key`` to hand out, ``engine.key_secret`` to keep."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if (target / "engine.key_secret").exists():
        raise InputError("keys exist already", where=str(target), fix="name another folder")
    public, secret = zmq.auth.create_certificates(folder, "engine")
    Path(secret).chmod(0o600)
    return Path(public), Path(secret)
