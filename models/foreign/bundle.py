"""A bundle of another's model: an ONNX file or a PyTorch module, with a run's data to calibrate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from engine.manifest import StateSection
from feeds.errors import InputError
from models.bundles import Made, finish_bundle
from models.foreign.check import load_onnx
from models.foreign.quantise import quantise_static
from models.foreign.step_model import as_step_model, window_feeds
from models.foreign.torch_module import load_torch
from models.foreign.weights import quantise_dynamic, quantise_int4
from models.labels import CLASSES
from models.operations import Spec
from models.quantisation import Options, Quantised
from models.runs import Run
from models.sequences import TRAIN, Dataset

FOREIGN: Final = "foreign"
QUANTISED: Final = ("Conv", "Gemm", "MatMul", "LSTM")
Progress = Callable[[str, float], None]


def make_foreign_bundle(
    model: str,
    run: Run,
    options: Options,
    folder: Path,
    *,
    window: int,
    columns: slice | Sequence[int],
    name: str = "",
    progress: Progress = lambda stage, share: None,
) -> Made:
    """Quantise another's model on a run's rows and write a bundle that the engine serves.

    Parameters
    ----------
    model : str
        An ONNX file, or ``FILE.py:FACTORY`` that gives a module and an example of its input.
    run : Run
        Its data set calibrates and compares, its normalisation goes into the bundle.
    options : Options
        ``ptq``, ``dynamic`` or ``int4``; scales are free.
    window : int
        Rows that the model looks at; a model of one row is taken as it is.
    columns : slice or sequence of int
        Features that it sees.

    Raises
    ------
    InputError
        If the model or the options cannot be used: naming the node, and the way out.
    """
    _check(options)
    progress("reading the model", 0.0)
    path = Path(model)
    loaded = load_onnx(path) if path.suffix == ".onnx" else load_torch(model)
    n_features = run.spec.n_features
    called = name or path.name.partition(":")[0].partition(".")[0]
    fp32, state = as_step_model(
        loaded,
        n_features=n_features,
        columns=columns,
        window=window,
        n_classes=len(CLASSES),
        name=called,
    )
    progress(f"{options.method} quantisation", 0.0)
    seen = 0
    if options.method == "ptq":
        rows = calibration_rows(run.data, window, options.rows)
        seen = sum(max(0, len(part) - window + 1) for part in rows)

        def feeds() -> Iterator[dict[str, np.ndarray]]:
            done = 0
            for part in rows:
                for feed in window_feeds(part, columns=columns, window=window):
                    done += 1
                    progress("calibrating", done / max(1, seen))
                    yield feed

        int8, _ = quantise_static(
            fp32,
            feeds(),
            observer=options.observer,
            per_channel=options.per_channel,
            symmetric=options.symmetric,
            exclude=tuple(options.keep),
            op_types=QUANTISED,
        )
    else:
        make = quantise_dynamic if options.method == "dynamic" else quantise_int4
        int8 = make(fp32)
    both = StateSection(int8=state, fp32=state)
    spec = Spec(FOREIGN, n_features, len(CLASSES), run.data.facts.clip)
    twins = Quantised(spec, {}, {}, None, int8, fp32, both, "tolerance", seen, {})
    return finish_bundle(run, twins, options, folder, name=called, progress=progress)


def calibration_rows(data: Dataset, window: int, rows: int) -> list[np.ndarray]:
    """The first stretch of each stream's training part, with about so many whole windows in all."""
    stretches = list(data.stretches(TRAIN, 0))
    each = max(1, rows // max(1, len(stretches)))
    parts = [np.asarray(data.x[item.begin : item.stop][: each + window - 1]) for item in stretches]
    if not any(len(part) >= window for part in parts):
        raise InputError(
            "a window longer than the tape",
            where=f"--window {window}",
            expected=f"at most {max((len(part) for part in parts), default=0)} rows in a row",
            fix="take a shorter window, or --data of longer tapes",
        )
    return parts


def _check(options: Options) -> None:
    for wrong, what, way_out in (
        (
            options.method == "qat",
            "quantisation-aware training needs one of our own architectures",
            "calibrate with --method ptq",
        ),
        (
            options.scales == "power-of-two",
            "scales that are no powers of two cannot be exact-int8",
            "ask for --scales free, or train one of our own architectures",
        ),
        (bool(options.prune), "only our own architectures can be pruned", "leave out --prune"),
        (
            bool(options.keep_worst),
            "layers of another's model are not ranked",
            "name nodes with --keep",
        ),
    ):
        if wrong:
            raise InputError(what, where="octick model quantize", fix=way_out)
