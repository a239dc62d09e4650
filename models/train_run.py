"""One training run: tapes or a simulated session → rows → data set → network → run folder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from engine.config import TriggerConfig
from feeds.errors import InputError
from feeds.optimum import bayes_accuracy
from feeds.simulator import Simulator
from feeds.tape import InstrumentMeta
from feeds.tape_reader import TapeReader
from models.architectures import architecture
from models.comparison import measures, part_scores
from models.dataset import Rows, collect, joined
from models.execute import scores_of
from models.labels import CLASSES
from models.metrics import Metrics
from models.operations import Spec
from models.runs import CHECKPOINT_NAME, RUN_NAME, RunRecord, save_run
from models.sequences import (
    FACTS_NAME,
    PARTS,
    TEST,
    TRAIN,
    Dataset,
    LabelKind,
    class_shares,
    find_leaks,
    load_dataset,
    make_dataset,
)
from models.shapes import fold_norms, initial_parameters
from models.training import LEARNING_RATE, ROWS_A_BATCH, Plan, one_thread, train

PACKAGES: Final = ("torch", "numpy", "onnx", "onnxruntime", "numba")
SIMULATED_INSTRUMENTS: Final = 4
SIMULATED_LEVELS: Final = 512
REQUEST_NAME: Final = "request.json"
POSTERIOR_NAME: Final = "posterior.npy"
BASELINE_EPOCHS: Final = 2
Progress = Callable[[str, float], None]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``octick model train`` is asked for.

    Attributes
    ----------
    arch : str
    tapes : tuple of str
        Or none, with ``simulate`` messages of the built-in market.
    simulate : int
    signal_strength : float
        Of the simulated market's planted signal.
    horizon : int
        Signals.
    label : LabelKind
    threshold : float or None
        Half ticks.
    epochs, seed, rows_a_batch, most_rows : int
        See `models.training.Plan`.
    learning_rate : float
    validation_share, test_share : float
    embargo_ns : int or None
    max_levels : int
        Book depth.
    trigger : TriggerConfig
        When a row is taken.
    """

    arch: str
    tapes: tuple[str, ...] = ()
    simulate: int = 0
    signal_strength: float = 1.0
    horizon: int = 100
    label: LabelKind = "smoothed"
    threshold: float | None = None
    epochs: int = 4
    seed: int = 1
    rows_a_batch: int = ROWS_A_BATCH
    most_rows: int = 0
    learning_rate: float = LEARNING_RATE
    validation_share: float = 0.1
    test_share: float = 0.2
    embargo_ns: int | None = None
    max_levels: int = 16_384
    trigger: TriggerConfig = TriggerConfig()


def rows_of_tapes(
    paths: Sequence[Path],
    *,
    trigger: TriggerConfig | None = None,
    max_levels: int = 16_384,
    progress: Progress = lambda stage, share: None,
) -> Rows:
    """Rows of several tapes, one after another, over all their instruments.

    Raises
    ------
    InputError
        If a tape cannot be read, or no row came out.
    """
    readers = [TapeReader(path) for path in paths]
    instruments = {(i.venue, i.symbol): i for reader in readers for i in reader.meta.instruments}
    found = []
    for k, reader in enumerate(readers):
        size = max(1, Path(paths[k]).stat().st_size)

        def told(done: int, k: int = k, size: int = size) -> None:
            share = (k + min(1.0, done / size)) / len(readers)
            progress("running the pipeline over the tapes", share)

        found.append(
            collect(
                reader.chunks(),
                instruments.values(),
                trigger=trigger,
                max_levels=max_levels,
                progress=told,
            )
        )
    rows = joined(found)
    if not len(rows):
        raise InputError(
            "no tradable signal to learn from",
            where=", ".join(str(path) for path in paths),
            expected="a book that is whole, and 256 updates and 32 trades after that",
            fix="check the tapes with 'octick tape info', or take longer ones",
        )
    return rows


def simulated_rows(
    messages: int, seed: int, signal_strength: float, progress: Progress = lambda s, f: None
) -> tuple[Rows, np.ndarray]:
    """Rows of one simulated session, and what the market's exact filter knows at each.

    Returns
    -------
    rows : Rows
        In (instrument, time) order.
    posterior : ndarray of float64, shape (n, 3)
        P(hidden state = -1, 0, +1 | all messages so far).
    """
    market = Simulator(
        seed=seed, n_instruments=SIMULATED_INSTRUMENTS, signal_strength=signal_strength
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.tape"
        progress(f"simulating {messages} messages", 0.0)
        truth = market.write_tape(path, messages, truth=True)
        size = path.stat().st_size
        rows = collect(
            TapeReader(path).chunks(),
            market.instruments,
            max_levels=SIMULATED_LEVELS,
            progress=lambda done: progress("running the pipeline over them", min(1.0, done / size)),
        ).by_instrument()
    return rows, _posterior(rows, truth, market.instruments)


def _posterior(rows: Rows, truth: np.ndarray, instruments: Iterable[InstrumentMeta]) -> np.ndarray:
    posterior = np.empty((len(rows), 3))
    for slot, item in enumerate(sorted(instruments, key=lambda i: (i.venue, i.symbol))):
        own = truth[truth["instrument_id"] == item.instrument_id]
        here = rows.slot == slot
        at = np.searchsorted(own["seq"], rows.last_seq[here].astype(np.uint64))
        assert np.all(own["seq"][at] == rows.last_seq[here]), "a row at no event of the market"
        posterior[here] = own["posterior"][at]
    return posterior


def prepare(request: Request, folder: Path, progress: Progress) -> tuple[Dataset, float | None]:
    """The data set of a run, made once and kept in its folder; and the simulator's optimum."""
    posterior = None
    if (folder / FACTS_NAME).exists():
        data = load_dataset(folder)
        if request.simulate:
            posterior = np.load(folder / POSTERIOR_NAME, allow_pickle=False)
    else:
        if request.simulate:
            rows, posterior = simulated_rows(
                request.simulate, request.seed, request.signal_strength, progress
            )
            source = f"simulated, {request.simulate} messages, seed {request.seed}"
            source += f", signal strength {request.signal_strength}"
        else:
            paths = [Path(tape) for tape in request.tapes]
            rows = rows_of_tapes(
                paths, trigger=request.trigger, max_levels=request.max_levels, progress=progress
            )
            source = ", ".join(path.name for path in paths)
        data = make_dataset(
            rows,
            horizon=request.horizon,
            label=request.label,
            threshold=request.threshold,
            validation_share=request.validation_share,
            test_share=request.test_share,
            embargo_ns=request.embargo_ns,
            source=source,
        )
        if posterior is not None:
            np.save(folder / POSTERIOR_NAME, posterior, allow_pickle=False)
        data.save(folder)
    leaks = find_leaks(data)
    if leaks:
        raise InputError(
            "the data set lets a model know the answers",
            where=str(folder),
            expected="labels and features that know nothing of later parts",
            found="; ".join(leaks),
            fix="mend the data, or lengthen the embargo",
        )
    optimum = None
    if posterior is not None:
        test = data.rows_of(TEST)
        optimum = round(bayes_accuracy(data.label[test], posterior[test]), 6)
    return data, optimum


def float_scores(
    spec: Spec, parameters: dict[str, np.ndarray], data: Dataset, part: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labelled rows of a whole part and the float network's scores, by PyTorch."""
    with one_thread():
        return part_scores(lambda x: scores_of(spec, parameters, x), data, part, None)


def train_run(
    request: Request, folder: Path, progress: Progress = lambda stage, share: None
) -> RunRecord:
    """Train a network, or go on where an interrupted run of the same request stopped.

    Parameters
    ----------
    request : Request
    folder : Path
        The run's; made where it does not exist.
    progress : callable
        Told the stage and its share done.

    Raises
    ------
    InputError
        If the folder holds another run, or the data cannot be trained on.
    """
    spec = Spec(request.arch, n_features=96, n_classes=len(CLASSES))
    architecture(spec)
    _claim(request, folder)
    if (folder / RUN_NAME).exists():
        return msgspec.json.decode((folder / RUN_NAME).read_bytes(), type=RunRecord)
    started = time.perf_counter()
    data, optimum = prepare(request, folder, progress)
    plan = Plan(
        request.epochs,
        request.seed,
        request.learning_rate,
        request.rows_a_batch,
        request.most_rows,
    )
    parameters = train(
        spec,
        data,
        initial_parameters(spec, request.seed),
        plan,
        checkpoint=folder / CHECKPOINT_NAME,
        progress=lambda done, total, loss: progress(f"training, loss {loss:.4f}", done / total),
    )
    progress("evaluating on the test part", 0.0)
    rows, scores = float_scores(spec, fold_norms(spec, parameters), data, TEST)
    record = RunRecord(
        spec=spec,
        epochs=request.epochs,
        seed=request.seed,
        rows_a_batch=request.rows_a_batch,
        learning_rate=request.learning_rate,
        data={
            "source": data.facts.source,
            "label": data.facts.label,
            "horizon": data.facts.horizon,
            "threshold": data.facts.threshold,
            "embargo_ns": data.facts.embargo_ns,
            "rows": {
                name: len(data.rows_of(part))
                for part, name in enumerate(PARTS)
                if name != "embargo"
            },
            "train_classes": class_shares(data, TRAIN),
            "test_classes": class_shares(data, TEST),
        },
        metrics=msgspec.to_builtins(measures(data, rows, scores)),
        optimum_accuracy=optimum,
        baselines={"logistic": msgspec.to_builtins(_logistic(data, request.seed, progress))},
        seconds=round(time.perf_counter() - started, 1),
        versions={name: version(name) for name in PACKAGES},
    )
    save_run(folder, record, parameters)
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    return record


def _logistic(data: Dataset, seed: int, progress: Progress) -> Metrics:
    """The linear baseline, trained on the same rows and measured on the same part."""
    spec = Spec("linear", data.x.shape[1], len(CLASSES))
    parameters = train(
        spec,
        data,
        initial_parameters(spec, seed),
        Plan(BASELINE_EPOCHS, seed),
        progress=lambda done, total, loss: progress("logistic baseline", done / total),
    )
    return measures(data, *float_scores(spec, parameters, data, TEST))


def _claim(request: Request, folder: Path) -> None:
    """Take the folder for this request, or see that it has been."""
    path = folder / REQUEST_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = msgspec.json.encode(request)
        if path.exists() and path.read_bytes() != wanted:
            raise InputError(
                "the folder holds another run",
                where=str(path),
                expected="the same options, to go on with it",
                fix="name another --out",
            )
        path.write_bytes(wanted)
    except OSError as error:
        raise InputError(
            "cannot write to the run's folder",
            where=str(folder),
            found=error.strerror or str(error),
        ) from None
