"""VOLLO cards of Myrtle.ai: the bundle's float model in bfloat16, through the vendor's runtime.

The runtime (``vollo_rt``, from the VOLLO SDK), the compiler and a licence for the card are the
card owner's; nothing of them is here. The program is ``model.vollo`` in the bundle's folder, or
the file that the environment variable ``OCTICK_VOLLO_PROGRAM`` names;
`engine.backends.fpga.vollo_program` says what it must be.

VOLLO computes the float model, so the config's ``model.precision`` has to be "fp32", and the
numerics are ``tolerance``. How far off it is gets measured at open, against ONNX Runtime on the
same FP32 model, with the bundle's golden inputs; beyond `tolerance` the card does not open.

The accelerator keeps the state of a stream in one model of the program, so there are as many
streams as models. A job starts at the next poll of the runtime, and the jobs of a model come back
in order; a reset is a job that nothing announces, done before whatever is submitted later.

The vendor allows one runtime context at a time, so one card can be open in a process: a bundle
that a card serves cannot be swapped for another on the same card.

Source: VOLLO SDK 29 documentation, "vollo_rt", and the header ``vollo-rt.h``.
"""

from __future__ import annotations

import re
import time
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, Self

import numpy as np

from engine.backends.ends import check_arrays
from engine.backends.fpga.vollo_program import (
    check_program,
    find_program,
    import_runtime,
    open_context,
    tolerance,
    trial_inputs,
)
from engine.backends.interface import Backend, BackendInfo
from engine.backends.onnx import OnnxBackend
from engine.bundle import Bundle
from engine.trust import CHECK_INPUT, CHECK_OUTPUT
from feeds.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

MAX_IN_FLIGHT: Final = 64
ANSWER_WITHIN_S: Final = 1.0  # an inference takes microseconds: beyond it, the card hangs
RESET_EVERY: Final = 32  # steps of a stream while it is measured
_DEVICE: Final = re.compile(r"vollo:(?P<index>\d+)")


class VolloCard:
    """One bundle's float model on one card; see `engine.backends.interface.Backend`.

    A card that failed once, or did not answer in time, is not asked again: what it remembers of
    its streams is not known.

    Parameters
    ----------
    context : vollo_rt.VolloRTContext
        With the program loaded.
    held : ExitStack
        Leaves the context when it is closed.
    bundle : Bundle
    info : BackendInfo
    shape : tuple of int
        Of the program's input.

    Attributes
    ----------
    difference, tolerance : float
        Greatest difference of a score from the FP32 reference, as measured at open, and what was
        let pass.
    """

    _one_open: ClassVar[bool] = False

    def __init__(
        self,
        context: Any,
        held: ExitStack,
        bundle: Bundle,
        info: BackendInfo,
        shape: tuple[int, ...],
    ) -> None:
        self.difference = self.tolerance = 0.0
        self._context = context
        self._held: ExitStack | None = held
        self._bundle = bundle
        self._info = info
        self._shape = shape
        self._streams = context.num_models() if bundle.state("fp32") else 0
        # Ticket, job and input of what is not taken yet; the runtime reads inputs until the end.
        self._waiting: deque[tuple[int, int, np.ndarray]] = deque()
        self._complete: set[int] = set()
        self._failure = ""

    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        """Load the program onto a card and measure it; see `Backend.open`.

        Parameters
        ----------
        bundle : Bundle
        device : str
            ``vollo:<index>``, in the order of the PCI addresses.
        threads : int
            Of the host, for whatever takes over from the card.
        precision : str
            "fp32".

        Raises
        ------
        InputError
            Without the runtime, the card, or a program of this very model, and where its scores
            are too far from the FP32 model's.
        """
        matched = _DEVICE.fullmatch(device)
        if matched is None:
            raise InputError(
                "not the name of a VOLLO card",
                where="model.device",
                expected="vollo:<index>, such as vollo:0",
                found=repr(device),
            )
        if precision != "fp32":
            raise InputError(
                "VOLLO computes the float model in bfloat16, not the INT8 model",
                where="model.precision",
                expected="fp32",
                found=repr(precision),
                fix="set model.precision to fp32, or use another device",
            )
        path = find_program(bundle)
        runtime, library = import_runtime()
        if VolloCard._one_open:
            raise InputError(
                "a VOLLO card is open already, and the runtime has one context a process",
                where=f"model.device {device}",
                fix="close it first, or serve from another process",
            )
        with ExitStack() as held:
            VolloCard._one_open = True
            held.callback(setattr, VolloCard, "_one_open", False)
            context, isa = open_context(held, runtime, int(matched["index"]), path)
            info = BackendInfo(
                name="fpga",
                device=device,
                precision="fp32",
                numerics="tolerance",
                input_shape=(1, bundle.n_features),
                input_dtype="float32",
                output_shape=(bundle.n_outputs,),
                output_dtype="float32",
                model_hash=bundle.model_hash,
                isa=isa,
                threads=threads,
                library=library,
            )
            shape = check_program(context, bundle, path)
            backend = cls(context, held, bundle, info, shape)
            backend._measure(path)
            backend._held = held.pop_all()
        return backend

    def _measure(self, path: Path) -> None:
        """Hold every model of the program against ONNX Runtime's answers."""
        x = trial_inputs(self._bundle)
        streams = max(self._streams, 1)
        reference = OnnxBackend.open(self._bundle, "cpu", precision="fp32")
        expected = _answers(reference, x, streams)
        self.tolerance = tolerance(self._bundle, expected)
        try:
            found = _answers(self, x, streams)
        except RuntimeError as error:
            raise InputError(
                "the card failed while it was tried",
                where=f"{path} on {self._info.device}",
                found=str(error),
                fix="see what vollo-tool says of the card",
            ) from None
        self.difference = float(np.abs(found - expected).max())
        if not self.difference <= self.tolerance:  # a NaN is beyond it
            raise InputError(
                "the card is too far from the bundle's FP32 model",
                where=f"{path} on {self._info.device}",
                expected=f"a difference of at most {self.tolerance:.3g} over {len(x)} rows",
                found=f"{self.difference:.3g}",
                fix="compile the program from this bundle's FP32 model, or use another device",
            )

    def info(self) -> BackendInfo:
        """What was opened."""
        return self._info

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        """One inference on the card, from ``x`` into ``out``; see `Backend.infer`.

        The mask is that of the FP32 graph's value check, which the host does here.

        Raises
        ------
        InputError
            For a stream whose state the program cannot keep.
        RuntimeError
            If the card failed, now or before.
        """
        check_arrays(self._info, x, out)
        job = self._add(stream, x)
        self._finish(job)
        self._take(job, out)
        if self._bundle.checks is None:
            return 0
        mask = 0 if bool((np.abs(x) <= self._bundle.clip).all()) else CHECK_INPUT
        return mask if bool(np.isfinite(out).all()) else mask | CHECK_OUTPUT

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        """Start an inference; False where `MAX_IN_FLIGHT` answers are not taken yet."""
        assert x.shape == self._info.input_shape, f"shape {x.shape}"
        if len(self._waiting) == MAX_IN_FLIGHT:
            return False
        kept = x.astype(np.float32)
        self._waiting.append((ticket, self._add(stream, kept), kept))
        return True

    def poll(self, out: np.ndarray) -> int:
        """The oldest answer not yet taken; see `Backend.poll`."""
        self._check_usable()
        if not self._waiting:
            return -1
        self._advance()
        ticket, job, _ = self._waiting[0]
        if job not in self._complete:
            return -1
        self._take(job, out)
        self._waiting.popleft()
        return ticket

    def reset(self, stream: int) -> None:
        """Start a stream afresh, after what was submitted and before what will be."""
        if self._streams:
            self._check_usable()
            self._check_stream(stream)
            # What becomes of jobs before a reset is not documented: they are let finish first.
            for _, job, _ in self._waiting:
                self._finish(job)
            try:
                self._context.add_reset_job(stream)
            except Exception as error:  # the runtime documents no type
                self._fail(f"the card failed: {error}")

    def close(self) -> None:
        """Leave the runtime's context, which gives the card back."""
        held, self._held = self._held, None
        if held is not None:
            self._context = None
            self._waiting.clear()
            held.close()

    def _add(self, stream: int, x: np.ndarray) -> int:
        """Set up a job and have it started."""
        self._check_usable()
        self._check_stream(stream)
        try:
            job = self._context.add_job_f32(x.reshape(self._shape), stream if self._streams else 0)
        except Exception as error:  # the runtime documents no type
            self._fail(f"the card failed: {error}")
        self._advance()
        return int(job)

    def _advance(self) -> None:
        """Let the runtime start what is set up, and note what is complete."""
        try:
            self._complete.update(self._context.poll())
        except Exception as error:  # likewise
            self._fail(f"the card failed: {error}")

    def _finish(self, job: int) -> None:
        """Poll until a job is complete."""
        late = time.monotonic() + ANSWER_WITHIN_S
        while job not in self._complete:
            if time.monotonic() > late:
                self._fail(f"the card took more than {ANSWER_WITHIN_S:g} s")
            self._advance()

    def _take(self, job: int, out: np.ndarray) -> None:
        self._complete.discard(job)
        try:
            scores = np.asarray(self._context.get_result(job), dtype=np.float32).reshape(-1)
        except Exception as error:  # likewise
            self._fail(f"the card failed: {error}")
        if scores.shape != out.shape:
            self._fail(f"the card answered {scores.size} numbers in place of {out.size}")
        out[:] = scores

    def _fail(self, failure: str) -> NoReturn:
        self._failure = failure
        raise RuntimeError(failure) from None

    def _check_usable(self) -> None:
        assert self._held is not None, "this backend is closed"
        if self._failure:
            raise RuntimeError(f"{self._failure}; it is not asked again until it is opened anew")

    def _check_stream(self, stream: int) -> None:
        if self._streams and not 0 <= stream < self._streams:
            raise InputError(
                "more streams than the program has models to keep the state of",
                where=f"model.device {self._info.device}: stream {stream}",
                expected=f"0 to {self._streams - 1}",
                fix="compile a program of more models, or follow fewer instruments",
            )


def _answers(backend: Backend, x: np.ndarray, streams: int) -> np.ndarray:
    """Scores of streams that take turns, each reset now and then; float64 (n, streams, classes).

    Each begins at another row, so that one that is given another's state stands out.
    """
    info = backend.info()
    row = np.zeros(info.input_shape, dtype=np.float32)
    out = np.zeros(info.output_shape, dtype=np.float32)
    found = np.zeros((len(x), streams, *info.output_shape))
    for i in range(len(x)):
        for stream in range(streams):
            if i % RESET_EVERY == 0:
                backend.reset(stream)
            row[0] = x[(i + stream) % len(x)]
            backend.infer(stream, row, out)
            found[i, stream] = out
    for stream in range(streams):
        backend.reset(stream)
    return found
