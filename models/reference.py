"""The reference model: simulated market → rows → labels → training → INT8 → bundle.

Everything follows from the arguments. The data is our own simulator's; see
``feeds/SIMULATOR.md`` for what is planted in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from engine import features
from engine.backends.registry import open_backend
from engine.bundle import MANIFEST_NAME, Bundle, load_bundle
from feeds.errors import InputError
from feeds.optimum import bayes_accuracy
from feeds.simulator import Simulator
from feeds.tape_reader import TapeReader
from models.dataset import Normalisation, Rows, collect, time_split
from models.export import float_model, int8_model, write_bundle
from models.labels import CLASSES, balancing_threshold, classify
from models.quantize import IntegerNetwork, quantise

NAME: Final = "reference"
DEFAULT_OUT: Final = Path(__file__).with_name("reference")
MESSAGES: Final = 2_400_000
SEED: Final = 20_260_105
STRIDE: Final = 4  # neighbouring rows say nearly the same
EPOCHS: Final = 4
HORIZON: Final = 100  # signals ahead that a label averages over: about 250 events
CLIP: Final = 4.0
INSTRUMENTS: Final = 4
TRAIN_SHARE: Final = 0.8
EMBARGO_NS: Final = 60_000_000_000
MIN_ROWS: Final = 1_000
MAX_LEVELS: Final = 512
CALIBRATION_ROWS: Final = 4_096
MAX_EVALUATED: Final = 50_000
MIN_AGREEMENT: Final = 0.97
MAX_BUNDLE_BYTES: Final = 1_000_000


class CheckFailed(Exception):  # noqa: N818 - it says what happened
    """A built model broke a promise and was not written."""


class Score(msgspec.Struct, frozen=True):
    """How a precision does on the test rows. Chance is 1/3 of ``balanced_accuracy``.

    ``balanced_accuracy`` is the mean over the classes of the share found of each.
    """

    accuracy: float
    balanced_accuracy: float


class Report(msgspec.Struct, frozen=True):
    """What was built and measured.

    ``optimum_accuracy`` is that of Bayes' rule on the simulator's exact filter, which knows the
    market's equations; ``majority_accuracy`` that of always naming the most frequent class.
    """

    bundle: str
    model_hash: str
    feature_schema: str
    seed: int
    messages: int
    signal_strength: float
    horizon_signals: int
    threshold_half_ticks: float
    train_rows: int
    test_rows: int
    class_shares: dict[str, float]
    int8: Score
    fp32: Score
    optimum_accuracy: float
    majority_accuracy: float
    agreement: float
    bundle_bytes: int


def score(predicted: np.ndarray, truth: np.ndarray) -> Score:
    """Accuracy and balanced accuracy, rounded to 4 places."""
    found = [float((predicted[truth == k] == k).mean()) for k in np.unique(truth)]
    return Score(
        accuracy=round(float((predicted == truth).mean()), 4),
        balanced_accuracy=round(float(np.mean(found)), 4),
    )


def predict(bundle: Bundle, precision: str, x: np.ndarray) -> np.ndarray:
    """Outputs of the backend that serves, one row at a time as in service.

    Parameters
    ----------
    x : ndarray of float32, shape (n, features)

    Returns
    -------
    ndarray of float32, shape (n, classes)
    """
    backend = open_backend("onnx", bundle, precision=precision)
    row = np.empty((1, bundle.n_features), dtype=np.float32)
    out = np.empty(bundle.n_outputs, dtype=np.float32)
    answers = np.empty((len(x), bundle.n_outputs), dtype=np.float32)
    for i in range(len(x)):
        row[0] = x[i]
        backend.infer(0, row, out)
        answers[i] = out
    backend.close()
    return answers


def session(messages: int, seed: int, signal_strength: float) -> tuple[Rows, np.ndarray]:
    """Rows of one simulated session, and what the exact filter knows at each.

    Returns
    -------
    rows : Rows
    posterior : ndarray of float64, shape (n, 3)
        P(hidden state = -1, 0, +1 | all messages so far) at each row.
    """
    market = Simulator(seed=seed, n_instruments=INSTRUMENTS, signal_strength=signal_strength)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.tape"
        truth = market.write_tape(path, messages, truth=True)
        rows = collect(
            TapeReader(path).chunks(), market.instruments, max_levels=MAX_LEVELS, stride=STRIDE
        )
    posterior = np.empty((len(rows), 3))
    by_name = sorted(market.instruments, key=lambda item: (item.venue, item.symbol))
    for slot, item in enumerate(by_name):
        own = truth[truth["instrument_id"] == item.instrument_id]
        here = rows.slot == slot
        at = np.searchsorted(own["seq"], rows.last_seq[here].astype(np.uint64))
        assert np.all(own["seq"][at] == rows.last_seq[here]), "a row at no event of the market"
        posterior[here] = own["posterior"][at]
    return rows, posterior


def build(
    out: Path,
    *,
    messages: int = MESSAGES,
    seed: int = SEED,
    signal_strength: float = 1.0,
    epochs: int = EPOCHS,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Report:
    """Make the reference bundle.

    Parameters
    ----------
    out : Path
        Its folder; nothing there is touched until everything has passed.
    messages : int
        Length of the simulated session.
    seed : int
        Of the market and of the training.
    signal_strength : float
        0 to 1, of the planted signal. At 0 there is nothing to find.
    epochs : int
    on_stage : callable
        Told what is being done.

    Raises
    ------
    InputError
        If the session is too short to train and test on.
    CheckFailed
        If the result breaks a promise: exactness, agreement of INT8 with FP32, or size.
    """
    from models.network import train  # torch takes seconds to import

    on_stage(f"simulating {messages} messages and running the pipeline over them")
    rows, posterior = session(messages, seed, signal_strength)
    labelled, moves = rows.moves(HORIZON)
    duration_ns = int(rows.time_ns[-1] - rows.time_ns[0]) if len(rows) else 0
    split = time_split(
        np.arange(len(labelled)),
        rows.time_ns[labelled],
        TRAIN_SHARE,
        min(EMBARGO_NS, duration_ns // 20),
    )
    if min(len(split.train), len(split.test)) < MIN_ROWS:
        raise InputError(
            "too few rows to train and test on",
            where="--messages",
            expected=f"at least {MIN_ROWS} rows in each part",
            found=f"{len(split.train)} and {len(split.test)}",
            fix="simulate more messages",
        )
    threshold = balancing_threshold(moves[split.train])
    labels = classify(moves, threshold)
    normalisation = Normalisation.fit(rows.features_of(labelled[split.train]), CLIP)
    x_train = normalisation.apply(rows.features_of(labelled[split.train]))
    x_test = normalisation.apply(rows.features_of(labelled[split.test[:MAX_EVALUATED]]))
    y_test = labels[split.test[:MAX_EVALUATED]]

    on_stage(f"training on {len(x_train)} rows")
    weights, biases = train(
        x_train,
        labels[split.train],
        len(CLASSES),
        epochs=epochs,
        seed=seed,
        progress=lambda epoch, loss: on_stage(f"epoch {epoch} of {epochs}, loss {loss:.4f}"),
    )
    step = max(1, len(x_train) // (16 * CALIBRATION_ROWS))
    calibration = x_train[::step]
    network = quantise(
        weights,
        biases,
        np.array_split(calibration, -(-len(calibration) // CALIBRATION_ROWS)),
        CLIP,
    )
    shares = np.bincount(labels[split.train], minlength=len(CLASSES)) / len(split.train)
    training = {
        "command": "octick model reference",
        "seed": seed,
        "messages": messages,
        "signal_strength": signal_strength,
        "epochs": epochs,
        "trigger": "top-of-book",
        "horizon_signals": HORIZON,
        "threshold_half_ticks": round(threshold / HORIZON, 4),
        "train_rows": len(split.train),
        "test_rows": len(y_test),
    }

    on_stage(f"evaluating on {len(y_test)} rows that came later")
    with tempfile.TemporaryDirectory() as folder:
        bundle = _write(Path(folder), network, weights, biases, normalisation, training)
        size = sum(path.stat().st_size for path in _files(bundle))
        outputs = {precision: predict(bundle, precision, x_test) for precision in ("int8", "fp32")}
    if outputs["int8"].tobytes() != network.forward(x_test).tobytes():
        raise CheckFailed("the INT8 model differs from its integer reference")
    if size > MAX_BUNDLE_BYTES:
        raise CheckFailed(f"the bundle takes {size} bytes, more than {MAX_BUNDLE_BYTES}")
    classes = {precision: values.argmax(axis=1) for precision, values in outputs.items()}
    agreement = float((classes["int8"] == classes["fp32"]).mean())
    scores = {precision: score(values, y_test) for precision, values in classes.items()}
    best = bayes_accuracy(y_test, posterior[labelled[split.test[:MAX_EVALUATED]]])
    training["test"] = {
        "optimum_accuracy": round(best, 4),
        "int8": scores["int8"],
        "fp32": scores["fp32"],
        "agreement": round(agreement, 4),
    }
    if agreement < MIN_AGREEMENT:
        raise CheckFailed(
            f"INT8 names the class of FP32 on {agreement:.2%} of rows, under {MIN_AGREEMENT:.0%}"
        )
    bundle = _write(out, network, weights, biases, normalisation, training)
    return Report(
        bundle=str(out),
        model_hash=bundle.manifest.model_hash,
        feature_schema=features.SCHEMA_HEX,
        seed=seed,
        messages=messages,
        signal_strength=signal_strength,
        horizon_signals=HORIZON,
        threshold_half_ticks=round(threshold / HORIZON, 4),
        train_rows=len(split.train),
        test_rows=len(y_test),
        class_shares={
            name: round(float(share), 4) for name, share in zip(CLASSES, shares, strict=True)
        },
        int8=scores["int8"],
        fp32=scores["fp32"],
        optimum_accuracy=round(best, 4),
        majority_accuracy=round(float(np.bincount(y_test).max() / len(y_test)), 4),
        agreement=round(agreement, 4),
        bundle_bytes=sum(path.stat().st_size for path in _files(bundle)),
    )


def _files(bundle: Bundle) -> tuple[Path, ...]:
    return bundle.path / MANIFEST_NAME, bundle.int8_path, bundle.fp32_path


def _write(
    folder: Path,
    network: IntegerNetwork,
    weights: list[np.ndarray],
    biases: list[np.ndarray],
    normalisation: Normalisation,
    training: dict[str, object],
) -> Bundle:
    write_bundle(
        folder,
        NAME,
        int8_model(network),
        float_model(weights, biases),
        numerics="exact-int8",
        mean=normalisation.mean,
        inv_scale=normalisation.inv_scale,
        clip=normalisation.clip,
        classes=CLASSES,
        training=training,
    )
    return load_bundle(folder)
