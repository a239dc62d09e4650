"""Devices of ONNX Runtime by name, and sessions that run on nothing else.

A device is an execution provider and, where the provider has several, one of them: ``cuda``,
``cuda:1``, ``tensorrt:0``, ``openvino``, ``openvino:gpu.1``. ONNX Runtime gives every node that a
provider cannot take to the CPU and says nothing. Here that is an error: sessions are opened with
the fallback forbidden, what was assigned to whom is read back from the session, and the refusal
names the nodes.

Source: ONNX Runtime, ``onnxruntime_session_options_config_keys.h`` (``session.*``) and
``InferenceSession.get_provider_graph_assignment_info``; the documentation of the CUDA, TensorRT
and OpenVINO execution providers (their options).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final, NoReturn

import onnxruntime as ort

from engine.backends.ort_api import OrtError, OrtSession, find_api
from feeds.errors import InputError

PROVIDERS: Final = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
PACKAGES: Final = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "openvino": "onnxruntime-openvino",
}
CAPTURES: Final = {"cuda": "enable_cuda_graph", "tensorrt": "trt_cuda_graph_enable"}
MAX_GPUS: Final = 1 << 8
MAX_NAMED_NODES: Final = 3  # in an error
# Entries of the config of every session that serves.
SESSION_CONFIG: Final = {
    "session.intra_op.allow_spinning": "0",
    "session.inter_op.allow_spinning": "0",
    "session.x64quantprecision": "1",
}


@dataclass(frozen=True)
class Device:
    """One device of one execution provider.

    Attributes
    ----------
    name : str
        As in the config.
    kind : str
        A key of `PROVIDERS`.
    provider : str
        The execution provider.
    part : str
        Which of the provider's devices, in its own words: "0" or "GPU.1"; "" for cpu.
    """

    name: str
    kind: str
    provider: str
    part: str

    @property
    def on_gpu(self) -> bool:
        """Whether its memory is not the host's, so that tensors are kept there."""
        return self.kind in CAPTURES

    @property
    def index(self) -> int:
        """Number of the GPU."""
        assert self.on_gpu
        return int(self.part)

    def options(self, threads: int, precision: str, captures: bool) -> dict[str, str]:
        """The provider's options: full float32, and a CUDA graph where asked for."""
        if self.kind == "openvino":
            # ACCURACY: float32 stays float32 where the hardware would rather have bfloat16.
            options = {"device_type": self.part, "precision": "ACCURACY", "num_streams": "1"}
            return options | {"num_of_threads": str(threads)}
        if not self.on_gpu:
            return {}
        options = {"device_id": self.part, CAPTURES[self.kind]: str(int(captures))}
        if self.kind == "cuda":
            return options | {"use_tf32": "0"}  # TF32 keeps 10 of float32's 23 bits
        return options | {"trt_int8_enable": str(int(precision == "int8"))}


def device_of(name: str) -> Device:
    """The device of a name, its execution provider present in this ONNX Runtime.

    Raises
    ------
    InputError
        If there is no such device, or the installed ONNX Runtime was built without its provider.
    """
    kind, colon, part = name.partition(":")
    provider = PROVIDERS.get(kind)
    if provider is None or (colon and not part):
        nearest = difflib.get_close_matches(kind, PROVIDERS, n=1)
        raise InputError(
            "unknown device of the onnx backend",
            where="model.device",
            expected="one of " + ", ".join(PROVIDERS) + ", or one like cuda:0",
            found=repr(name),
            fix=f"did you mean {nearest[0]}?" if nearest else "use cpu",
        )
    available = ort.get_available_providers()
    if provider not in available:
        package = PACKAGES.get(kind, "onnxruntime")
        raise InputError(
            f"this ONNX Runtime cannot run on {name}",
            where="model.device",
            expected=provider,
            found=", ".join(available),
            fix=f"use cpu, or install {package} in place of onnxruntime",
        )
    return Device(name, kind, provider, _part(name, kind, part))


def _part(name: str, kind: str, part: str) -> str:
    if kind == "openvino":
        expected = _openvino_devices()
        found = (part or "cpu").upper()
        known = not expected or found in expected
    elif kind == "cpu":
        expected, found, known = ("cpu alone",), part, not part
    else:
        expected, found = (f"a number below {MAX_GPUS}",), part or "0"
        known = found.isascii() and found.isdecimal() and int(found) < MAX_GPUS
        found = str(int(found)) if known else found
    if known:
        return found
    raise InputError(
        f"{kind} has no such device",
        where="model.device",
        expected=", ".join(expected).lower(),
        found=repr(name),
        fix=f"use {kind}",
    )


def _openvino_devices() -> tuple[str, ...]:
    """What OpenVINO can run on here, in its own words; empty where its package does not say."""
    try:
        from onnxruntime.capi._pybind_state import get_available_openvino_device_ids
    except ImportError:
        return ()
    return tuple(get_available_openvino_device_ids())


def session_options(threads: int) -> ort.SessionOptions:
    """The options every session that serves is opened with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # a failure is raised, and said once
    options.enable_cpu_mem_arena = False  # small models: malloc is faster, by 1 to 5 % of a step
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    return options


@dataclass(frozen=True)
class Opened:
    """A session, and whether it replays a CUDA graph."""

    session: ort.InferenceSession
    captures: bool


def open_session(data: bytes, device: Device, threads: int, precision: str, where: str) -> Opened:
    """Open a model on a device, wholly.

    Parameters
    ----------
    data : bytes
        The ONNX model.
    device : Device
    threads : int
    precision : str
        "int8" or "fp32".
    where : str
        The bundle, for errors.

    Raises
    ------
    InputError
        If ONNX Runtime cannot serve it there, fell back from the device, or would have run a node
        elsewhere: then the node is named.
    """
    failed: Exception | None = None
    for captures in (True, False) if device.on_gpu else (False,):
        try:
            session = _session(data, device, threads, precision, captures=captures)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            failed = error
            continue
        _check_provider(session, device)
        _check_nodes(session, device, where)
        return Opened(session, captures)
    assert failed is not None
    _refuse(data, device, threads, precision, where, failed)


def open_native(data: bytes, threads: int, precision: str, where: str) -> OrtSession | None:
    """Open a model on the CPU so that a kernel can run it; None where this package cannot.

    Raises
    ------
    InputError
        If ONNX Runtime cannot serve it.
    """
    api = find_api()
    if api is None:
        return None
    try:
        return OrtSession(api, data, threads, SESSION_CONFIG)
    except OrtError as error:
        _refuse(data, device_of("cpu"), threads, precision, where, error)


def _session(
    data: bytes,
    device: Device,
    threads: int,
    precision: str,
    *,
    captures: bool = False,
    alone: bool = True,
) -> ort.InferenceSession:
    options = session_options(threads)
    if device.kind != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(alone)))
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if device.kind == "cuda":
        # It fuses no quantised layers. So constants are dequantised now, once, and not by nodes of
        # which it lacks one: DequantizeLinear of int32.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    provider = (device.provider, device.options(threads, precision, captures))
    # Else a provider that fails would be replaced by the CPU, with a word on stdout.
    return ort.InferenceSession(data, options, providers=[provider], enable_fallback=0)


def _check_provider(session: ort.InferenceSession, device: Device) -> None:
    serving = session.get_providers()
    if serving[0] != device.provider:
        raise InputError(
            f"ONNX Runtime fell back from {device.name} without saying so",
            where="model.device",
            expected=device.provider,
            found=", ".join(serving),
            fix="use cpu, or repair the driver of the device",
        )


def strays(session: ort.InferenceSession, device: Device) -> tuple[str, ...]:
    """Nodes that run elsewhere than on the device, as "name (operator)", in the session's order.

    Empty for ``cpu``, and where ONNX Runtime is too old to tell (before 1.24): then the forbidden
    fallback alone stands guard.
    """
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None or device.kind == "cpu":
        return ()
    return tuple(
        f"{node.name or 'without a name'} ({node.op_type})"
        for part in tell()
        if part.ep_name != device.provider
        for node in part.get_nodes()
    )


def _check_nodes(session: ort.InferenceSession, device: Device, where: str) -> None:
    found = strays(session, device)
    if found:
        more = len(found) - MAX_NAMED_NODES
        raise InputError(
            f"{device.name} cannot run the whole model",
            where=f"{where}: node {found[0]}",
            expected=f"every node on {device.provider}",
            found="others for "
            + ", ".join(found[:MAX_NAMED_NODES])
            + (f" and {more} more" if more > 0 else ""),
            fix="use another device or backend",
        )


def _refuse(
    data: bytes, device: Device, threads: int, precision: str, where: str, failed: Exception
) -> NoReturn:
    """Say why a session could not be opened: by the nodes that the device does not take, if so."""
    if device.kind != "cpu":
        try:
            session = _session(data, device, threads, precision, alone=False)
        except Exception:  # then it is not the fallback that was missing
            session = None
        if session is not None:
            _check_provider(session, device)
            _check_nodes(session, device, where)
    raise InputError(
        f"ONNX Runtime cannot serve the {precision} model on {device.name}",
        where=where,
        found=str(failed)[:300],
        fix="use another device, or rebuild the bundle",
    ) from None
