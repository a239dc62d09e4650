"""AMD Alveo cards through XRT: the bundle's generated circuit, linked as an XRT kernel.

The card runs an ``.xclbin``: ``octick.xclbin`` in the bundle's folder, or the file that the
environment variable ``OCTICK_XCLBIN`` names. `engine.backends.fpga.xrt_kernel` says what the
kernel in it must be. It is asked through ``pyxrt``, the Python module that comes with XRT.

Input and scores are quantised and dequantised here, on the host, by the code that all backends
share. A stream's reset goes with its next inference, so it costs nothing. XRT does not promise in
what order it runs what is queued: a model with state has one run under way at a time.

The numerics are ``exact-int8``, proven at open: accumulators and masks against the interpreter of
the integer graph, for codes at random, at both ends, and around zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NoReturn, Self

import numpy as np

from engine.backends.check_groups import input_mask
from engine.backends.ends import check_arrays
from engine.backends.fpga.xrt_kernel import (
    ANSWER_WITHIN_MS,
    RESET,
    KernelRun,
    card_address,
    find_kernel,
    find_xclbin,
    import_pyxrt,
    open_card,
)
from engine.backends.graph_reference import GraphReference
from engine.backends.integer_graph import CODE_MAX, IntegerGraph
from engine.backends.interface import BackendInfo
from engine.backends.lowering import lower_bundle
from engine.bundle import Bundle
from feeds.errors import InputError

MAX_IN_FLIGHT: Final = 16
PROOF_SEQUENCES: Final = 3
PROOF_STEPS: Final = 64  # of each stream in a sequence: past the memory of a TCN


class XrtCard:
    """One bundle's INT8 model on one card; see `engine.backends.interface.Backend`.

    A card that failed once, or did not answer in time, is not asked again: what it remembers of
    its streams is not known.

    Parameters
    ----------
    xrt : module
        ``pyxrt``.
    device : pyxrt.device
    kernel : pyxrt.kernel
    graph : IntegerGraph
    info : BackendInfo
    streams : int
        Whose state the kernel keeps; 0 for a model without state.
    """

    def __init__(
        self,
        xrt: Any,
        device: Any,
        kernel: Any,
        graph: IntegerGraph,
        info: BackendInfo,
        streams: int,
    ) -> None:
        states = xrt.ert_cmd_state
        self._complete = states.ERT_CMD_STATE_COMPLETED
        self._unfinished = (
            states.ERT_CMD_STATE_NEW,
            states.ERT_CMD_STATE_QUEUED,
            states.ERT_CMD_STATE_SUBMITTED,
        )
        self._graph = graph
        self._info = info
        self._streams = streams
        self._begun: set[int] = set()  # streams whose state the kernel has
        self._held = [device, kernel]
        self._runs = [KernelRun(xrt, device, kernel, graph) for _ in range(MAX_IN_FLIGHT + 1)]
        self._last = MAX_IN_FLIGHT  # the run behind the ring is that of `infer`
        self._tickets = [0] * MAX_IN_FLIGHT
        self._submitted = 0
        self._taken = 0
        self._failure = ""

    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        """Load the ``.xclbin`` onto a card and prove it; see `Backend.open`.

        Parameters
        ----------
        bundle : Bundle
        device : str
            ``xrt:<index>`` or ``xrt:<PCI address>``, as ``xbutil examine`` lists them.
        threads : int
            Of the host, for whatever takes over from the card.
        precision : str
            "int8".

        Raises
        ------
        InputError
            Without XRT, the card, or an ``.xclbin`` of this very model, and for a card that does
            not compute what the bundle says.
        """
        if precision != "int8":
            raise InputError(
                "the generated circuit is the INT8 model",
                where="model.precision",
                expected="int8",
                found=repr(precision),
                fix="set model.precision to int8, or use the onnx backend",
            )
        card_address(device)
        graph = lower_bundle(bundle)
        path = find_xclbin(bundle)
        backend = cls._load(bundle, device, graph, path, threads)
        try:
            backend._prove_exact(path)
        except BaseException:
            backend.close()
            raise
        return backend

    @classmethod
    def _load(
        cls, bundle: Bundle, device: str, graph: IntegerGraph, path: Path, threads: int
    ) -> Self:
        """Load the ``.xclbin``; nobody but the backend then holds anything of the card."""
        xrt = import_pyxrt()
        named = find_kernel(xrt, path, bundle.model_hash, stateful=bool(graph.state))
        card, platform = open_card(xrt, device)
        try:
            uuid = card.load_xclbin(str(path))
            # No other process on the compute unit: it holds the streams' state.
            kernel = xrt.kernel(card, uuid, named.unit, xrt.kernel.exclusive)
            info = BackendInfo(
                name="fpga",
                device=device,
                precision="int8",
                numerics="exact-int8",
                input_shape=(1, bundle.n_features),
                input_dtype="float32",
                output_shape=(bundle.n_outputs,),
                output_dtype="float32",
                model_hash=bundle.model_hash,
                isa=platform,
                threads=threads,
                library=f"pyxrt, xclbin {uuid.to_string()}",
            )
            return cls(xrt, card, kernel, graph, info, named.streams)
        except Exception as error:  # pybind11 turns C++ exceptions into several types
            raise InputError(
                "XRT cannot load the circuit onto the card",
                where=f"{path} on {device} ({platform})",
                expected=f"the compute unit {named.name}_1, which no other process uses",
                found=str(error)[:300],
                fix="link the circuit for this card's platform, and stop what else uses the card",
            ) from None

    def _prove_exact(self, path: Path) -> None:
        """Hold the card against the interpreter of the integer graph, bit for bit."""
        rng = np.random.default_rng(0)
        n, zero = self._graph.n_features, self._graph.point.zero_point
        where = f"{path} on {self._info.device}"
        streams = range(max(self._streams, 1))
        for _ in range(PROOF_SEQUENCES):
            references = [GraphReference(self._graph) for _ in streams]
            for stream in streams:
                self.reset(stream)
            for step in range(PROOF_STEPS * len(streams)):
                drawn = (
                    rng.integers(0, CODE_MAX + 1, n),
                    rng.integers(0, 2, n) * CODE_MAX,
                    np.rint(zero + 16.0 * rng.standard_normal(n)),
                )[step % 3]
                codes = np.clip(drawn, 0, CODE_MAX).astype(np.uint8)
                stream = step % len(streams)
                acc, mask = references[stream].step_codes(codes)
                expected = [*acc.tolist(), mask]
                try:
                    found = self._ask(stream, codes).tolist()
                except RuntimeError as error:
                    raise InputError(
                        "the card failed while it was tried",
                        where=where,
                        found=str(error),
                        fix="look at `xbutil examine`, and reset the card",
                    ) from None
                found[-1] &= 0xFFFF_FFFF
                if found != expected:
                    _refuse_inexact(f"{where}: step {step}", expected, found)
        for stream in streams:
            self.reset(stream)

    def info(self) -> BackendInfo:
        """What was opened."""
        return self._info

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        """One inference on the card, from ``x`` into ``out``; see `Backend.infer`.

        Raises
        ------
        InputError
            For a stream whose state the kernel cannot keep.
        RuntimeError
            If the card failed, now or before.
        """
        check_arrays(self._info, x, out)
        answer = self._ask(stream, self._graph.quantise(x[0]))
        out[:] = self._graph.dequantise(answer[:-1])
        return int(answer[-1]) & 0xFFFF_FFFF | input_mask(x, self._graph.input_limit)

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        """Start an inference; False where `MAX_IN_FLIGHT` answers are not taken yet."""
        assert x.shape == self._info.input_shape, f"shape {x.shape}"
        if self._submitted - self._taken == MAX_IN_FLIGHT:
            return False
        at = self._submitted % MAX_IN_FLIGHT
        self._start(at, stream, self._graph.quantise(x[0]))
        self._tickets[at] = ticket
        self._submitted += 1
        return True

    def poll(self, out: np.ndarray) -> int:
        """The oldest answer not yet taken; see `Backend.poll`."""
        self._check_usable()
        if self._taken == self._submitted:
            return -1
        at = self._taken % MAX_IN_FLIGHT
        run = self._runs[at]
        if run.under_way and not self._finished(run):
            return -1
        out[:] = self._graph.dequantise(run.answer[:-1])
        self._taken += 1
        return self._tickets[at]

    def reset(self, stream: int) -> None:
        """Let a stream's next inference start from its initial state."""
        self._check_stream(stream)
        self._begun.discard(stream)

    def close(self) -> None:
        """Wait for what is under way, then give the card back."""
        for run in self._runs:
            if run.under_way and not self._failure:
                try:
                    self._finish(run)
                except RuntimeError:
                    break  # nothing more will come
        self._runs.clear()  # buffers before the device that has them
        self._held.clear()

    def _ask(self, stream: int, codes: np.ndarray) -> np.ndarray:
        """One inference between codes and the kernel's answer, which the next one overwrites."""
        self._start(MAX_IN_FLIGHT, stream, codes)
        run = self._runs[MAX_IN_FLIGHT]
        self._finish(run)
        return run.answer

    def _start(self, at: int, stream: int, codes: np.ndarray) -> None:
        self._check_usable()
        self._check_stream(stream)
        flags = 0
        if self._streams:
            if self._runs[self._last].under_way:
                self._finish(self._runs[self._last])
            flags = 0 if stream in self._begun else RESET
        try:
            self._runs[at].start(stream if self._streams else 0, flags, codes)
        except Exception as error:  # pybind11 turns C++ exceptions into several types
            self._fail(f"XRT cannot start an inference: {error}")
        self._last = at
        if self._streams:
            self._begun.add(stream)

    def _finished(self, run: KernelRun) -> bool:
        """Whether a run is complete; its answer is then fetched."""
        try:
            state = run.state()
            if state in self._unfinished:
                return False
            if state == self._complete:
                run.fetch()
                return True
        except Exception as error:  # likewise
            self._fail(f"the card failed: {error}")
        self._fail(f"the card failed: {state}")

    def _finish(self, run: KernelRun) -> None:
        """Wait for a run and fetch its answer."""
        try:
            state = run.wait()
            if state == self._complete:
                run.fetch()
                return
        except Exception as error:  # likewise
            self._fail(f"the card failed: {error}")
        self._fail(f"the card failed, or took {ANSWER_WITHIN_MS} ms: {state}")

    def _fail(self, failure: str) -> NoReturn:
        self._failure = failure
        raise RuntimeError(failure) from None

    def _check_usable(self) -> None:
        assert self._runs, "this backend is closed"
        if self._failure:
            raise RuntimeError(f"{self._failure}; it is not asked again until it is opened anew")

    def _check_stream(self, stream: int) -> None:
        if self._streams and not 0 <= stream < self._streams:
            raise InputError(
                "more streams than the circuit keeps the state of",
                where=f"model.device {self._info.device}: stream {stream}",
                expected=f"0 to {self._streams - 1}",
                fix="generate and link the circuit for more streams, or follow fewer instruments",
            )


def _refuse_inexact(where: str, expected: list[int], found: list[int]) -> NoReturn:
    pairs = zip(expected, found, strict=True)
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    part = "the value check's mask" if at == len(expected) - 1 else f"the accumulator of score {at}"
    raise InputError(
        "the card does not compute what the bundle says",
        where=f"{where}, {part}",
        expected=str(expected[at]),
        found=str(found[at]),
        fix="generate the circuit from this bundle, and link it anew",
    )
