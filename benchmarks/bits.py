"""Whether every exact backend gives the same bits, over many vectors of each architecture.

One script of hard inputs, streams and resets goes through the integer graph's reference, ONNX
Runtime with the graph as it is written and fused, and every exact backend that opens here. What
differs from the reference, in a score or in the mask of the value check, is counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks.provenance import REFERENCE, provenance
from benchmarks.untrained import make_untrained
from engine.backends.exact_proof import plain_session
from engine.backends.graph_reference import GraphReference
from engine.backends.hard_inputs import hard_inputs
from engine.backends.interface import Backend
from engine.backends.lowering import lower_bundle
from engine.backends.registry import backend_names, find_backend
from engine.bundle import Bundle, load_bundle
from feeds.errors import InputError

ARCHS: Final = ("mlp", "tcn", "lstm", "gru")
STREAMS: Final = 3
RESET_SHARE: Final = 0.01
SLOW: Final = frozenset({"fpga"})  # simulated: asked fewer vectors
Answers = tuple[np.ndarray, np.ndarray]


class Bits(msgspec.Struct, frozen=True):
    """One backend on one model: how many of ``vectors`` answers were not the reference's."""

    model: str
    backend: str
    device: str
    vectors: int
    differ: int
    reason: str = ""


class BitsBench(msgspec.Struct, frozen=True):
    """Result of ``octick bench bits``."""

    rows: tuple[Bits, ...]
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str

    @property
    def equal(self) -> bool:
        """Whether nothing differed."""
        return all(row.differ == 0 for row in self.rows)


class _Script(msgspec.Struct, frozen=True):
    x: np.ndarray
    stream: np.ndarray
    reset: np.ndarray


def bench_bits(
    vectors: int, slow_vectors: int, progress: Callable[[str, float], object]
) -> BitsBench:
    """Run the reference model and an untrained network of each architecture.

    Parameters
    ----------
    vectors, slow_vectors : int
        Of each model; of a backend that simulates.
    progress : callable
        Told what is going on, and the share that is done.
    """
    rows: list[Bits] = []
    with tempfile.TemporaryDirectory(prefix="octick-bits-") as folder:
        for i, arch in enumerate(ARCHS):
            path = REFERENCE if arch == "mlp" else make_untrained(arch, Path(folder) / arch)

            def tell(what: str, share: float, arch: str = arch, i: int = i) -> None:
                progress(f"{arch}: {what}", (i + share) / len(ARCHS))

            rows += _bits_of(load_bundle(path), arch, vectors, slow_vectors, tell)
    return BitsBench(tuple(rows), **provenance())


def _bits_of(
    bundle: Bundle,
    model: str,
    vectors: int,
    slow_vectors: int,
    tell: Callable[[str, float], None],
) -> list[Bits]:
    graph = lower_bundle(bundle)
    rng = np.random.default_rng(1)
    step = float(np.ldexp(1.0, graph.point.exponent))
    drawn = hard_inputs(rng, (1, bundle.n_features), bundle.clip, (step,))
    script = _Script(
        np.concatenate(list(islice(drawn, vectors))),
        rng.integers(STREAMS, size=vectors),
        rng.random(vectors) < RESET_SHARE,
    )
    tell("the reference", 0.0)
    references = [GraphReference(graph) for _ in range(STREAMS)]

    def ask_reference(stream: int, reset: bool, x: np.ndarray) -> tuple[np.ndarray, int]:
        if reset:
            references[stream].reset()
        return references[stream].step(x)

    expected = _answers(script, vectors, bundle, ask_reference)
    rows = []
    places = [("onnx", "unfused")] + [
        (name, device)
        for name in backend_names()
        for device in getattr(find_backend(name), "devices", tuple)()
    ]
    for i, (name, device) in enumerate(places):
        tell(f"{name} {device}", (i + 1) / (len(places) + 1))
        n = min(vectors, slow_vectors) if name in SLOW else vectors
        try:
            asked = _unfused(bundle) if device == "unfused" else _opened(bundle, name, device)
        except InputError as error:
            rows.append(Bits(model, name, device, 0, 0, str(error)))
            continue
        scores, masks = _answers(script, n, bundle, asked)
        wrong = (scores != expected[0][:n]).any(axis=1) | (masks != expected[1][:n])
        rows.append(Bits(model, name, device, n, int(wrong.sum())))
    return rows


Asked = Callable[[int, bool, np.ndarray], tuple[np.ndarray, int]]


def _answers(script: _Script, n: int, bundle: Bundle, ask: Asked) -> Answers:
    scores = np.zeros((n, bundle.n_outputs), dtype=np.float32)
    masks = np.zeros(n, dtype=np.int64)
    x = np.zeros((1, bundle.n_features), dtype=np.float32)
    for i in range(n):
        x[0] = script.x[i]
        scores[i], masks[i] = ask(int(script.stream[i]), bool(script.reset[i]), x)
    return scores, masks


def _unfused(bundle: Bundle) -> Asked:
    """ONNX Runtime with the graph as it is written."""
    session, tensors = plain_session(bundle.model_bytes("int8")), bundle.state("int8")
    names = [bundle.output_name, *(tensor.output for tensor in tensors)]
    names += [] if bundle.checks is None else [bundle.checks.output]
    fresh = {tensor.input: tensor.fresh() for tensor in tensors}
    now: dict[int, dict[str, np.ndarray]] = {}

    def ask(stream: int, reset: bool, x: np.ndarray) -> tuple[np.ndarray, int]:
        before = fresh if reset else now.get(stream, fresh)
        scores, *after = session.run(names, {bundle.input_name: x, **before})
        mask = 0 if bundle.checks is None else int(after.pop().view(np.uint32)[0])
        now[stream] = dict(zip(fresh, after, strict=True))
        return scores[0], mask

    return ask


def _opened(bundle: Bundle, name: str, device: str) -> Asked:
    """A backend, if it calls itself exact."""
    backend: Backend = find_backend(name).open(bundle, device)
    if backend.info().numerics != "exact-int8":
        raise InputError("calls itself no exact backend", where=f"{name} {device}")
    out = np.zeros(bundle.n_outputs, dtype=np.float32)

    def ask(stream: int, reset: bool, x: np.ndarray) -> tuple[np.ndarray, int]:
        if reset:
            backend.reset(stream)
        mask = backend.infer(stream, x, out)
        return out, int(mask)

    return ask


def show(result: BitsBench) -> None:
    """Print the result as a table."""
    from rich.table import Table

    from feeds.output import wide_console

    console = wide_console()
    table = Table("model", "backend", "device", "vectors", "differ", title="octick bench bits")
    reasons: dict[str, str] = {}
    for row in result.rows:
        if row.reason:
            reasons.setdefault(f"{row.backend} {row.device}", row.reason)
        else:
            cells = (f"{row.vectors:,}", f"{row.differ:,}")
            table.add_row(row.model, row.backend, row.device, *cells)
    console.print(table)
    for place, reason in reasons.items():
        console.print(f"not run: {place}: {reason}", markup=False)
    console.print(f"{result.machine['cpu']}; commit {result.commit or 'none'}, {result.date}")
