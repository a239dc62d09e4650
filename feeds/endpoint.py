"""ZeroMQ endpoints: what can be one, and binding with a clear word when it is taken."""

from __future__ import annotations

import os
import socket as os_socket
from typing import TYPE_CHECKING, Any, Final

from feeds.errors import InputError

if TYPE_CHECKING:
    import zmq

TRANSPORTS: Final = ("tcp", "ipc", "inproc")
MAX_IPC_PATH_BYTES: Final = 107  # sun_path of unix(7)


def check_endpoint(endpoint: str, *, key: str, where: str, binds: bool = False) -> None:
    """Refuse what ZeroMQ could not use; a wildcard is good only where ``binds``.

    Source: zmq_tcp(7), zmq_ipc(7), zmq_inproc(7).
    """
    transport, separator, rest = endpoint.partition("://")
    if not separator or transport not in TRANSPORTS or not rest or rest != rest.strip():
        fault = "a ZeroMQ endpoint: tcp://host:port, ipc://path or inproc://name"
    elif transport == "tcp":
        fault = _tcp_fault(rest, binds)
    elif transport == "ipc" and len(rest.encode()) > MAX_IPC_PATH_BYTES:
        fault = f"a socket path of at most {MAX_IPC_PATH_BYTES} bytes"
    elif rest == "*" and not binds:
        fault = "the endpoint to connect to: '*' only names one to bind"
    else:
        fault = ""
    if fault:
        raise InputError(
            f"'{key}' is no usable endpoint", where=where, expected=fault, found=repr(endpoint)
        )


def _tcp_fault(rest: str, binds: bool) -> str:
    host, _, port = rest.rpartition(":")
    if not host or any(char.isspace() for char in host):
        return "tcp://host:port"
    if not binds and "*" in (host, port):
        return "the address to connect to: '*' only names one to bind"
    if port == "*":
        return ""
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65_535):
        return "a port from 1 to 65535"
    return ""


def bind(socket: zmq.Socket[Any], endpoint: str, *, key: str) -> str:
    """Bind, and return where the socket really is; or say in one line why not.

    Parameters
    ----------
    socket : zmq.Socket
    endpoint : str
    key : str
        Config key or option that names the endpoint.

    Raises
    ------
    InputError
        If the endpoint is taken or cannot be bound. libzmq takes an ``ipc://`` path over from a
        living process without a word, so that is asked for first.
    """
    import zmq

    taken = endpoint.startswith("ipc://") and _listens(endpoint.removeprefix("ipc://"))
    try:
        if not taken:
            socket.bind(endpoint)
            return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    except zmq.ZMQError as error:
        if error.errno != zmq.EADDRINUSE:
            raise InputError(
                f"'{key}' cannot be bound",
                where=endpoint,
                found=str(error),
                fix="name an address of this machine, or a folder that can be written",
            ) from None
    raise InputError(
        f"'{key}' is taken",
        where=endpoint,
        found="another process that is bound to it",
        fix="stop that process, or name another endpoint",
    )


def _listens(path: str) -> bool:
    address = f"\0{path[1:]}" if path.startswith("@") else path
    if not path.startswith("@") and not os.path.exists(path):
        return False
    with os_socket.socket(os_socket.AF_UNIX, os_socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address)
        except OSError:
            return False
    return True


def is_local(endpoint: str) -> bool:
    """Whether only processes of this machine can reach an endpoint."""
    transport, _, rest = endpoint.partition("://")
    return transport != "tcp" or rest.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
