"""The reference backend: ONNX Runtime with one execution provider.

The CPU provider is tuned for one small model a tick: one intra-op thread, no spinning, both
buffers bound once, so that a call does no more than the graph's own work. On x86 without VNNI
``session.x64quantprecision=1`` makes ONNX Runtime use the integer product that cannot saturate
its 16-bit intermediate sums; without it an exact model would not be exact. What a model with state
remembers is kept in `engine.backends.onnx_streams`.

The graph's value check writes its mask into an array that is bound once, like both buffers. Its
nodes are for the CPU provider; other devices run the graph without them, and their mask is 0.

Source: ONNX Runtime documentation, "Quantize ONNX models" (x86-64 with AVX2) and "I/O binding".
"""

from __future__ import annotations

import difflib
from typing import Final, Self

import llvmlite.binding as llvm
import numpy as np
import onnxruntime as ort

from engine.backends.interface import BackendInfo
from engine.backends.onnx_streams import StatefulRunner, check_arrays
from engine.bundle import Bundle
from engine.trust import CHECK_INPUT
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
WARM_UP_RUNS: Final = 64
PROOF_SEQUENCES: Final = 3
PROOF_STEPS: Final = 64  # of each sequence: past the memory of a TCN of four dilations
MAX_IN_FLIGHT: Final = 256
MAX_THREADS: Final = 256
_ISA: Final = (
    "avx512vnni",
    "avxvnni",
    "avx512f",
    "avx2",
    "avx",
    "sse4.1",
    "i8mm",
    "dotprod",
    "neon",
)


def session_options(threads: int) -> ort.SessionOptions:
    """The options every session that serves is opened with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # a failure is raised, and said once
    options.enable_cpu_mem_arena = False  # small models: malloc is faster, by 1 to 5 % of a step
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def host_isa() -> str:
    """Widest instruction set of this CPU that matters to integer inference."""
    present = llvm.get_host_cpu_features()
    return next((name for name in _ISA if present.get(name)), "baseline")


def provider_of(device: str) -> str:
    """The execution provider of a device name, present in this ONNX Runtime.

    Raises
    ------
    InputError
        If there is no such device, or the installed ONNX Runtime was built without it.
    """
    provider = PROVIDERS.get(device)
    if provider is None:
        nearest = difflib.get_close_matches(device, PROVIDERS, n=1)
        raise InputError(
            "unknown device of the onnx backend",
            where="model.device",
            expected="one of " + ", ".join(PROVIDERS),
            found=repr(device),
            fix=f"did you mean {nearest[0]}?" if nearest else "use cpu",
        )
    available = ort.get_available_providers()
    if provider not in available:
        package = PACKAGES.get(device, "onnxruntime")
        raise InputError(
            f"this ONNX Runtime cannot run on {device}",
            where="model.device",
            expected=provider,
            found=", ".join(available),
            fix=f"use cpu, or install {package} in place of onnxruntime",
        )
    return provider


def _check_output(bundle: Bundle, device: str) -> str | None:
    return None if bundle.checks is None or device != "cpu" else bundle.checks.output


def _plain(data: bytes) -> bytes:
    """The model without its value check, whose integer operators other providers lack."""
    import onnx

    from engine.backends.qdq_graph import without_checks

    return bytes(without_checks(onnx.load_model_from_string(data)).SerializeToString())


class OnnxBackend:
    """One bundle's model in one ONNX Runtime session; see `engine.backends.interface.Backend`.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
    bundle : Bundle
    info : BackendInfo
    """

    def __init__(self, session: ort.InferenceSession, bundle: Bundle, info: BackendInfo) -> None:
        self._session: ort.InferenceSession | None = session
        self._bundle = bundle
        self._info = info
        # Other providers copy a bound input when it is bound, not when it is run.
        self._copies_input = info.device != "cpu"
        self._mask = np.zeros(1, dtype=np.int32)
        # A memoryview gives a number about three times as fast as an array does.
        self._violations = self._mask.view(np.uint32).data
        self._check_name = _check_output(bundle, info.device)
        self._misses_nan = False
        self._runner: StatefulRunner | None = None
        if bundle.state(info.precision):
            check = (self._check_name, self._mask)
            self._runner = StatefulRunner(session, bundle, info, self._copies_input, check)
        self._binding: ort.IOBinding | None = None
        self._x: np.ndarray | None = None
        self._out: np.ndarray | None = None
        self._answers = np.zeros((MAX_IN_FLIGHT, bundle.n_outputs), dtype=np.float32)
        self._slots = list(self._answers)
        self._tickets = np.zeros(MAX_IN_FLIGHT, dtype=np.int64)
        self._submitted = 0
        self._taken = 0

    @classmethod
    def open(
        cls, bundle: Bundle, device: str = "cpu", *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        """Open a bundle's model; see `Backend.open`."""
        if not 1 <= threads <= MAX_THREADS:
            raise InputError(
                "bad number of threads",
                where="model.threads",
                expected=f"1 to {MAX_THREADS}",
                found=str(threads),
            )
        provider = provider_of(device)
        data = bundle.model_bytes(precision)
        options = session_options(threads)
        if device != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            data = _plain(data)
        try:
            session = ort.InferenceSession(data, options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise InputError(
                f"ONNX Runtime cannot serve the {precision} model on {device}",
                where=str(bundle.path),
                found=str(error)[:300],
                fix="use another device, or rebuild the bundle",
            ) from None
        session.disable_fallback()
        serving = session.get_providers()
        if serving[0] != provider:
            raise InputError(
                f"ONNX Runtime fell back from {device} without saying so",
                where="model.device",
                expected=provider,
                found=", ".join(serving),
                fix="use cpu, or repair the driver of the device",
            )
        backend = cls(
            session,
            bundle,
            BackendInfo(
                name="onnx",
                device=device,
                precision=precision,
                numerics=bundle.numerics if precision == "int8" else "tolerance",
                input_shape=(1, bundle.n_features),
                input_dtype="float32",
                output_shape=(bundle.n_outputs,),
                output_dtype="float32",
                model_hash=bundle.model_hash,
                isa=host_isa(),
                threads=threads,
                library=f"onnxruntime {ort.__version__}",
            ),
        )
        backend._warm_up()
        backend._look_for_nan()
        if backend._info.numerics == "exact-int8":
            backend._prove_exact(data)
        return backend

    def _warm_up(self) -> None:
        x = np.zeros(self._info.input_shape, dtype=np.float32)
        out = np.zeros(self._info.output_shape, dtype=np.float32)
        for _ in range(WARM_UP_RUNS):
            self.infer(0, x, out)
        self._forget()

    def _look_for_nan(self) -> None:
        """Whether the graph sees a NaN on this machine; `infer` looks itself where it does not.

        The graph tells one by the code that it is quantised to, and ONNX leaves open which. On
        x86 it is the lowest; a processor that gives it the zero point would hide it.
        """
        if self._check_name is None:
            return
        x = np.zeros(self._info.input_shape, dtype=np.float32)
        out = np.zeros(self._info.output_shape, dtype=np.float32)
        x[0, -1] = np.nan
        self._misses_nan = not self.infer(0, x, out) & CHECK_INPUT
        self._forget()

    def _forget(self) -> None:
        if self._runner is not None:
            self._runner.forget()

    def _prove_exact(self, data: bytes) -> None:
        """Hold this machine's fused kernels against the graph as written, bit for bit.

        Sequences from a fresh state: the outputs of each step, and the state that it leaves.
        """
        options = session_options(1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        plain = ort.InferenceSession(data, options, providers=[PROVIDERS["cpu"]])
        tensors = self._bundle.state(self._info.precision)
        names = [self._bundle.output_name, *(tensor.output for tensor in tensors)]
        checks = [] if self._check_name is None else [self._check_name]
        rng = np.random.default_rng(0)
        clip = self._bundle.clip
        x = np.zeros(self._info.input_shape, dtype=np.float32)
        out = np.zeros(self._info.output_shape, dtype=np.float32)
        for _ in range(PROOF_SEQUENCES):
            self._forget()
            state = {tensor.input: tensor.fresh() for tensor in tensors}
            for step in range(PROOF_STEPS):
                # Saturated inputs, where narrow intermediate sums would overflow, and inputs half
                # way between two codes, where only half to even gives the same ones.
                drawn = rng.standard_normal(x.shape) * (1e6 if step % 3 == 1 else 0.3 * clip)
                if step % 3 == 2:
                    drawn = np.rint(drawn * (256.0 / clip)) * (clip / 256.0)
                x[:] = np.clip(drawn, -clip, clip)
                self.infer(0, x, out)
                feeds = {self._bundle.input_name: x, **state}
                expected, *after = plain.run([*names, *checks], feeds)
                if out.tobytes() != expected.tobytes():
                    raise self._inexact(self._bundle.output_name, expected, out)
                if checks and not np.array_equal(mask := after.pop(), self._mask):
                    raise self._inexact(checks[0], mask, self._mask)
                state = {t.input: array for t, array in zip(tensors, after, strict=True)}
                found = {} if self._runner is None else self._runner.current(0)
                for name, array in state.items():
                    if not np.array_equal(array, found[name]):
                        raise self._inexact(f"state {name}", array, found[name])
        self._forget()

    def _inexact(self, name: str, expected: np.ndarray, found: np.ndarray) -> InputError:
        differ = np.flatnonzero(expected.ravel() != found.ravel())
        at = int(differ[0]) if len(differ) else 0
        return InputError(
            "this model declares exact-int8, and is not exact on this machine",
            where=f"{self._bundle.path} on {self._info.device} ({self._info.isa}): {name}[{at}]",
            expected=f"{expected.ravel()[at]} as the unfused graph computes",
            found=str(found.ravel()[at]),
            fix="rebuild the bundle, or declare its numerics as tolerance",
        )

    def info(self) -> BackendInfo:
        """What was opened."""
        return self._info

    def _bind(self, x: np.ndarray, out: np.ndarray) -> None:
        """Let the session read from ``x`` and write to ``out`` in place; both are kept alive."""
        assert self._session is not None, "this backend is closed"
        check_arrays(self._info, x, out)
        binding = self._session.io_binding()
        binding.bind_input(
            self._bundle.input_name, "cpu", 0, np.float32, list(x.shape), x.ctypes.data
        )
        binding.bind_output(
            self._bundle.output_name, "cpu", 0, np.float32, [1, *out.shape], out.ctypes.data
        )
        if self._check_name is not None:
            binding.bind_output(self._check_name, "cpu", 0, np.int32, [1], self._mask.ctypes.data)
        self._binding, self._x, self._out = binding, x, out

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        """Run the model from ``x`` into ``out``; see `Backend.infer`."""
        # A model with state leaves `_x` and `_out` empty, so that one without pays nothing for it.
        if x is not self._x or out is not self._out or self._copies_input:
            if self._runner is not None:
                self._runner.infer(stream, x, out)
                return self._checked(x) if self._misses_nan else self._violations[0]
            self._bind(x, out)
        try:
            self._session.run_with_iobinding(self._binding)  # type: ignore[union-attr]
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise RuntimeError(f"inference failed: {error}") from None
        return self._checked(x) if self._misses_nan else self._violations[0]

    def _checked(self, x: np.ndarray) -> int:
        return self._violations[0] | (0 if np.isfinite(x).all() else CHECK_INPUT)

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        """Answer at once and keep the answer for `poll`; False where `MAX_IN_FLIGHT` wait."""
        if self._submitted - self._taken == MAX_IN_FLIGHT:
            return False
        slot = self._submitted % MAX_IN_FLIGHT
        self.infer(stream, x, self._slots[slot])
        self._tickets[slot] = ticket
        self._submitted += 1
        return True

    def poll(self, out: np.ndarray) -> int:
        """The oldest answer not yet taken; see `Backend.poll`."""
        if self._taken == self._submitted:
            return -1
        slot = self._taken % MAX_IN_FLIGHT
        out[:] = self._answers[slot]
        self._taken += 1
        return int(self._tickets[slot])

    def reset(self, stream: int) -> None:
        """Start a stream afresh; a model without state has nothing to forget."""
        if self._runner is not None:
            self._runner.reset(stream)

    def close(self) -> None:
        """Drop the session and let go of the bound arrays."""
        self._forget()
        self._session = self._binding = self._runner = self._x = self._out = None
