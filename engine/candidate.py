# Cold path: a process of its own, before a model is swapped in.
"""Whether a bundle may take the place of the one that serves.

It is loaded as the daemon would load it, opened on the device that will run it, and held against
its own golden vectors; it must fit what serves, and must not be further from its own FP32 twin
than that is from its twin. What speaks against it is said in whole lines, and a bundle that cannot
even be read is one of those lines, not an error: the model that serves goes on.

    python -m engine.candidate SERVING CANDIDATE --inputs rows.npy

prints one `Verdict` in JSON; exit code 0 for a candidate that may serve, 1 for one that is
refused, 2 for wrong usage.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

import click
import msgspec
import numpy as np

from engine.backends.interface import Backend
from engine.backends.onnx_streams import MAX_STREAMS
from engine.backends.registry import open_backend
from engine.bundle import MAX_MODEL_BYTES, Bundle, check_files, load_bundle
from engine.manifest import read_file
from engine.model_input import normalised
from feeds.errors import InputError

GOLDEN_NAME: Final = "golden.npz"
FP32_BOUND: Final = 1e-5  # of golden vectors in FP32, relative where scores pass 1
MAX_AGREEMENT_LOSS: Final = 0.005
MAX_VIOLATION_GAIN: Final = 0.001
MAX_ROWS: Final = 1_000_000
EXIT_REFUSED: Final = 1
EXIT_BAD_USAGE: Final = 2
VECTOR_KEY: Final = "vector"
STREAM_KEY: Final = "stream"


class Verdict(msgspec.Struct, frozen=True):
    """What was found.

    Attributes
    ----------
    ok : bool
        Whether the candidate may serve.
    reasons : tuple of str
        Why not, a line each.
    model_hash : str
        Of the candidate, 16 hex digits; "" where it cannot be read.
    serving_hash : str
    rows : int
        Compared; 0 without inputs.
    agreement_serving, agreement_candidate : float or None
        Share of the rows on which INT8 and its own FP32 twin name the same class.
    violations_serving, violations_candidate : int
        Rows on which the value checks inside the INT8 graph found something.
    """

    ok: bool
    reasons: tuple[str, ...]
    model_hash: str
    serving_hash: str
    rows: int = 0
    agreement_serving: float | None = None
    agreement_candidate: float | None = None
    violations_serving: int = 0
    violations_candidate: int = 0


class Place(NamedTuple):
    """Where a model runs: as in the config's section ``model``."""

    backend: str = "onnx"
    device: str = "cpu"
    threads: int = 1


class Answers(NamedTuple):
    """What a model said.

    Attributes
    ----------
    scores : ndarray of float32, shape (n, classes)
    violations : ndarray of int64, shape (n,)
        Bits that the graph's value checks raised; 0 where there are none.
    """

    scores: np.ndarray
    violations: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """The class of each row, int64 of shape (n,)."""
        return self.scores.argmax(axis=1)


def answers(backend: Backend, x: np.ndarray, streams: np.ndarray | None = None) -> Answers:
    """Run an opened model over rows, one after another, each stream from a fresh state.

    Parameters
    ----------
    backend : Backend
    x : ndarray of float32, shape (n, features)
        Normalised.
    streams : ndarray of int64, shape (n,), optional
        Which instrument's state each row goes on from; all rows are one stream without.

    Raises
    ------
    RuntimeError
        If the device failed.
    """
    info = backend.info()
    entry = np.zeros(info.input_shape, dtype=np.float32)
    out = np.zeros(info.output_shape, dtype=np.float32)
    scores = np.empty((len(x), len(out)), dtype=np.float32)
    violations = np.zeros(len(x), dtype=np.int64)
    numbers = np.zeros(len(x), dtype=np.int64) if streams is None else streams
    for stream in np.unique(numbers):
        backend.reset(int(stream))
    infer: Callable[[int, np.ndarray, np.ndarray], int | None] = backend.infer
    for i, stream in enumerate(numbers.tolist()):
        entry[0] = x[i]
        violations[i] = infer(stream, entry, out) or 0
        scores[i] = out
    return Answers(scores, violations)


def misfits(serving: Bundle, candidate: Bundle, *, allow_tolerance: bool = False) -> list[str]:
    """Why a readable candidate could not stand where the serving bundle stands.

    Both have this engine's features: `engine.bundle.load_bundle` takes no other.
    """
    found = []
    if candidate.classes != serving.classes:
        found.append(
            f"it has other classes: {', '.join(candidate.classes)}"
            f" in place of {', '.join(serving.classes)}"
        )
    weaker = (serving.numerics, candidate.numerics) == ("exact-int8", "tolerance")
    if weaker and not allow_tolerance:
        found.append("its numerics are weaker: tolerance in place of exact-int8")
    return found


def check_golden(bundle: Bundle, backend: Backend) -> None:
    """Hold an opened model against the golden vectors of its bundle, where it has any.

    Raises
    ------
    InputError
        If a score differs: by a bit for exact-int8, by more than the stated bound otherwise.
    """
    if GOLDEN_NAME not in bundle.manifest.files:
        return
    precision = backend.info().precision
    where = f"{bundle.path / GOLDEN_NAME}: {precision}"
    golden = _read_arrays(bundle.path / GOLDEN_NAME, ("x", precision))
    x, expected = golden["x"], golden[precision]
    shapes = (x.shape, expected.shape)
    wanted = ((len(x), bundle.n_features), (len(x), bundle.n_outputs))
    if shapes != wanted or (x.dtype, expected.dtype) != (np.float32, np.float32):
        raise InputError(
            "golden vectors of another shape",
            where=where,
            expected=f"float32 of shapes {wanted[0]} and {wanted[1]}",
            found=f"{x.dtype} and {expected.dtype} of shapes {shapes[0]} and {shapes[1]}",
        )
    found = answers(backend, x).scores
    if backend.info().numerics == "exact-int8":
        limit = 0.0
    elif precision == "int8":
        limit = bundle.manifest.bound
    else:
        limit = FP32_BOUND * max(1.0, float(np.abs(expected).max(initial=0.0)))
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    wrong = ~(difference <= limit)  # a NaN is wrong
    if limit == 0.0:
        wrong |= found.view(np.uint32) != expected.view(np.uint32)
    if wrong.any():
        row, score = (int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            "golden vectors do not come out",
            where=f"{where}[{row}, {score}]",
            expected=f"{expected[row, score]}" + (f" within {limit:.3g}" if limit else ""),
            found=f"{found[row, score]}; {int(wrong.any(axis=1).sum())} rows of {len(x)} differ",
            fix="rebuild the bundle on this version",
        )


def judge(
    serving: Path,
    candidate: Path,
    *,
    inputs: np.ndarray | None = None,
    streams: np.ndarray | None = None,
    place: Place = Place(),  # noqa: B008 - immutable
    precision: str = "int8",
    max_agreement_loss: float = MAX_AGREEMENT_LOSS,
    max_violation_gain: float = MAX_VIOLATION_GAIN,
    allow_tolerance: bool = False,
) -> Verdict:
    """Say whether a candidate may take the serving bundle's place.

    Parameters
    ----------
    serving, candidate : Path
        Folders of bundles.
    inputs : ndarray of float64, shape (n, features), optional
        Recent raw feature vectors, before any normalisation: the two may normalise differently.
        Without them nothing is compared.
    streams : ndarray of int64, shape (n,), optional
        The instrument of each row, for models with state.
    place : Place
        Where the model will run.
    precision : str
        What will answer. "fp32" leaves INT8 unopened and uncompared.
    max_agreement_loss : float
        Share of rows that INT8's agreement with FP32 may fall by.
    max_violation_gain : float
        Share of rows on which its value checks may find something and the serving model's do not:
        they stand at what calibration saw, so that chance puts a few rows beyond.
    allow_tolerance : bool
        Let a model that is not exact take the place of one that is.

    Raises
    ------
    InputError
        If the serving bundle or the inputs cannot be used. What is wrong with the candidate
        stands in the verdict.
    """
    current = load_bundle(serving)
    _check_inputs(inputs, streams, current)
    serving_hash = f"{current.model_hash:016x}"
    try:
        offered = load_bundle(candidate)
    except InputError as error:
        return Verdict(False, (str(error),), "", serving_hash)
    offered_hash = f"{offered.model_hash:016x}"
    reasons = misfits(current, offered, allow_tolerance=allow_tolerance)
    precisions = ("int8", "fp32") if precision == "int8" else ("fp32",)
    with ExitStack() as stack:

        def opened(bundle: Bundle) -> dict[str, Backend]:
            backends = {}
            for name in precisions:
                backends[name] = open_backend(
                    place.backend, bundle, place.device, threads=place.threads, precision=name
                )
                stack.callback(backends[name].close)
            return backends

        currents = opened(current)  # first: a device that is not there is no candidate's fault
        try:
            check_files(offered)
            candidates = opened(offered)
            for backend in candidates.values():
                check_golden(offered, backend)
        except (InputError, RuntimeError) as error:
            reasons.append(str(error))
        if reasons or inputs is None or precision != "int8":
            return Verdict(not reasons, tuple(reasons), offered_hash, serving_hash)
        before = _compared(current, currents, inputs, streams)
        try:
            after = _compared(offered, candidates, inputs, streams)
        except RuntimeError as error:
            return Verdict(False, (str(error),), offered_hash, serving_hash)
    if after.agreement < before.agreement - max_agreement_loss:
        reasons.append(
            f"worse than the serving model: agreement of INT8 with FP32 {after.agreement:.2%}"
            f" against {before.agreement:.2%} on {len(inputs)} rows"
        )
    if after.violations > before.violations + max_violation_gain * len(inputs):
        reasons.append(
            f"worse than the serving model: its value checks find something in"
            f" {after.violations} rows against {before.violations} of {len(inputs)}"
        )
    return Verdict(
        not reasons,
        tuple(reasons),
        offered_hash,
        serving_hash,
        rows=len(inputs),
        agreement_serving=round(before.agreement, 6),
        agreement_candidate=round(after.agreement, 6),
        violations_serving=before.violations,
        violations_candidate=after.violations,
    )


class _Compared(NamedTuple):
    agreement: float
    violations: int


def _compared(
    bundle: Bundle,
    backends: dict[str, Backend],
    inputs: np.ndarray,
    streams: np.ndarray | None,
) -> _Compared:
    x = normalised(inputs, bundle)
    int8 = answers(backends["int8"], x, streams)
    same = int8.classes == answers(backends["fp32"], x, streams).classes
    return _Compared(float(same.mean()), int(np.count_nonzero(int8.violations)))


def _check_inputs(inputs: np.ndarray | None, streams: np.ndarray | None, bundle: Bundle) -> None:
    if inputs is None:
        return
    good = inputs.ndim == 2 and inputs.dtype == np.float64
    if not good or inputs.shape[1] != bundle.n_features or not 1 <= len(inputs) <= MAX_ROWS:
        raise InputError(
            "no raw feature vectors",
            where="--inputs",
            expected=f"float64 of shape (1 to {MAX_ROWS}, {bundle.n_features})",
            found=f"{inputs.dtype} of shape {inputs.shape}",
        )
    if not np.isfinite(inputs).all():
        row, feature = (int(i) for i in np.argwhere(~np.isfinite(inputs))[0])
        raise InputError(
            "a feature is not finite",
            where=f"--inputs [{row}, {feature}]",
            expected="rows of tradable signals",
            found=str(inputs[row, feature]),
        )
    if streams is None:
        return
    if streams.shape != (len(inputs),) or streams.dtype != np.int64:
        raise InputError(
            "not an instrument for each row",
            where=f"--inputs {STREAM_KEY}",
            expected=f"int64 of shape ({len(inputs)},)",
            found=f"{streams.dtype} of shape {streams.shape}",
        )
    if streams.min() < 0 or streams.max() >= MAX_STREAMS:
        raise InputError(
            "no number of an instrument",
            where=f"--inputs {STREAM_KEY}",
            expected=f"0 to {MAX_STREAMS - 1}",
            found=f"{streams.min()} to {streams.max()}",
        )


def _read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Named arrays of an npz file."""
    data = read_file(path, MAX_MODEL_BYTES)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            "cannot read arrays",
            where=str(path),
            expected="an npz file with " + ", ".join(names),
            found=str(error),
        ) from None


def read_inputs(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Raw feature vectors from ``rows.npy``, or ``vector`` and ``stream`` from an npz file.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    if path.suffix == ".npz":
        arrays = _read_arrays(path, (VECTOR_KEY, STREAM_KEY))
        return arrays[VECTOR_KEY], arrays[STREAM_KEY]
    try:
        return np.load(path, allow_pickle=False), None
    except (OSError, EOFError, ValueError) as error:
        raise InputError(
            "cannot read the inputs",
            where=str(path),
            expected="a .npy file of float64, or .npz with vector and stream",
            found=str(error),
        ) from None


@click.command()
@click.argument("serving", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--inputs",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Recent raw feature vectors: float64 in a .npy, or vector and stream in an .npz.",
)
@click.option("--backend", default="onnx", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--precision", type=click.Choice(["int8", "fp32"]), default="int8", show_default=True)
@click.option(
    "--max-agreement-loss",
    type=click.FloatRange(0.0, 1.0),
    default=MAX_AGREEMENT_LOSS,
    show_default=True,
    help="Share of rows that INT8's agreement with FP32 may fall by.",
)
@click.option(
    "--max-violation-gain",
    type=click.FloatRange(0.0, 1.0),
    default=MAX_VIOLATION_GAIN,
    show_default=True,
    help="Share of rows that may violate value checks beyond those of the serving model.",
)
@click.option("--allow-tolerance", is_flag=True, help="Let exact-int8 be replaced by tolerance.")
def main(
    serving: Path,
    candidate: Path,
    inputs: Path | None,
    backend: str,
    device: str,
    threads: int,
    precision: str,
    max_agreement_loss: float,
    max_violation_gain: float,
    allow_tolerance: bool,
) -> None:
    """Say whether the bundle CANDIDATE may take the place of SERVING, as one line of JSON."""
    try:
        rows, streams = (None, None) if inputs is None else read_inputs(inputs)
        verdict = judge(
            serving,
            candidate,
            inputs=rows,
            streams=streams,
            place=Place(backend, device, threads),
            precision=precision,
            max_agreement_loss=max_agreement_loss,
            max_violation_gain=max_violation_gain,
            allow_tolerance=allow_tolerance,
        )
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_BAD_USAGE)
    click.echo(msgspec.json.encode(verdict).decode())
    sys.exit(0 if verdict.ok else EXIT_REFUSED)


if __name__ == "__main__":
    main()
