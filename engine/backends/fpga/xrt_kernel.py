"""The generated circuit as an XRT kernel: how it is named, what it is given, what it answers.

The kernel is called ``octick_<model hash>``, in 16 hex digits, and
``octick_<model hash>_<n>_streams`` where the model has state: it then keeps the state of ``n``
streams itself. So an ``.xclbin`` of another model is refused before it is loaded. The kernel is
XRT-managed, sequential (``ap_ctrl_hs``), and has one compute unit, ``<kernel>_1``. Its arguments:

===  ==========  ==================================================================
0    ``stream``  int32: whose state is read and written; 0 for a model without
1    ``flags``   int32: bit 0 (`RESET`), start the stream from its initial state
2    ``codes``   read: uint8 (features,), the quantised input
3    ``answer``  written: int32 (classes + 1,), the accumulators of the scores, and
                 last the mask of the value check without the check of the input
===  ==========  ==================================================================

These are the ports of the top module of `engine.backends.fpga.rtl`: ``codes`` its ``in_data``,
`RESET` its ``in_reset``, ``answer`` its ``out_data`` with ``out_violations`` behind it. The kernel
around it moves them between AXI and the module, and has one such module for each stream. A stream
whose first inference comes without `RESET` has whatever state an earlier process left.

Source: XRT documentation, "XRT Native APIs", "XRT Controlled Kernel Execution Models" and
``pyxrt``; AMD UG1393, "Control Requirements for XRT-Managed Kernels".
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from engine.backends.integer_graph import IntegerGraph
from engine.bundle import Bundle
from feeds.errors import InputError

XCLBIN_NAME: Final = "octick.xclbin"
XCLBIN_VARIABLE: Final = "OCTICK_XCLBIN"
ARGUMENTS: Final = 4
ARG_STREAM, ARG_FLAGS, ARG_CODES, ARG_ANSWER = range(ARGUMENTS)
RESET: Final = 1
ANSWER_WITHIN_MS: Final = 1_000  # an inference takes microseconds: beyond it, the card hangs
_HEX: Final = "[0-9a-fA-F]"
_DEVICE: Final = re.compile(
    rf"xrt:(?:(?P<index>\d+)|(?P<bdf>(?:{_HEX}{{4}}:)?{_HEX}{{2}}:{_HEX}{{2}}\.[0-7]))"
)
_NAME: Final = re.compile(r"octick_(?P<model>[0-9a-f]{16})(?:_(?P<streams>[1-9]\d*)_streams)?")


class KernelName(NamedTuple):
    """What an ``.xclbin`` says of its kernel.

    Attributes
    ----------
    name : str
    streams : int
        Whose state it keeps; 0 for a model without state.
    """

    name: str
    streams: int

    @property
    def unit(self) -> str:
        """The kernel's one compute unit, as `pyxrt.kernel` takes it."""
        return f"{self.name}:{{{self.name}_1}}"


def import_pyxrt() -> Any:
    """XRT's Python module.

    Raises
    ------
    InputError
        If XRT is not installed, or not for this Python.
    """
    try:
        return import_module("pyxrt")
    except ImportError as error:
        raise InputError(
            "the XRT runtime is not here",
            where="model.device",
            expected="the Python module pyxrt, for this Python",
            found=str(error),
            fix="install AMD's XRT for the card and source its setup.sh, or use another device",
        ) from None


def find_xclbin(bundle: Bundle) -> Path:
    """The ``.xclbin`` to load: `XCLBIN_NAME` in the bundle, or what `XCLBIN_VARIABLE` names.

    Raises
    ------
    InputError
        If there is no such file.
    """
    named = os.environ.get(XCLBIN_VARIABLE, "")
    path = Path(named) if named else bundle.path / XCLBIN_NAME
    if not path.is_file():
        raise InputError(
            "no circuit for the card",
            where=f"{XCLBIN_VARIABLE}={named}" if named else str(path),
            expected="an .xclbin linked from this bundle's generated SystemVerilog",
            found="no such file",
            fix=f"put it there, or name it in {XCLBIN_VARIABLE}",
        )
    return path


def card_address(device: str) -> int | str:
    """What XRT calls a card by: its index or its PCI address.

    Raises
    ------
    InputError
        If ``device`` is neither ``xrt:<index>`` nor ``xrt:<PCI address>``.
    """
    matched = _DEVICE.fullmatch(device)
    if matched is None:
        raise InputError(
            "not the name of an XRT card",
            where="model.device",
            expected="xrt:<index> or xrt:<PCI address>, such as xrt:0 or xrt:0000:65:00.1",
            found=repr(device),
            fix="take it from `xbutil examine`",
        )
    return matched["bdf"] or int(matched["index"])


def open_card(xrt: Any, device: str) -> tuple[Any, str]:
    """A card by the device's name, and what XRT calls its platform.

    Raises
    ------
    InputError
        If XRT opens no such card.
    """
    address = card_address(device)
    try:
        card = xrt.device(address)
        return card, str(card.get_info(xrt.xrt_info_device.name))
    except Exception as error:  # pybind11 turns C++ exceptions into several types
        raise InputError(
            "XRT opens no such card",
            where=f"model.device {device}",
            expected="a card that `xbutil examine` lists",
            found=str(error)[:300],
            fix="correct model.device, or see to the card's driver",
        ) from None


def find_kernel(xrt: Any, path: Path, model_hash: int, *, stateful: bool) -> KernelName:
    """The kernel of a model in an ``.xclbin``, which is not loaded for it.

    Parameters
    ----------
    xrt : module
        ``pyxrt``.
    path : Path
    model_hash : int
        As in the bundle's manifest.
    stateful : bool
        Whether the model has state.

    Raises
    ------
    InputError
        If XRT cannot read the file, or its kernels are of other models.
    """
    try:
        kernels = xrt.xclbin(str(path)).get_kernels()
        found = {kernel.get_name(): int(kernel.get_num_args()) for kernel in kernels}
    except Exception as error:  # pybind11 turns C++ exceptions into several types
        raise InputError(
            "XRT cannot read the .xclbin",
            where=str(path),
            found=str(error)[:300],
            fix="copy the file again, or link the circuit anew",
        ) from None
    for name, arguments in found.items():
        matched = _NAME.fullmatch(name)
        if matched is None or int(matched["model"], 16) != model_hash or arguments != ARGUMENTS:
            continue
        streams = int(matched["streams"] or 0)
        if bool(streams) == stateful:
            return KernelName(name, streams)
    expected = f"octick_{model_hash:016x}" + ("_<n>_streams" if stateful else "")
    listed = [f"{name} of {arguments} arguments" for name, arguments in found.items()]
    raise InputError(
        "the .xclbin is not of this model",
        where=str(path),
        expected=f"a kernel {expected} of {ARGUMENTS} arguments",
        found=", ".join(listed) or "no kernel",
        fix="generate the circuit from this bundle, and link it anew",
    )


class KernelRun:
    """One run of the kernel with its two buffers, made once and started again and again.

    Its methods pass on what XRT raises.

    Parameters
    ----------
    xrt : module
        ``pyxrt``.
    device : pyxrt.device
    kernel : pyxrt.kernel
    graph : IntegerGraph

    Attributes
    ----------
    answer : ndarray of int32, shape (classes + 1,)
        The host's view of the answer; valid while nothing is under way.
    under_way : bool
    """

    def __init__(self, xrt: Any, device: Any, kernel: Any, graph: IntegerGraph) -> None:
        self._to = xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE
        self._from = xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE
        n, words = graph.n_features, graph.n_outputs + 1
        # The views do not keep the buffers alive; this object keeps both.
        self._read = xrt.bo(device, n, xrt.bo.normal, kernel.group_id(ARG_CODES))
        self._written = xrt.bo(device, 4 * words, xrt.bo.normal, kernel.group_id(ARG_ANSWER))
        self._codes = np.frombuffer(self._read.map(), np.uint8, n)
        self.answer = np.frombuffer(self._written.map(), np.int32, words)
        self._run = xrt.run(kernel)
        self._run.set_arg(ARG_CODES, self._read)
        self._run.set_arg(ARG_ANSWER, self._written)
        self.under_way = False

    def start(self, stream: int, flags: int, codes: np.ndarray) -> None:
        """Send the codes and start; returns at once."""
        self._codes[:] = codes
        self._read.sync(self._to, self._codes.nbytes, 0)
        self._run.set_arg(ARG_STREAM, stream)
        self._run.set_arg(ARG_FLAGS, flags)
        self._run.start()
        self.under_way = True

    def state(self) -> Any:
        """Where it stands, a `pyxrt.ert_cmd_state`; does not wait."""
        return self._run.state()

    def wait(self) -> Any:
        """Where it stands when it is done, or after `ANSWER_WITHIN_MS`."""
        return self._run.wait(ANSWER_WITHIN_MS)

    def fetch(self) -> None:
        """Bring the answer of a run that is complete into ``answer``."""
        self._written.sync(self._from, self.answer.nbytes, 0)
        self.under_way = False
