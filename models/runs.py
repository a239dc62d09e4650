"""The folder of a training run: what was trained, on what, and how good it is.

``run.json`` (`RunRecord`), ``weights.npz`` (BatchNorm as trained), the data set
(`models.sequences`), and ``checkpoint.npz`` while training is under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from feeds.errors import InputError
from models.export import npz_bytes
from models.operations import Spec
from models.sequences import Dataset, load_dataset
from models.shapes import fold_norms

RUN_NAME: Final = "run.json"
WEIGHTS_NAME: Final = "weights.npz"
CHECKPOINT_NAME: Final = "checkpoint.npz"
SEARCH_FOLDER: Final = "tune"
SEARCH_NAME: Final = "search.json"


class RunRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``run.json``.

    Attributes
    ----------
    spec : Spec
    epochs, seed, rows_a_batch : int
    learning_rate : float
    data : dict
        Label, horizon, threshold, source, rows and class shares of each part.
    metrics : dict
        Of the float network on the test part, see `models.metrics`.
    optimum_accuracy : float or None
        Of the simulator's exact filter on the same rows, where the data is simulated.
    seconds : float
        That training took.
    versions : dict
    """

    spec: Spec
    epochs: int
    seed: int
    rows_a_batch: int
    learning_rate: float
    data: dict[str, Any]
    metrics: dict[str, Any]
    optimum_accuracy: float | None
    baselines: dict[str, Any]
    seconds: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes
    ----------
    folder : Path
    record : RunRecord
    parameters : dict of ndarray of float32
        BatchNorm folded.
    data : Dataset
    """

    folder: Path
    record: RunRecord
    parameters: dict[str, np.ndarray]
    data: Dataset

    @property
    def spec(self) -> Spec:
        """The network."""
        return self.record.spec


def save_run(folder: Path, record: RunRecord, parameters: Mapping[str, np.ndarray]) -> None:
    """Write ``weights.npz`` and then ``run.json``, which makes the run a finished one."""
    (folder / WEIGHTS_NAME).write_bytes(npz_bytes(parameters))
    data = msgspec.json.format(msgspec.json.encode(record), indent=2)
    (folder / RUN_NAME).write_bytes(data + b"\n")


def load_run(folder: Path) -> Run:
    """Read a finished run.

    Raises
    ------
    InputError
        If there is none in the folder, or a file of it is damaged.
    """
    path = folder / RUN_NAME
    try:
        record = msgspec.json.decode(path.read_bytes(), type=RunRecord)
        with np.load(folder / WEIGHTS_NAME, allow_pickle=False) as file:
            parameters = {name: file[name] for name in file.files}
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise InputError(
            "no finished training run",
            where=str(folder),
            expected=f"{RUN_NAME} and {WEIGHTS_NAME}",
            found=str(error),
            fix="name the folder that 'octick model train --out' wrote, or train again to go on",
        ) from None
    return Run(folder, record, fold_norms(record.spec, parameters), load_dataset(folder))
