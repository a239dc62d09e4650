"""Cores that do not halt: a bound on how long an idle core may take to wake.

A core with nothing to do halts, and waking it costs what waits for it more than a message costs the
engine: on a virtual machine the host has to let the core in again. While a process holds a request
open, the idle cores of the whole machine only rest in states that they leave in time; at 0 µs
they take the first, which polls on x86. The request ends with its descriptor, also where the
process is killed. Without a cpuidle driver the kernel takes a request and nothing changes.

Source: the kernel's ``Documentation/power/pm_qos_interface.rst``,
``Documentation/admin-guide/pm/cpuidle.rst`` (``idle=poll``) and ``kernel/power/qos.c``: a request
is an s32 in µs, reading gives the least of all requests.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Final

from engine import host
from feeds.errors import InputError

DEVICE: Final = Path("dev/cpu_dma_latency")
UNBOUND_US: Final = 2_000_000_000  # what reading gives where nobody asks for anything
_REQUEST: Final = struct.Struct("=i")
_RULE: Final = 'KERNEL=="cpu_dma_latency", GROUP="octick", MODE="0660"'


class Wakefulness:
    """No idle core takes longer to wake, from `hold` to `close`; also a context manager.

    Parameters
    ----------
    latency_us : int
        In which an idle core has to be awake; below 0 nothing is asked for.
    root : Path
        Where ``dev`` is.
    """

    def __init__(self, latency_us: int, root: Path = Path("/")) -> None:
        self.latency_us: Final = latency_us
        self._root: Final = root
        self._descriptor = -1

    def hold(self) -> None:
        """Ask for it.

        Raises
        ------
        InputError
            If there is no such device, or this process may not write to it.
        """
        assert self._descriptor < 0, "held already"
        if self.latency_us < 0:
            return
        try:
            self._descriptor = os.open(self._root / DEVICE, os.O_WRONLY)
            os.write(self._descriptor, _REQUEST.pack(self.latency_us))
        except OSError as error:
            self.close()
            raise InputError(
                "how long idle cores take to wake cannot be bounded",
                where="config key 'loop.cpu_dma_latency_us'",
                expected=f"{self._root / DEVICE} that this process may write to",
                found=error.strerror or str(error),
                fix=f"{remedy(self._root)}; or set the key to -1",
            ) from None

    def close(self) -> None:
        """Take it back. Closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Wakefulness:
        self.hold()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def refusal(root: Path = Path("/")) -> str:
    """Why this process cannot ask for anything, "" where it can; it asks for nothing."""
    try:
        os.close(os.open(root / DEVICE, os.O_WRONLY))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def asked_us(root: Path = Path("/")) -> int | None:
    """The least that any process asks for, `UNBOUND_US` where none does; None: not to be read."""
    try:
        with open(root / DEVICE, "rb", buffering=0) as device:
            return int(_REQUEST.unpack(device.read(_REQUEST.size))[0])
    except (OSError, struct.error):
        return None


def cores_stay_awake(root: Path = Path("/")) -> bool:
    """Whether idle cores rest in their first state only, whoever asked for it."""
    if host.polls_by_boot(root):
        return True
    return host.idle_driver(root) not in ("", "none") and asked_us(root) == 0


def remedy(root: Path = Path("/")) -> str:
    """What gives this process the device."""
    if not os.path.exists(root / DEVICE):
        return "run it on a kernel with CONFIG_CPU_IDLE and, in a container, pass the device in"
    return f"run it as root, or as a member of a group that a udev rule names: {_RULE}"
