"""Verification of a bundle in three levels: operator, subgraph, system.

Operator: every node of the quantised graph against the integer reference (exact-int8) or ONNX's
own reference evaluator (tolerance), PyTorch against ONNX Runtime, optimised against unoptimised
graph, one thread against two, research graphs against step graphs, golden vectors. Subgraph: each
block, INT8 against FP32, as a signal-to-quantisation-noise ratio. System: the bundle in the real
pipeline over a tape (`models.verify_system`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import msgspec
import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort

from engine.backends.exactness import prove_exact
from engine.backends.integer_reference import IntegerReference
from engine.backends.onnx_providers import session_options
from engine.backends.qdq_graph import without_checks
from engine.bundle import Bundle, check_files
from feeds.errors import InputError
from models.dataset import Normalisation
from models.execute import scores_of
from models.export import FEATURES_NAME, GOLDEN_NAME, RESEARCH_FP32_NAME, RESEARCH_INT8_NAME
from models.numerics import FLOAT, SchemeNumerics
from models.source import SOURCE_NAME, Source, load_source
from models.step_graph import INPUT_NAME, OUTPUT_NAME
from models.step_session import StepSession, watched

FP32_BOUND: Final = 1e-5  # relative to the greatest score, where that is above 1
MIN_SQNR_DB: Final = 10.0
NODE_ROWS: Final = 32
VECTORS: Final = 400
SUBGRAPH_ROWS: Final = 400
RESEARCH_ROWS: Final = 200
EVALUATED_OPSET: Final = 19  # older quantising operators are not in the evaluator
NODE_CODE_STEPS: Final = 1  # free scales: a uint8 code may fall to either side of a tie
BOUND_MARGIN: Final = 1.5
Level = Literal["operator", "subgraph", "system"]


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at: ``value`` must stay within ``limit``, as ``detail`` says."""

    level: Level
    name: str
    ok: bool
    value: float
    limit: float
    detail: str


class Verification(msgspec.Struct, frozen=True):
    """What was found.

    Attributes
    ----------
    bundle, model_hash, numerics : str
    ok : bool
        Whether every check holds.
    checks : tuple of Check
    sqnr_db : dict of str to float
        Of each block; infinite where the twins are equal is left out.
    bound : float
        Greatest difference of a score between optimisation levels, threads and frameworks.
    system : dict
        Signals, agreement, accuracy, digest, latency; empty without a tape.
    """

    bundle: str
    model_hash: str
    numerics: str
    ok: bool
    checks: tuple[Check, ...]
    sqnr_db: dict[str, float]
    bound: float
    system: dict[str, Any]


def hard_rows(n_features: int, clip: float, n: int, seed: int = 0) -> np.ndarray:
    """Ordinary, saturating and tie-producing inputs, float32 of shape (n, features).

    Of every four rows one is drawn normal, one saturates everywhere, one lies on the half steps
    between input codes, and one mixes tiny and huge values.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n_features))
    x[1::4] = np.where(rng.random(x[1::4].shape) < 0.5, -clip, clip)
    steps = 128.0 / clip
    x[2::4] = (np.rint(x[2::4] * steps) + 0.5) / steps
    x[3::4] *= rng.choice([1e-3, 1.0, 30.0], size=x[3::4].shape)
    return np.clip(x, -clip, clip).astype(np.float32)


class Checks:
    """Collects checks of one level after the other."""

    def __init__(self) -> None:
        self.all: list[Check] = []

    def add(self, level: Level, name: str, value: float, limit: float, detail: str) -> None:
        """A check that holds if ``value <= limit``."""
        ok = bool(value <= limit)  # a NaN fails
        self.all.append(Check(level, name, ok, float(value), float(limit), detail))

    def at_least(self, level: Level, name: str, value: float, limit: float, detail: str) -> None:
        """A check that holds if ``value >= limit``."""
        ok = bool(value >= limit)
        self.all.append(Check(level, name, ok, float(value), float(limit), detail))


def greatest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays of one shape; infinite where one is NaN and the other not."""
    if a.tobytes() == b.tobytes():
        return 0.0
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


def vectors_of(rows: np.ndarray, clip: float, n: int) -> np.ndarray:
    """n inputs: live rows, as many as there are up to a half, and hard ones."""
    live = rows[: n // 2]
    return np.concatenate([live, hard_rows(rows.shape[1], clip, n - len(live))])


def verify_operators(
    bundle: Bundle, rows: np.ndarray, checks: Checks, vectors: int = VECTORS
) -> float:
    """First level; returns the greatest difference of an INT8 score that was seen.

    Parameters
    ----------
    bundle : Bundle
    rows : ndarray of float32, shape (n, features)
        A stretch of live inputs; hard ones of our own are added.
    vectors : int
        Inputs in all.
    """
    exact = bundle.numerics == "exact-int8"
    int8 = onnx.load_from_string(bundle.model_bytes("int8"))
    fp32 = onnx.load_from_string(bundle.model_bytes("fp32"))
    x = vectors_of(rows, bundle.clip, vectors)
    limit = 0.0 if exact else bundle.manifest.bound
    plain = StepSession(int8, bundle.state("int8"), optimise=False).run(x)
    seen = 0.0
    for name, session in (
        ("optimised graph", StepSession(int8, bundle.state("int8"))),
        ("two threads", StepSession(int8, bundle.state("int8"), threads=2)),
    ):
        found = greatest_difference(session.run(x), plain)
        seen = max(seen, found)
        checks.add(
            "operator",
            f"{name} against the graph as written",
            found,
            limit,
            f"greatest difference of a score over {len(x)} rows",
        )
    if exact:
        _check_reference(bundle, int8, x, plain, checks)
    else:
        _check_evaluator(bundle, int8, x[-NODE_ROWS:], checks)
    seen = max(seen, _check_pytorch(bundle, fp32, x, plain, limit, checks))
    _check_research(bundle, rows, checks)
    _check_golden(bundle, limit, checks)
    return seen


def _check_reference(
    bundle: Bundle, int8: onnx.ModelProto, x: np.ndarray, plain: np.ndarray, checks: Checks
) -> None:
    """The proof, then node after node, then scores, against the integer reference."""
    data, state = bundle.model_bytes("int8"), bundle.state("int8")
    try:
        bounds = prove_exact(int8, state)
        tightest = max(bounds, key=lambda item: item.bound)
        checks.add(
            "operator",
            "sums within 2**24",
            float(tightest.bound),
            float(1 << 24),
            f"greatest, at node {tightest.name}",
        )
    except InputError as error:
        checks.add("operator", "sums within 2**24", np.inf, 1 << 24, str(error))
        return
    reference = IntegerReference(data, state)
    names = [
        output
        for node in without_checks(int8).graph.node
        if node.op_type != "DequantizeLinear"
        for output in node.output
        if output not in {item.output for item in state} | {OUTPUT_NAME}
    ]
    session = StepSession(int8, state, optimise=False, watch=names)
    now, differing = reference.fresh_state(), []
    hard = np.concatenate([x[: NODE_ROWS // 2], x[-NODE_ROWS // 2 :]])
    for row in hard:
        expected = reference.tensors(row, now)
        _, now = reference.step(row, now)
        found = session.step(row)[1:]
        differing += [
            name
            for name, array in zip(names, found, strict=True)
            if not np.array_equal(array, expected[name])  # a zero may have either sign inside
        ]
    checks.add(
        "operator",
        "every node against the integer reference",
        len(differing),
        0,
        f"tensors that differ of {len(names)} over {len(hard)} rows"
        + (f", first {differing[0]}" if differing else ""),
    )
    wrong = int((reference.run(x) != plain).any(axis=1).sum())
    checks.add(
        "operator",
        "scores against the integer reference",
        wrong,
        0,
        f"rows that differ of {len(x)}",
    )


def _check_evaluator(bundle: Bundle, int8: onnx.ModelProto, x: np.ndarray, checks: Checks) -> None:
    """Each quantising node against ONNX's reference evaluator, fed with the same inputs."""
    from onnx.reference import ReferenceEvaluator

    if any(node.domain not in ("", "ai.onnx") for node in int8.graph.node):
        checks.add(
            "operator",
            "nodes against ONNX's reference evaluator",
            0,
            0,
            "left out: operators of ONNX Runtime's own, which the evaluator does not know",
        )
        return
    int8 = without_checks(int8)
    names = [n.output[0] for n in int8.graph.node if n.op_type == "QuantizeLinear"]
    names = [name for name in names if name not in {s.output for s in bundle.state("int8")}]
    session = StepSession(int8, bundle.state("int8"), optimise=False, watch=names)
    written = watched(int8, names)
    if written.opset_import[0].version < EVALUATED_OPSET:
        written = onnx.version_converter.convert_version(written, EVALUATED_OPSET)
    evaluator = ReferenceEvaluator(written)
    state = {item.input: item.fresh() for item in bundle.state("int8")}
    outputs = [value.name for value in evaluator.proto_.graph.output]
    worst, at = 0, ""
    for row in x:
        found = session.step(row)[1:]
        answer = dict(
            zip(outputs, evaluator.run(None, {INPUT_NAME: row[None], **state}), strict=True)
        )
        for name, array in zip(names, found, strict=True):
            off = int(np.abs(array.astype(np.int64) - answer[name].astype(np.int64)).max(initial=0))
            if off > worst:
                worst, at = off, name
        # Each row starts from what ONNX Runtime remembers: one step's difference, not a sum.
        for item, value in zip(bundle.state("int8"), session.state(), strict=True):
            state[item.input] = value
    checks.add(
        "operator",
        "nodes against ONNX's reference evaluator",
        worst,
        NODE_CODE_STEPS,
        f"greatest difference in uint8 steps over {len(names)} nodes and {len(x)} rows"
        + (f", at {at}" if at else ""),
    )


def source_of(bundle: Bundle) -> Source | None:
    """What PyTorch can compute the graphs from, where the bundle carries it."""
    path = bundle.path / SOURCE_NAME
    return load_source(path) if SOURCE_NAME in bundle.manifest.files else None


def _check_pytorch(
    bundle: Bundle,
    fp32: onnx.ModelProto,
    x: np.ndarray,
    plain: np.ndarray,
    limit: float,
    checks: Checks,
) -> float:
    source = source_of(bundle)
    if source is None:
        return 0.0
    served = StepSession(fp32, bundle.state("fp32")).run(x)
    found = greatest_difference(scores_of(source.spec, source.fp32, x, numerics=FLOAT), served)
    checks.add(
        "operator",
        "PyTorch against ONNX Runtime, FP32",
        found / max(1.0, float(np.abs(served).max())),
        FP32_BOUND,
        f"greatest difference of a score over {len(x)} rows, relative where scores pass 1",
    )
    if source.scheme is None:
        return 0.0
    numerics = SchemeNumerics(source.scheme)
    scores = scores_of(source.spec, source.int8, x, numerics=numerics)
    found = greatest_difference(scores, plain)
    checks.add(
        "operator",
        "PyTorch against ONNX Runtime, INT8",
        found,
        limit,
        f"greatest difference of a score over {len(x)} rows",
    )
    return found


def _check_research(bundle: Bundle, rows: np.ndarray, checks: Checks) -> None:
    """Raw features through the research graphs against normalised ones through the step graphs."""
    normalisation = Normalisation(bundle.mean, bundle.inv_scale, bundle.clip)
    raw = rows[:RESEARCH_ROWS].astype(np.float64) / bundle.inv_scale + bundle.mean
    x = normalisation.apply(raw)
    for name, precision in ((RESEARCH_INT8_NAME, "int8"), (RESEARCH_FP32_NAME, "fp32")):
        if name not in bundle.manifest.files:
            continue
        session = ort.InferenceSession(
            (bundle.path / name).read_bytes(),
            session_options(1),
            providers=["CPUExecutionProvider"],
        )
        (whole,) = session.run([OUTPUT_NAME], {FEATURES_NAME: raw})
        steps = StepSession(bundle.model_bytes(precision), bundle.state(precision)).run(x)
        checks.add(
            "operator",
            f"research graph against steps, {precision.upper()}",
            int((whole != steps).sum()),
            0,
            f"scores that differ over {len(x)} rows, normaliser included",
        )


def _check_golden(bundle: Bundle, limit: float, checks: Checks) -> None:
    if GOLDEN_NAME not in bundle.manifest.files:
        return
    data = (bundle.path / GOLDEN_NAME).read_bytes()
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    for precision in ("int8", "fp32"):
        session = StepSession(bundle.model_bytes(precision), bundle.state(precision))
        found = greatest_difference(session.run(golden["x"]), golden[precision])
        allowed = (
            limit if precision == "int8" else FP32_BOUND * max(1.0, np.abs(golden["fp32"]).max())
        )
        checks.add(
            "operator",
            f"golden vectors, {precision.upper()}",
            found,
            allowed,
            f"greatest difference of a score over {len(golden['x'])} rows",
        )


def verify_subgraphs(bundle: Bundle, rows: np.ndarray, checks: Checks) -> dict[str, float]:
    """Second level: signal to quantisation noise of each block, in dB.

    ``10 log10(sum fp32**2 / sum (int8 - fp32)**2)`` over the rows; below `MIN_SQNR_DB` at the
    scores the level fails. Inner blocks are reported, and fail only where noise drowns the signal.
    """
    models = {name: onnx.load_from_string(bundle.model_bytes(name)) for name in ("int8", "fp32")}
    pairs = _pairs(without_checks(models["int8"]), models["fp32"])
    tensors, scores = {}, {}
    for i, name in enumerate(("int8", "fp32")):
        session = StepSession(
            models[name],
            bundle.state(name),
            optimise=False,
            watch=[names[i] for names in pairs.values()],
        )
        tensors[name] = session.watched(rows)
        scores[name] = StepSession(models[name], bundle.state(name)).run(rows)
    scale = _point_scales(models["int8"])
    found = {}
    for block, (quantised, real) in pairs.items():
        step, zero = scale[quantised]
        values = (tensors["int8"][quantised].astype(np.float64) - zero) * step
        found[block] = noise_ratio(tensors["fp32"][real], values)
    found["scores"] = noise_ratio(scores["fp32"], scores["int8"])
    for block, ratio in found.items():
        limit = MIN_SQNR_DB if block == "scores" else 0.0
        checks.at_least("subgraph", block, ratio, limit, f"dB over {len(rows)} rows")
    return {name: round(value, 3) for name, value in found.items() if np.isfinite(value)}


def noise_ratio(signal: np.ndarray, noisy: np.ndarray) -> float:
    """Signal to noise in dB; infinite without noise."""
    real = signal.astype(np.float64)
    noise = float(np.square(noisy.astype(np.float64).reshape(real.shape) - real).sum())
    power = float(np.square(real).sum())
    if noise == 0.0:
        return float("inf")
    return 10.0 * float(np.log10(max(power, 1e-300) / noise))


def _pairs(int8: onnx.ModelProto, fp32: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """(quantised tensor, float tensor) of every point that both graphs have."""
    floats = {name for node in fp32.graph.node for name in node.output}
    found = {}
    for node in int8.graph.node:
        if node.op_type != "QuantizeLinear" or not node.output[0].endswith(".q"):
            continue
        block = node.output[0].removesuffix(".q")
        if f"{block}.out" in floats:
            found[block] = (node.output[0], f"{block}.out")
    return found


def _point_scales(int8: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    arrays = {item.name: item for item in int8.graph.initializer}
    found = {}
    for node in int8.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in arrays:
            scale = float(onnx.numpy_helper.to_array(arrays[node.input[1]]))
            found[node.output[0]] = scale, int(onnx.numpy_helper.to_array(arrays[node.input[2]]))
    return found


def verify(
    bundle: Bundle,
    rows: np.ndarray,
    *,
    system: Callable[[Checks], dict[str, Any]] | None = None,
    levels: Iterable[Level] = ("operator", "subgraph", "system"),
    vectors: int = VECTORS,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Verify a bundle.

    Parameters
    ----------
    bundle : Bundle
    rows : ndarray of float32, shape (n, features)
        Consecutive normalised inputs of one stream, as the engine would see them.
    system : callable, optional
        Runs the third level; see `models.verify_system.system_level`.
    levels : iterable of Level
    vectors : int
        Inputs of the operator level.
    on_stage : callable

    Raises
    ------
    InputError
        If a file of the bundle is missing or changed.
    """
    check_files(bundle)
    wanted, checks = set(levels), Checks()
    bound, ratios, facts = 0.0, {}, {}
    if "operator" in wanted:
        on_stage("operators: reference, PyTorch, optimisation levels, threads")
        bound = verify_operators(bundle, rows, checks, vectors)
    if "subgraph" in wanted:
        on_stage("subgraphs: signal to quantisation noise of each block")
        ratios = verify_subgraphs(bundle, rows[:SUBGRAPH_ROWS], checks)
    if "system" in wanted and system is not None:
        on_stage("system: the pipeline over the tape")
        facts = system(checks)
    return Verification(
        bundle=str(bundle.path),
        model_hash=bundle.manifest.model_hash,
        numerics=bundle.numerics,
        ok=all(check.ok for check in checks.all),
        checks=tuple(checks.all),
        sqnr_db=ratios,
        bound=bound,
        system=facts,
    )
