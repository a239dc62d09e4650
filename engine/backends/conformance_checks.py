"""The checks of the conformance suite; see `engine.backends.conformance`.

Each takes a `Subject` and returns one line about what it looked at. It raises `NotConformantError`
where the backend breaks a promise, and `NotApplicableError` where there is nothing to look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from engine.backends.conformance import (
    STEPS,
    Answers,
    NotApplicableError,
    NotConformantError,
    Subject,
    closing,
    finite,
    hold_masks,
    hold_scores,
)
from engine.backends.interface import Backend, BackendInfo
from engine.candidate import GOLDEN_NAME, check_golden
from engine.trust import CHECK_INPUT
from feeds.errors import InputError

MAX_SUBMITTED: Final = 4096  # a queue of more has no limit worth the name
POLL_TIMEOUT_S: Final = 30.0
POLL_EVERY_S: Final = 0.0002
GARBAGE: Final = (float("nan"), float("inf"), -1e30)
TICKETS: Final = (7, 0, 1 << 62, 3, 3, 2, 1 << 31, 1)
BAD_INPUTS: Final = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30)


def check_info(subject: Subject) -> str:
    """`info` says what was asked for and what the bundle is."""
    info, bundle = subject.backend.info(), subject.bundle
    if not isinstance(info, BackendInfo):
        raise NotConformantError(f"info() gives {type(info).__name__} instead of BackendInfo")
    expected = {
        "name": subject.name,
        "device": subject.device,
        "precision": "int8",
        "numerics": bundle.numerics,
        "input_shape": (1, bundle.n_features),
        "input_dtype": "float32",
        "output_shape": (bundle.n_outputs,),
        "output_dtype": "float32",
        "model_hash": bundle.model_hash,
        "threads": 1,
    }
    for key, value in expected.items():
        found = getattr(info, key)
        if found != value:
            raise NotConformantError(f"{key}: expected {value!r}, found {found!r}")
    for key in ("isa", "library"):
        if not isinstance(getattr(info, key), str) or not getattr(info, key):
            raise NotConformantError(f"{key}: expected what computes, found {getattr(info, key)!r}")
    return f"{info.numerics}, {bundle.n_features} features, {bundle.n_outputs} classes"


def check_golden_vectors(subject: Subject) -> str:
    """The bundle's own golden vectors come out."""
    if GOLDEN_NAME not in subject.bundle.manifest.files:
        raise NotApplicableError("the bundle has no golden vectors")
    try:
        check_golden(subject.bundle, subject.backend)
    except InputError as error:
        raise NotConformantError(str(error)) from None
    return GOLDEN_NAME


def check_references(subject: Subject) -> str:
    """Both references agree: else what they say of the backend means nothing."""
    if subject.reference.graph is None:
        raise NotApplicableError(f"no integer graph: {subject.reference.why_not}")
    rows = subject.vector_rows
    graph, plain = subject.expected, subject.reference.run_plain(rows)
    hold_scores(graph.scores, plain.scores, "the integer graph against the graph as written")
    hold_masks(graph.masks, plain.masks, "the integer graph against the graph as written")
    return f"{len(rows)} steps of the integer graph and of the graph as written"


def check_scores(subject: Subject) -> str:
    """Scores are the reference's."""
    found, expected = subject.answered, subject.expected
    hold_scores(found.scores, expected.scores, "scores", bound=subject.bound)
    return f"{subject.vectors} random, saturating and tie-producing inputs of one stream"


def check_masks(subject: Subject) -> str:
    """Masks of the value check are the reference's."""
    found, expected = subject.answered.masks, subject.expected.masks
    for i, mask in enumerate(found):
        if not isinstance(mask, int):
            raise NotConformantError(f"masks: row {i}: {type(mask).__name__} instead of int")
    hold_masks(found, expected, "masks")
    if subject.bundle.checks is None:
        raise NotApplicableError("the bundle has no value check, and all masks are 0")
    return f"{sum(mask != 0 for mask in expected)} of {subject.vectors} say something"


def check_bad_inputs(subject: Subject) -> str:
    """Inputs that are no number set their bit, and poison nothing.

    What a NaN becomes inside a model is left open, so a model with state need only go on with
    finite scores; other streams, and models without state, must be as if nothing had been.
    """
    backend, n = subject.backend, subject.bundle.n_features
    good = subject.rows(len(BAD_INPUTS), seed=5)
    clean = subject.run(good)
    expected = 0 if subject.bundle.checks is None else CHECK_INPUT
    (x, out), stream = subject.arrays(), subject.stream()

    def step(wanted: int, what: str) -> None:
        mask = backend.infer(stream, x, out)
        if mask & CHECK_INPUT != wanted:
            raise NotConformantError(f"{what}: mask {mask:#x}, bit 0 should be {wanted}")
        if not finite(out):
            raise NotConformantError(f"{what}: scores {out.tolist()}")

    for i, value in enumerate(BAD_INPUTS):
        x[0] = good[0]
        x[0, (0, n // 2, n - 1)[i % 3]] = value
        step(expected, f"an input of {value}")
        x[0] = good[i]
        step(0, f"the input after one of {value}")
        if not subject.bundle.state("int8"):
            hold_scores(out[None], clean.scores[i : i + 1], f"the input after one of {value}")
    hold_scores(subject.run(good).scores, clean.scores, "another stream, afterwards")
    return "NaN, both infinities and values beyond the clip"


def check_repeatable(subject: Subject) -> str:
    """The same sequence twice gives the same bits."""
    rows = subject.rows(STEPS, seed=1)
    _hold(subject.run(rows), subject.run(rows), "the second time")
    return f"{STEPS} steps, twice"


def check_streams(subject: Subject) -> str:
    """Streams that take turns are what each is alone; a reset of one leaves the others."""
    rows = [subject.rows(STEPS, seed=seed) for seed in (2, 3)]
    alone = [subject.run(part) for part in rows]
    streams, third = [subject.stream(), subject.stream()], subject.stream()
    (x, out), rng = subject.arrays(), np.random.default_rng(0)
    turns = rng.permutation(np.repeat([0, 1], STEPS)).tolist()
    scores: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    masks: tuple[list[int], list[int]] = ([], [])
    for turn in turns:
        x[0] = rows[turn][len(masks[turn])]
        masks[turn].append(subject.backend.infer(streams[turn], x, out))
        scores[turn].append(out.copy())
        if len(masks[0]) == STEPS // 2:
            subject.backend.infer(third, x, out)
            subject.backend.reset(third)
    for turn in (0, 1):
        _hold(Answers(np.array(scores[turn]), masks[turn]), alone[turn], "taking turns")
    return f"two streams of {STEPS} steps, taking turns" + _memory(subject)


def check_reset(subject: Subject) -> str:
    """A stream that is reset is a fresh one."""
    rows, stream = subject.rows(STEPS, seed=4), subject.stream()
    first = subject.run(rows, stream)
    went_on = subject.run(rows, stream)
    subject.backend.reset(stream)
    _hold(subject.run(rows, stream), first, "after a reset")
    if subject.bundle.state("int8") and went_on.scores.tobytes() == first.scores.tobytes():
        raise NotApplicableError("what the model remembers makes no difference to these inputs")
    return f"{STEPS} steps, again after a reset" + _memory(subject)


def check_early_reset(subject: Subject) -> str:
    """A stream that has not begun may be reset."""
    rows, stream = subject.rows(STEPS, seed=4), subject.unused()
    subject.backend.reset(stream)
    subject.backend.reset(stream)
    _hold(subject.run(rows, stream), subject.run(rows), "reset before its first step")
    return "reset twice before the first step"


def check_arrays(subject: Subject) -> str:
    """The same arrays each time, new ones each time, rows of larger ones: the same bits."""
    rows, backend = subject.rows(STEPS, seed=6), subject.backend
    expected = subject.run(rows)
    fresh, scores, masks = subject.stream(), [], []
    for row in rows:
        x, out = subject.arrays()
        x[0] = row
        masks.append(backend.infer(fresh, x, out))
        scores.append(out)
    _hold(Answers(np.array(scores), masks), expected, "new arrays each time")
    part, outs = subject.stream(), np.zeros((STEPS, subject.bundle.n_outputs), np.float32)
    masks = [backend.infer(part, rows[i : i + 1], outs[i]) for i in range(STEPS)]
    _hold(Answers(outs, masks), expected, "rows of larger arrays")
    return "one pair, new ones, and rows of larger ones"


def check_input_kept(subject: Subject) -> str:
    """The input is only read."""
    rows, stream = subject.rows(STEPS, seed=7), subject.stream()
    x, out = subject.arrays()
    for row in rows:
        x[0] = row
        subject.backend.infer(stream, x, out)
        if x.tobytes() != row.tobytes():
            raise NotConformantError("infer() changed its input")
        if subject.backend.submit(stream, 0, x):
            _poll(subject.backend, out)
        if x.tobytes() != row.tobytes():
            raise NotConformantError("submit() or poll() changed the input")
    return f"{STEPS} inputs after infer() and submit()"


def check_output_whole(subject: Subject) -> str:
    """Every score is written, whatever stood in the output before."""
    rows = subject.rows(STEPS, seed=8)
    expected = subject.run(rows)
    (x, out), stream = subject.arrays(), subject.stream()
    for i, row in enumerate(rows):
        x[0], out[:] = row, GARBAGE[i % len(GARBAGE)]
        subject.backend.infer(stream, x, out)
        hold_scores(out[None], expected.scores[i : i + 1], "an output full of garbage")
    stream = subject.stream()
    for i, row in enumerate(rows):
        x[0], out[:] = row, GARBAGE[i % len(GARBAGE)]
        if not subject.backend.submit(stream, i, x):
            raise NotConformantError("submit() refuses with nothing under way")
        _poll(subject.backend, out)
        hold_scores(out[None], expected.scores[i : i + 1], "poll() into an output full of garbage")
    return f"{STEPS} outputs full of NaN, infinity and numbers"


def check_queue(subject: Subject) -> str:
    """Answers come in the order of submission, each with its ticket, and -1 where there is none."""
    rows, backend, (x, out) = subject.rows(len(TICKETS), seed=9), subject.backend, subject.arrays()
    expected, stream, taken = subject.run(rows), subject.stream(), 0
    _hold_empty(backend, out, "before anything was submitted")
    for row, ticket in zip(rows, TICKETS, strict=True):
        x[0] = row
        if not backend.submit(stream, ticket, x):
            break
        taken += 1
        x[:] = 0.0  # the caller's array is its own again
    if not taken:
        raise NotConformantError("submit() refuses with nothing under way")
    for i, ticket in enumerate(TICKETS[:taken]):
        found = _poll(backend, out)
        if found != ticket:
            raise NotConformantError(f"answer {i}: expected ticket {ticket}, found {found}")
        hold_scores(out[None], expected.scores[i : i + 1], f"answer {i}")
    _hold_empty(backend, out, "after the last answer")
    return f"{taken} tickets"


def check_queue_limit(subject: Subject) -> str:
    """A full queue refuses, loses nothing, and the refused step is not taken."""
    backend, (x, out), stream = subject.backend, subject.arrays(), subject.stream()
    rows, taken = subject.rows(STEPS, seed=10), 0
    while taken < MAX_SUBMITTED:
        x[0] = rows[taken % STEPS]
        if not backend.submit(stream, taken, x):
            break
        taken += 1
    else:
        raise NotConformantError(f"submit() takes {MAX_SUBMITTED} with no answer polled: no limit")
    scores = np.zeros((taken + 1, len(out)), dtype=np.float32)
    for i in range(taken):
        _poll(backend, scores[i])
    _hold_empty(backend, out, "after the last answer")
    x[0] = rows[taken % STEPS]
    if not backend.submit(stream, 0, x):
        raise NotConformantError("submit() refuses with nothing under way")
    _poll(backend, scores[taken])
    expected = subject.run(rows[np.arange(taken + 1) % STEPS])
    hold_scores(scores, expected.scores, f"{taken} answers, and one after a refusal")
    return f"refuses at {taken}"


def check_queue_and_infer(subject: Subject) -> str:
    """Steps of one stream are taken in the order of the calls, submitted or not."""
    rows, backend, x = subject.rows(STEPS, seed=11), subject.backend, subject.arrays()[0]
    expected, stream = subject.run(rows), subject.stream()
    scores = np.zeros_like(expected.scores)
    for i in range(0, STEPS, 3):
        x[0] = rows[i]
        backend.infer(stream, x, scores[i])
        x[0] = rows[i + 1]
        if not backend.submit(stream, i, x):
            raise NotConformantError("submit() refuses with nothing under way")
        x[0] = rows[i + 2]
        backend.infer(stream, x, scores[i + 2])
        _poll(backend, scores[i + 1])
    hold_scores(scores, expected.scores, "every third step submitted")
    return f"every third of {STEPS} steps submitted, the rest in between"


def check_two_at_once(subject: Subject) -> str:
    """Two opened at once share nothing, and closing one leaves the other."""
    rows = [subject.rows(STEPS, seed=seed) for seed in (12, 13)]
    alone = [subject.run(part) for part in rows]
    try:
        other = subject.open()
    except InputError as error:
        raise NotApplicableError(f"a second one is refused: {error}") from None
    backends, stream = (subject.backend, other), subject.stream()
    (x, out), scores = subject.arrays(), np.zeros((2, STEPS, subject.bundle.n_outputs), "f4")
    with closing(other):
        for i in range(STEPS):
            for turn, backend in enumerate(backends):
                x[0] = rows[turn][i]
                backend.infer(stream, x, out)
                scores[turn, i] = out
    for turn in (0, 1):
        hold_scores(scores[turn], alone[turn].scores, "of two opened at once")
    _hold(subject.run(rows[0]), alone[0], "after the other was closed")
    return f"{STEPS} steps each, on one number of stream"


def check_reopened(subject: Subject) -> str:
    """It opens again after it was closed, fresh, with the same bits."""
    rows = subject.rows(STEPS, seed=14)
    expected, stream = subject.run(rows), subject.unused()
    subject.run(rows, stream)
    subject.release()
    for _ in range(2):
        with closing(subject.open()) as backend:
            _hold(subject.run(rows, stream, backend), expected, "opened again")
    return "closed and opened again, twice"


def check_refusals(subject: Subject) -> str:
    """What it does not have is refused in one line, and not replaced by something else."""
    subject.release()
    asked: dict[str, dict[str, object]] = {
        "the device 'no-such-device'": {"device": "no-such-device"},
        "the precision 'int4'": {"precision": "int4"},
        "0 threads": {"threads": 0},
    }
    for what, arguments in asked.items():
        try:
            backend = subject.open(**arguments)  # type: ignore[arg-type]
        except InputError as error:
            if "\n" in str(error):
                raise NotConformantError(f"{what}: refused in more than one line") from None
            continue
        except Exception as error:  # a backend under test may raise anything
            raise NotConformantError(
                f"{what}: {type(error).__name__} instead of InputError: {error}"
            ) from None
        backend.close()
        raise NotConformantError(f"{what}: opened all the same")
    try:
        backend = subject.open(precision="fp32")
    except InputError as error:
        return f"no fp32: {error.what}"
    with closing(backend):
        found = backend.info()
        if (found.precision, found.numerics) != ("fp32", "tolerance"):
            raise NotConformantError(f"fp32: opened {found.precision}, {found.numerics}")
    return "fp32 opens, and says so"


def _hold(found: Answers, expected: Answers, what: str) -> None:
    hold_scores(found.scores, expected.scores, what)
    hold_masks(found.masks, expected.masks, what)


def _memory(subject: Subject) -> str:
    return "" if subject.bundle.state("int8") else "; this model keeps no state"


def _poll(backend: Backend, out: np.ndarray) -> int:
    """The next answer's ticket; waits for a device that answers later."""
    until = time.monotonic() + POLL_TIMEOUT_S
    while True:
        ticket = backend.poll(out)
        if not isinstance(ticket, int):
            raise NotConformantError(f"poll() gives {type(ticket).__name__} instead of int")
        if ticket != -1:
            return ticket
        if time.monotonic() > until:
            raise NotConformantError(f"no answer within {POLL_TIMEOUT_S:.0f} s")
        time.sleep(POLL_EVERY_S)


def _hold_empty(backend: Backend, out: np.ndarray, what: str) -> None:
    before = out.tobytes()
    found = backend.poll(out)
    if found != -1:
        raise NotConformantError(f"poll() {what}: expected -1, found {found}")
    if out.tobytes() != before:
        raise NotConformantError(f"poll() {what}: wrote an output without an answer")


CHECKS: Final[dict[str, Callable[[Subject], str]]] = {
    "info": check_info,
    "golden vectors": check_golden_vectors,
    "references": check_references,
    "scores": check_scores,
    "masks": check_masks,
    "bad inputs": check_bad_inputs,
    "repeatable": check_repeatable,
    "streams": check_streams,
    "reset": check_reset,
    "early reset": check_early_reset,
    "arrays": check_arrays,
    "input kept": check_input_kept,
    "output whole": check_output_whole,
    "queue": check_queue,
    "queue limit": check_queue_limit,
    "queue and infer": check_queue_and_infer,
    "two at once": check_two_at_once,
    "reopened": check_reopened,
    "refusals": check_refusals,
}
