"""The reference model: a small MLP from simulated data, by the road that every model takes.

Everything follows from the arguments. The data is our own simulator's; see
``feeds/SIMULATOR.md`` for what is planted in it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from models.bundles import Made, make_bundle
from models.quantisation import Options
from models.runs import RunRecord, load_run
from models.train_run import Request, train_run

NAME: Final = "reference"
DEFAULT_OUT: Final = Path(__file__).with_name("reference")
MESSAGES: Final = 2_400_000
SEED: Final = 20_260_105
EPOCHS: Final = 3
HORIZON: Final = 100  # signals ahead that a label averages over: about 250 events
MIN_AGREEMENT: Final = 0.97
MAX_BUNDLE_BYTES: Final = 1_000_000
OPTIONS: Final = Options(scales="power-of-two", observer="mse", rows=100_000)


class CheckFailed(Exception):  # noqa: N818 - it says what happened
    """A built model broke a promise and was not written."""


class Report(msgspec.Struct, frozen=True):
    """What was built and measured.

    Attributes
    ----------
    bundle, model_hash : str
    bundle_bytes : int
    agreement : float
    optimum_accuracy : float
        Of the simulator's exact filter on the same rows.
    run : RunRecord
    made : Made
    """

    bundle: str
    model_hash: str
    bundle_bytes: int
    agreement: float
    optimum_accuracy: float
    run: RunRecord
    made: Made


def build(
    out: Path,
    *,
    messages: int = MESSAGES,
    seed: int = SEED,
    signal_strength: float = 1.0,
    epochs: int = EPOCHS,
    progress: Callable[[str, float], None] = lambda stage, share: None,
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
    progress : callable
        Told the stage and its share done.

    Raises
    ------
    InputError
        If the session is too short to train and test on.
    CheckFailed
        If the result breaks a promise: verification, agreement of INT8 with FP32, or size.
    """
    request = Request(
        arch="mlp",
        simulate=messages,
        signal_strength=signal_strength,
        horizon=HORIZON,
        epochs=epochs,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        record = train_run(request, Path(folder) / "run", progress)
        run = load_run(Path(folder) / "run")
        trial = Path(folder) / NAME
        made = make_bundle(run, OPTIONS, trial, name=NAME, with_report=False, progress=progress)
        if made.failed:
            raise CheckFailed(f"verification: {', '.join(made.failed)}")
        size = sum(path.stat().st_size for path in trial.iterdir())
        if size > MAX_BUNDLE_BYTES:
            raise CheckFailed(f"the bundle takes {size} bytes, more than {MAX_BUNDLE_BYTES}")
        agreement = made.comparison.agreement
        if agreement < MIN_AGREEMENT:
            raise CheckFailed(
                f"INT8 and FP32 agree on {agreement:.2%} of rows, under {MIN_AGREEMENT:.0%}"
            )
        made = msgspec.structs.replace(made, bundle=str(out))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(trial, out)
    return Report(
        bundle=str(out),
        model_hash=made.model_hash,
        bundle_bytes=size,
        agreement=agreement,
        optimum_accuracy=record.optimum_accuracy or 0.0,
        run=record,
        made=made,
    )
