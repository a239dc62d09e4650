"""The reference backend: ONNX Runtime with one execution provider.

The CPU provider is tuned for one small model a tick: one intra-op thread, no spinning, both
buffers bound once, so that a call does no more than the graph's own work; where the package brings
ONNX Runtime's C functions, a kernel makes it (`engine.backends.onnx_native`). On x86 without VNNI
``session.x64quantprecision=1`` makes ONNX Runtime use the integer product that cannot saturate
its 16-bit intermediate sums; without it an exact model would not be exact. What a model with state
remembers is kept in `engine.backends.onnx_streams`.

On ``cpu`` the graph's value check writes its mask into an array that is bound once, like both
buffers. Other devices (`engine.backends.onnx_providers`) run the model alone, and
`engine.backends.onnx_value_check` computes the same mask beside it.

Nothing is believed that was not tried: a model that declares exact-int8 opens where it gives the
bits of its graph as written, and on another device than ``cpu`` one that declares a tolerance where
it keeps it.

Source: ONNX Runtime documentation, "Quantize ONNX models" (x86-64 with AVX2) and "I/O binding".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

import llvmlite.binding as llvm
import numpy as np
import onnxruntime as ort

from engine.backends.answers import AnswerQueue
from engine.backends.ends import Ends
from engine.backends.exact_proof import plain_session
from engine.backends.hard_inputs import hard_inputs, input_steps, usual_steps
from engine.backends.interface import BackendInfo
from engine.backends.native_call import NativeModel
from engine.backends.onnx_native import NativeRunner
from engine.backends.onnx_providers import (
    PROVIDERS,
    Opened,
    device_of,
    open_native,
    open_session,
)
from engine.backends.onnx_streams import BoundEnds, GpuRunner, StatefulRunner, bind_checked
from engine.backends.onnx_value_check import ValueCheck, with_taps
from engine.backends.ort_api import OrtSession
from engine.bundle import Bundle
from engine.trust import CHECK_INPUT
from feeds.errors import InputError

WARM_UP_RUNS: Final = 64
PROOF_SEQUENCES: Final = 3
PROOF_SEQUENCES_ELSEWHERE: Final = 24  # of devices whose kernels nobody has held to the bits
PROOF_STEPS: Final = 64  # of each sequence: past the memory of a TCN of four dilations
FP32_BOUND: Final = 1e-4  # of a float score on another device, relative where it passes 1
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


def host_isa() -> str:
    """Widest instruction set of this CPU that matters to integer inference."""
    present = llvm.get_host_cpu_features()
    return next((name for name in _ISA if present.get(name)), "baseline")


def _check_output(bundle: Bundle, device: str) -> str | None:
    return None if bundle.checks is None or device != "cpu" else bundle.checks.output


def _plain(data: bytes) -> bytes:
    """The model without its value check."""
    import onnx

    from engine.backends.qdq_graph import without_checks

    return bytes(without_checks(onnx.load_model_from_string(data)).SerializeToString())


class OnnxBackend:
    """One bundle's model in one ONNX Runtime session; see `engine.backends.interface.Backend`.

    Parameters
    ----------
    opened : Opened or OrtSession
        Of the model, or of the model with taps where a value check stands beside it; an
        `OrtSession` a kernel can run as well.
    bundle : Bundle
    info : BackendInfo
    beside : (bytes, dict of str to str), optional
        The model with its value check, and its taps.
    """

    def __init__(
        self,
        opened: Opened | OrtSession,
        bundle: Bundle,
        info: BackendInfo,
        beside: tuple[bytes, dict[str, str]] | None = None,
    ) -> None:
        self._session = None if isinstance(opened, OrtSession) else opened.session
        self._bundle = bundle
        self._info = info
        self._mask = np.zeros(1, dtype=np.int32)
        # A memoryview gives a number about three times as fast as an array does.
        self._violations = self._mask.view(np.uint32).data
        self._check: ValueCheck | None = None
        self._check_outputs: dict[str, np.ndarray] = {}
        if beside is not None and bundle.checks is not None:
            assert self._session is not None
            ends = (bundle.input_name, bundle.checks.output)
            self._check = ValueCheck(*beside, self._session, ends, self._mask)
            self._check_outputs = self._check.taps
        else:
            name = _check_output(bundle, info.device)
            self._check_outputs = {} if name is None else {name: self._mask}
        self._misses_nan = False
        self._looks = self._check is not None
        self._native: NativeRunner | None = None
        self._runner: NativeRunner | StatefulRunner | GpuRunner | None = None
        device = device_of(info.device)
        if isinstance(opened, OrtSession):
            self._native = NativeRunner(opened, bundle, info, self._check_outputs)
            self._runner = self._native
        elif device.on_gpu:
            self._runner = GpuRunner(self._session, bundle, info, self._check_outputs, device.index)
        elif bundle.state(info.precision):
            self._runner = StatefulRunner(self._session, bundle, info, self._check_outputs)
        self._binding: ort.IOBinding | None = None
        self._ends = Ends(info)
        if self._runner is None:
            assert self._session is not None
            self._binding = self._session.io_binding()
            bind_checked(self._binding, self._check_outputs)
            self._ends = BoundEnds(info, bundle, [self._binding])
        self._answers = AnswerQueue(bundle.n_outputs)

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Execution providers by name, whether this ONNX Runtime has them or not."""
        return tuple(PROVIDERS)

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
        chosen = device_of(device)
        data = bundle.model_bytes(precision)
        served, beside = data, None
        if chosen.kind != "cpu" and bundle.checks is not None:
            served, taps = with_taps(_plain(data), data)
            beside = (data, taps)
        where = str(bundle.path)
        opened: Opened | OrtSession | None = None
        if chosen.kind == "cpu":
            opened = open_native(served, threads, precision, where)
        if opened is None:
            opened = open_session(served, chosen, threads, precision, where)
            opened.session.disable_fallback()
        captures = isinstance(opened, Opened) and opened.captures
        library = f"onnxruntime {ort.__version__}"
        backend = cls(
            opened,
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
                library=f"{library}, CUDA graph" if captures else library,
            ),
            beside,
        )
        backend._try_out(data, cpu=chosen.kind == "cpu")
        return backend

    def _try_out(self, data: bytes, *, cpu: bool) -> None:
        """Warm up, and prove what is promised; a device that fails at that is refused."""
        try:
            self._warm_up()
            self._look_for_nan()
            if self._info.numerics == "exact-int8":
                self._prove(data, PROOF_SEQUENCES if cpu else PROOF_SEQUENCES_ELSEWHERE)
            elif not cpu:
                self._prove(data, PROOF_SEQUENCES_ELSEWHERE)
        except RuntimeError as error:
            raise InputError(
                f"ONNX Runtime cannot run the {self._info.precision} model on {self._info.device}",
                where=str(self._bundle.path),
                found=str(error)[:300],
                fix="use another device, or repair the driver of this one",
            ) from None

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
        if self._bundle.checks is None:
            return
        x = np.zeros(self._info.input_shape, dtype=np.float32)
        out = np.zeros(self._info.output_shape, dtype=np.float32)
        x[0, -1] = np.nan
        self._misses_nan = not self.infer(0, x, out) & CHECK_INPUT
        self._looks = self._check is not None or self._misses_nan
        self._forget()

    def _forget(self) -> None:
        if self._runner is not None:
            self._runner.forget()

    def _prove(self, data: bytes, sequences: int) -> None:
        """Hold what runs here against the graph as written, on the CPU.

        Sequences from a fresh state. Where the numerics are exact, bit for bit: the outputs of
        each step, the value check, and the state that is left. Else the scores, by their bound.
        """
        plain = plain_session(data)
        bundle = self._bundle
        tensors = bundle.state(self._info.precision)
        names = [bundle.output_name, *(tensor.output for tensor in tensors)]
        checks = [] if bundle.checks is None else [bundle.checks.output]
        x = np.zeros(self._info.input_shape, dtype=np.float32)
        out = np.zeros(self._info.output_shape, dtype=np.float32)
        steps = usual_steps(bundle.clip)
        if self._info.device != "cpu":  # there it would cost an import of onnx at every start
            import onnx

            steps = input_steps(onnx.load_model_from_string(data), bundle.input_name, bundle.clip)
        # Within a tolerance a tie may fall to either side.
        exact = self._info.numerics == "exact-int8"
        rows = hard_inputs(np.random.default_rng(0), x.shape, bundle.clip, steps, ties=exact)
        for _ in range(sequences):
            self._forget()
            state = {tensor.input: tensor.fresh() for tensor in tensors}
            for _ in range(PROOF_STEPS):
                x[:] = next(rows)
                self.infer(0, x, out)
                expected, *after = plain.run([*names, *checks], {bundle.input_name: x, **state})
                mask = after.pop() if checks else self._mask
                state = {t.input: array for t, array in zip(tensors, after, strict=True)}
                if exact:
                    self._compare(expected, out, mask, state)
                else:
                    self._check_bound(expected, out)
        self._forget()

    def _compare(
        self,
        expected: np.ndarray,
        out: np.ndarray,
        mask: np.ndarray,
        state: Mapping[str, np.ndarray],
    ) -> None:
        if out.tobytes() != expected.tobytes():
            raise self._inexact(self._bundle.output_name, expected, out)
        if not np.array_equal(mask, self._mask):
            raise self._inexact("value check", mask, self._mask)
        found = {} if self._runner is None else self._runner.current(0)
        for name, array in state.items():
            if not np.array_equal(array, found[name]):
                raise self._inexact(f"state {name}", array, found[name])

    def _inexact(self, name: str, expected: np.ndarray, found: np.ndarray) -> InputError:
        differ = np.flatnonzero(expected.ravel() != found.ravel())
        at = int(differ[0]) if len(differ) else 0
        return InputError(
            "this model declares exact-int8, and is not exact on this machine",
            where=f"{self._bundle.path} on {self._info.device} ({self._info.isa}): {name}[{at}]",
            expected=f"{expected.ravel()[at]} as the unfused graph computes",
            found=str(found.ravel()[at]),
            fix="rebuild the bundle, or declare its numerics as tolerance"
            if self._info.device == "cpu"
            else "use cpu",
        )

    def _check_bound(self, expected: np.ndarray, out: np.ndarray) -> None:
        bound = self._bundle.manifest.bound
        if self._info.precision == "fp32":
            bound = FP32_BOUND * max(1.0, float(np.abs(expected).max()))
        off = float(np.abs(out - expected).max())
        if not off <= bound:  # nor is a NaN
            raise InputError(
                f"the {self._info.precision} model does not keep its tolerance on this device",
                where=f"{self._bundle.path} on {self._info.device}: {self._bundle.output_name}",
                expected=f"scores within {bound:g} of those of the graph as written",
                found=f"{off:g}",
                fix="use cpu",
            )

    def info(self) -> BackendInfo:
        """What was opened."""
        return self._info

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        """Run the model from ``x`` into ``out``; see `Backend.infer`."""
        # A runner has ends of its own and leaves these empty: without one nothing is paid for it.
        ends = self._ends
        if x is not ends.x or out is not ends.out:
            if self._runner is not None:
                self._runner.infer(stream, x, out)
                return self._checked(x) if self._looks else self._violations[0]
            assert self._session is not None, "this backend is closed"
            ends.take(x, out)
        try:
            self._session.run_with_iobinding(self._binding)  # type: ignore[union-attr]
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise RuntimeError(f"inference failed: {error}") from None
        return self._checked(x) if self._looks else self._violations[0]

    def _checked(self, x: np.ndarray) -> int:
        if self._check is not None:
            self._check.look(x)
        blind = self._misses_nan and not np.isfinite(x).all()
        return self._violations[0] | (CHECK_INPUT if blind else 0)

    def native_model(self, n_streams: int) -> NativeModel | None:
        """The model as `engine.answering.serve` calls it; None where only `infer` will do.

        Good until this backend is closed.
        """
        return None if self._native is None or self._looks else self._native.model(n_streams)

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        """Answer at once and keep the answer for `poll`; False where too many wait."""
        slot = self._answers.next_slot()
        if slot is None:
            return False
        self.infer(stream, x, slot)
        self._answers.put(ticket)
        return True

    def poll(self, out: np.ndarray) -> int:
        """The oldest answer not yet taken; see `Backend.poll`."""
        return self._answers.take(out)

    def reset(self, stream: int) -> None:
        """Start a stream afresh; a model without state has nothing to forget."""
        if self._runner is not None:
            self._runner.reset(stream)

    def close(self) -> None:
        """Drop the session and let go of the bound arrays."""
        if self._native is not None:
            self._native.close()
        else:
            self._forget()
        self._session = self._binding = self._runner = None
        self._ends = Ends(self._info)
