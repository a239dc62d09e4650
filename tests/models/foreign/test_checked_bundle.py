"""Another's model as a bundle: with a value check where its graph takes one, and why where not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from engine.backends.onnx import OnnxBackend
from engine.bundle import load_bundle
from engine.trust import CHECK_INPUT
from models.foreign.bundle import make_foreign_bundle
from models.quantisation import Options
from models.runs import Run, load_run
from models.train_run import Request, train_run
from tests.models.foreign.test_step_model import COLUMNS, ROWS, window_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Rows to calibrate on."""
    folder = tmp_path_factory.mktemp("linear")
    train_run(Request(arch="linear", simulate=60_000, epochs=1, seed=2), folder)
    return load_run(folder)


@pytest.mark.parametrize("method", ["ptq", "dynamic", "int4"])
def test_another_models_graph_is_checked(method: str, run: Run, tmp_path: Path) -> None:
    onnx.save(window_model(), tmp_path / "theirs.onnx")
    made = make_foreign_bundle(
        str(tmp_path / "theirs.onnx"),
        run,
        Options(method=method, rows=200),  # type: ignore[arg-type]
        tmp_path / "bundle",
        window=ROWS,
        columns=slice(0, COLUMNS),
    )
    assert made.unchecked == ""
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.checks is not None
    for precision in ("int8", "fp32"):
        backend = OnnxBackend.open(bundle, precision=precision)
        x, out = np.zeros((1, bundle.n_features), np.float32), np.empty(3, np.float32)
        assert backend.infer(0, x, out) == 0
        x[0, -1] = np.nan  # in a feature that the model does not even take
        assert backend.infer(0, x, out) == CHECK_INPUT


def test_a_graph_that_takes_no_check_goes_without_and_says_why(run: Run, tmp_path: Path) -> None:
    model = window_model()
    model.graph.node[0].name = "check/theirs"
    onnx.save(model, tmp_path / "theirs.onnx")
    made = make_foreign_bundle(
        str(tmp_path / "theirs.onnx"),
        run,
        Options(method="dynamic", rows=200),
        tmp_path / "bundle",
        window=ROWS,
        columns=slice(0, COLUMNS),
    )
    assert "check/" in made.unchecked
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.checks is None
    assert bundle.manifest.training["value_check"] == made.unchecked
    x, out = np.full((1, bundle.n_features), np.nan, np.float32), np.empty(3, np.float32)
    assert OnnxBackend.open(bundle).infer(0, x, out) == 0
