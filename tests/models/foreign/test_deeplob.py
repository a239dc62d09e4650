"""DeepLOB with weights that others trained: the same network in ONNX, and in INT8 on real rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from feeds.errors import InputError
from feeds.tape_reader import TapeReader
from feeds.venues.convert import convert
from models.dataset import Rows, collect
from models.foreign.deeplob import (
    CHOSEN,
    CLASSES,
    COLUMNS,
    WIDE_LAYERS,
    WINDOW,
    DeepLob,
    Setting,
    deeplob,
    deeplob_onnx,
    measure_deeplob,
    windows,
)
from models.foreign.runtime import opened
from models.foreign.step_model import as_step_model


@pytest.fixture(scope="module", params=["h10", "h50"])
def npz(request: pytest.FixtureRequest, data_dir: Path) -> Path:
    return data_dir / "models" / f"deeplob_btc_{request.param}.npz"


@pytest.fixture(scope="module")
def rows(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What the engine would have inferred on in 345 seconds of BTCUSDT."""
    tape = tmp_path_factory.mktemp("tape") / "usdm.tape"
    convert(data_dir / "binance" / "usdm_btcusdt_20240808.gz", "binance-usdm", out=tape)
    reader = TapeReader(tape)
    return collect(reader.chunks(), reader.meta.instruments)


def made_up_rows(starts: list[int], n: int) -> Rows:
    facts = [np.arange(n)] * 5
    begins = np.isin(np.arange(n), starts)
    return Rows(np.arange(n * COLUMNS, dtype=float).reshape(n, COLUMNS), *facts, begins)


def untrained(path: Path) -> Path:
    """Arrays of the network as it is initialised, statistics drawn so that folding matters."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    arrays = {name: value.numpy() for name, value in DeepLob().state_dict().items()}
    for name, array in arrays.items():
        if name.endswith("running_var"):
            arrays[name] = rng.uniform(0.1, 2.0, array.shape).astype(np.float32)
        elif name.endswith("running_mean"):
            arrays[name] = rng.normal(size=array.shape).astype(np.float32)
    np.savez(path, **arrays)
    return path


def answers(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = opened(model)
    return np.concatenate([session.run(["logits"], {"x": each})[0] for each in x])


def test_folded_or_not_the_graph_is_the_network(tmp_path: Path) -> None:
    path = untrained(tmp_path / "untrained.npz")
    x = np.random.default_rng(0).normal(size=(8, 1, 1, WINDOW, COLUMNS)).astype(np.float32)
    with torch.no_grad():
        expected = deeplob(path)(torch.from_numpy(x[:, 0])).numpy()
    for folded, norms in ((False, 14), (True, 6)):
        model = deeplob_onnx(path, folded=folded)
        operators = [node.op_type for node in model.graph.node]
        assert operators.count("BatchNormalization") == norms
        assert operators.count("LSTM") == 1
        np.testing.assert_allclose(answers(model, x), expected, rtol=1e-4, atol=1e-5)


def test_nodes_are_named_as_their_layers(tmp_path: Path) -> None:
    names = {node.name for node in deeplob_onnx(untrained(tmp_path / "w.npz")).graph.node}
    assert {*WIDE_LAYERS, "conv1.0", "inp1.0", "inp3.1", "lstm", "fc1"} <= names


def test_the_graph_becomes_a_step_of_the_engine(tmp_path: Path) -> None:
    model = deeplob_onnx(untrained(tmp_path / "w.npz"))
    step, (history,) = as_step_model(
        model, n_features=96, columns=slice(COLUMNS), window=WINDOW, n_classes=CLASSES, name="lob"
    )
    assert history.shape == (WINDOW - 1, COLUMNS)
    x = np.random.default_rng(0).normal(size=(WINDOW, 96)).astype(np.float32)
    session, past = opened(step), history.fresh()
    for row in x:
        logits, past = session.run(None, {"x": row[None], "history": past})
    np.testing.assert_array_equal(logits, answers(model, x[None, None, None, :, :COLUMNS]))


def test_other_arrays_are_refused_by_name(tmp_path: Path) -> None:
    path = untrained(tmp_path / "w.npz")
    arrays = dict(np.load(path, allow_pickle=False))
    np.savez(tmp_path / "less.npz", **{k: v for k, v in arrays.items() if k != "fc1.bias"})
    with pytest.raises(InputError, match=r"fc1\.bias.*found no such array"):
        deeplob(tmp_path / "less.npz")
    np.savez(tmp_path / "wide.npz", **arrays | {"fc1.bias": np.zeros(5, dtype=np.float32)})
    with pytest.raises(InputError, match=r"fc1\.bias.*expected \(3,\); found \(5,\)"):
        deeplob(tmp_path / "wide.npz")
    (tmp_path / "text.npz").write_text("not arrays")
    with pytest.raises(InputError, match="cannot read the weights"):
        deeplob(tmp_path / "text.npz")


def test_no_window_crosses_a_stream_or_leaves_its_third() -> None:
    rows = made_up_rows([0, 250, 1_300], 1_500)
    first, last = windows(rows, clip=1e9)
    assert len(first) == (250 - WINDOW + 1) + (250 - WINDOW + 1)
    # All of the last third, but the rows whose window would reach before row 1300.
    assert len(last) == 500 - (WINDOW - 1)
    for seen in (*first, *last):
        steps = np.diff(seen[0, 0, :, 0])
        assert seen.shape == (1, 1, WINDOW, COLUMNS)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    with pytest.raises(InputError, match="too few rows"):
        windows(made_up_rows([0], 500))


def test_int8_names_the_class_of_fp32_on_real_rows(npz: Path, rows: Rows) -> None:
    wide_too = Setting("percentile-99.9")
    found = measure_deeplob(npz, rows, settings=(CHOSEN, wide_too), most=400)
    chosen, all_int8 = found["settings"]
    assert 350 <= found["windows"] <= 400
    assert min(found["predicted"]) > 0.05 * found["windows"]  # it is no constant that agrees
    assert chosen["agreement"] >= 0.95
    assert chosen["agreement"] > all_int8["agreement"]
    assert chosen["size_ratio"] < 0.4
    assert chosen["fused"]["QLinearConv"] == 14 - len(WIDE_LAYERS)
    assert chosen["fused"]["Conv"] == len(WIDE_LAYERS)
    assert chosen["fused"]["DynamicQuantizeLSTM"] == 1
    assert all_int8["fused"]["QLinearConv"] == 14
