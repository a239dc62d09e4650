"""The conformance suite: whether a backend keeps what `engine.backends.interface` promises.

One suite for all backends, ours and those that third parties add by the entry point
``octick.backends``. What a model computes is held against the reference: the integer graph in
numpy where the bundle has one, else the graph as written in ONNX Runtime; bit for bit for numerics
``exact-int8``, within the bundle's bound for ``tolerance``. What a backend does with streams,
arrays and its queue is held against itself, so that one fault fails one check, not all of them.

The checks are in `engine.backends.conformance_checks`; ``octick backend check`` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from typing import Final, NamedTuple, Protocol

import msgspec
import numpy as np

from engine.backends.exact_proof import plain_session
from engine.backends.graph_reference import GraphReference
from engine.backends.hard_inputs import hard_inputs, input_steps
from engine.backends.integer_graph import IntegerGraph
from engine.backends.interface import Backend
from engine.backends.lowering import lower_bundle
from engine.backends.registry import open_backend
from engine.bundle import Bundle
from feeds.errors import InputError

VECTORS: Final = 512
STEPS: Final = 24  # of the sequences by which a backend is held against itself
MAX_DETAIL: Final = 400


class Opener(Protocol):
    """How a backend is opened: `engine.backends.registry.open_backend`, or one for tests."""

    def __call__(
        self, name: str, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Backend:
        """Find a backend and open a bundle with it."""
        ...


class CheckResult(msgspec.Struct, frozen=True):
    """What one check found.

    Attributes
    ----------
    bundle, check : str
    ok : bool
        False where it failed.
    applies : bool
        False where there was nothing to check; ``ok`` is then true.
    detail : str
        One line: what was checked, what differs, or why nothing was.
    """

    bundle: str
    check: str
    ok: bool
    applies: bool
    detail: str


class NotConformantError(Exception):
    """A check failed; the message says what was expected and what was found."""


class NotApplicableError(Exception):
    """This bundle, or this backend, has nothing that the check could look at."""


class Answers(NamedTuple):
    """What a model said, row by row.

    Attributes
    ----------
    scores : ndarray of float32, shape (n, classes)
    masks : list of int
        Of the value check.
    """

    scores: np.ndarray
    masks: list[int]


class Reference:
    """What a bundle's INT8 model must say.

    Parameters
    ----------
    bundle : Bundle

    Attributes
    ----------
    graph : IntegerGraph or None
        None where the model has none; `why_not` then says why.
    why_not : str
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._plain = plain_session(bundle.model_bytes("int8"))
        self.graph: IntegerGraph | None = None
        self.why_not = ""
        try:
            self.graph = lower_bundle(bundle)
        except InputError as error:
            self.why_not = str(error)

    def run(self, rows: np.ndarray) -> Answers:
        """The answers to rows of one stream, from a fresh state."""
        return self.run_plain(rows) if self.graph is None else self.run_graph(rows)

    def run_graph(self, rows: np.ndarray) -> Answers:
        """Those of the integer graph, in numpy."""
        assert self.graph is not None
        stream = GraphReference(self.graph)
        found = [stream.step(row) for row in rows]
        return Answers(np.array([scores for scores, _ in found]), [mask for _, mask in found])

    def run_plain(self, rows: np.ndarray) -> Answers:
        """Those of the ONNX graph as it is written, nothing fused, on the CPU."""
        bundle, tensors = self._bundle, self._bundle.state("int8")
        names = [bundle.output_name, *(tensor.output for tensor in tensors)]
        if bundle.checks is not None:
            names.append(bundle.checks.output)
        state = {tensor.input: tensor.fresh() for tensor in tensors}
        scores, masks = [], []
        for row in rows:
            out, *after = self._plain.run(names, {bundle.input_name: row[None], **state})
            mask = 0 if bundle.checks is None else int(after.pop().view(np.uint32)[0])
            state = {t.input: array for t, array in zip(tensors, after, strict=True)}
            scores.append(out[0])
            masks.append(mask)
        return Answers(np.array(scores), masks)


class Subject:
    """A backend under test, with one bundle.

    The checks share one opened backend. Each takes streams of its own numbers, so that what an
    earlier one left behind is nobody else's finding.

    Parameters
    ----------
    name, device : str
    bundle : Bundle
    opener : Opener
    vectors : int
        Inputs that are held against the reference.
    """

    def __init__(
        self, name: str, device: str, bundle: Bundle, opener: Opener, vectors: int
    ) -> None:
        import onnx

        self.name, self.device, self.bundle, self.vectors = name, device, bundle, vectors
        self.reference = Reference(bundle)
        self._opener = opener
        self._backend: Backend | None = None
        self._streams = 0  # the first is for the golden vectors
        model = onnx.load_model_from_string(bundle.model_bytes("int8"))
        self._steps = input_steps(model, bundle.input_name, bundle.clip)

    def open(self, device: str = "", *, threads: int = 1, precision: str = "int8") -> Backend:
        """Open another one."""
        device = device or self.device
        return self._opener(self.name, self.bundle, device, threads=threads, precision=precision)

    @property
    def backend(self) -> Backend:
        """The opened backend."""
        if self._backend is None:
            self._backend = self.open()
        return self._backend

    def release(self) -> None:
        """Close the backend; the next check opens it again."""
        backend, self._backend = self._backend, None
        self._streams = 0
        if backend is not None:
            backend.close()

    def stream(self) -> int:
        """A stream that no check has used, fresh."""
        self._streams += 1
        with suppress(Exception):  # a reset that fails is its own check's to say
            self.backend.reset(self._streams)
        return self._streams

    def unused(self) -> int:
        """A stream that no check has used, nor reset."""
        self._streams += 1
        return self._streams

    def rows(self, n: int, seed: int = 0) -> np.ndarray:
        """Hard inputs: ordinary, saturating, ties and their neighbours; float32 (n, features)."""
        shape = (self.bundle.n_features,)
        drawn = hard_inputs(np.random.default_rng(seed), shape, self.bundle.clip, self._steps)
        return np.array(list(islice(drawn, n)))

    @cached_property
    def vector_rows(self) -> np.ndarray:
        """The inputs that are held against the reference."""
        return self.rows(self.vectors)

    @cached_property
    def expected(self) -> Answers:
        """What the reference says of them."""
        return self.reference.run(self.vector_rows)

    @cached_property
    def answered(self) -> Answers:
        """What the backend says of them."""
        return self.run(self.vector_rows)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """A new pair of arrays for `Backend.infer`."""
        x = np.zeros((1, self.bundle.n_features), dtype=np.float32)
        return x, np.zeros(self.bundle.n_outputs, dtype=np.float32)

    def run(
        self, rows: np.ndarray, stream: int | None = None, backend: Backend | None = None
    ) -> Answers:
        """The backend's answers through one pair of arrays, from a fresh stream unless told."""
        backend = backend or self.backend
        number = self.stream() if stream is None else stream
        (x, out), scores, masks = self.arrays(), [], []
        for row in rows:
            x[0], out[:] = row, 0.0
            masks.append(backend.infer(number, x, out))
            scores.append(out.copy())
        return Answers(np.array(scores), masks)

    @property
    def bound(self) -> float:
        """How far a score may be from the reference's; 0 is bit for bit."""
        exact = self.backend.info().numerics == "exact-int8"
        return 0.0 if exact else self.bundle.manifest.bound


def hold_scores(found: np.ndarray, expected: np.ndarray, what: str, *, bound: float = 0.0) -> None:
    """Hold scores against others.

    Raises
    ------
    NotConformantError
        Naming the first that differs: by a bit where ``bound`` is 0, else by more than it.
    """
    if found.shape != expected.shape:
        raise NotConformantError(f"{what}: shape {found.shape} instead of {expected.shape}")
    if bound == 0.0:
        wrong = found.view(np.uint32) != expected.view(np.uint32)
    else:
        wrong = ~(np.abs(found.astype(np.float64) - expected) <= bound)  # a NaN is wrong
    if wrong.any():
        row, score = (int(at) for at in np.argwhere(wrong)[0])
        said = f"{expected[row, score]!s}" + (f" within {bound:.3g}" if bound else "")
        raise NotConformantError(
            f"{what}: row {row}, score {score}: expected {said}, found {found[row, score]!s};"
            f" {int(wrong.any(axis=1).sum())} rows of {len(found)} differ"
        )


def hold_masks(found: list[int], expected: list[int], what: str) -> None:
    """Hold masks against others.

    Raises
    ------
    NotConformantError
        Naming the first that differs.
    """
    for i, (mask, wanted) in enumerate(zip(found, expected, strict=True)):
        if mask != wanted:
            said = hex(mask) if isinstance(mask, int) else repr(mask)
            raise NotConformantError(f"{what}: row {i}: expected {wanted:#x}, found {said}")


def check_backend(
    name: str,
    bundle: Bundle,
    device: str,
    *,
    opener: Opener = open_backend,
    vectors: int = VECTORS,
    on_check: Callable[[str, float], None] = lambda _check, _share: None,
) -> list[CheckResult]:
    """Run every check on a backend with one bundle.

    Parameters
    ----------
    name, device : str
        As in the config.
    bundle : Bundle
    opener : Opener
    vectors : int
        Inputs that are held against the reference.
    on_check : callable
        Takes the name of the check that begins, and the share that is done, 0 to 1.

    Returns
    -------
    list of CheckResult
        In the order of `engine.backends.conformance_checks.CHECKS`, "opens" before them. A
        backend that refuses the bundle in one line has that result alone, and none that failed.
    """
    from engine.backends.conformance_checks import CHECKS

    on_check("opens", 0.0)
    subject = Subject(name, device, bundle, opener, vectors)
    said = bundle.name

    def result(check: str, verdict: Callable[[], str]) -> CheckResult:
        try:
            return CheckResult(said, check, True, True, _line(verdict()))
        except NotApplicableError as error:
            return CheckResult(said, check, True, False, _line(str(error)))
        except NotConformantError as error:
            return CheckResult(said, check, False, True, _line(str(error)))
        except Exception as error:  # a backend under test may raise anything
            return CheckResult(said, check, False, True, _line(f"{type(error).__name__}: {error}"))

    results = [result("opens", lambda: _opens(subject))]
    if results[0].ok and results[0].applies:
        for i, (check, verdict) in enumerate(CHECKS.items(), start=1):
            on_check(check, i / (len(CHECKS) + 1))
            results.append(result(check, lambda verdict=verdict: verdict(subject)))  # type: ignore[misc]
            if not results[-1].ok:
                # What the fault left behind is not to fail what comes next.
                with suppress(Exception):
                    subject.release()
    with suppress(Exception):
        subject.release()
    return results


def _opens(subject: Subject) -> str:
    try:
        info = subject.backend.info()
    except InputError as error:
        if "\n" in str(error):
            raise NotConformantError(f"a refusal of more than one line: {error}") from None
        raise NotApplicableError(f"refused: {error}") from None
    return f"{info.isa}, {info.library}"


def _line(text: str) -> str:
    """One line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_DETAIL else f"{line[:MAX_DETAIL]}…"


@contextmanager
def closing(backend: Backend) -> Iterator[Backend]:
    """Close a backend at the end."""
    try:
        yield backend
    finally:
        backend.close()


def finite(scores: np.ndarray) -> bool:
    """Whether all are finite numbers."""
    return all(math.isfinite(score) for score in scores.ravel().tolist())
