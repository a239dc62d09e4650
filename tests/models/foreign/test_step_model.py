"""Other people's models: what is taken, what is refused and why, and the step made of a window."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engine import features
from engine.backends.onnx import OnnxBackend
from engine.bundle import load_bundle
from engine.manifest import StateSection
from feeds.errors import InputError
from models.dataset import Normalisation
from models.export import write_bundle
from models.foreign.check import load_onnx
from models.foreign.quantise import quantise_static
from models.foreign.step_model import as_step_model, window_feeds
from models.foreign.torch_module import load_torch

ROWS, COLUMNS, CLASSES = 6, 4, 3
FLOAT = TensorProto.FLOAT
value = helper.make_tensor_value_info


def graph_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, Any] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "foreign",
            inputs,
            outputs,
            [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()],
        ),
        opset_imports=[
            helper.make_opsetid(domain, version)
            for domain, version in (("", opset), ("com.microsoft", 1), ("of.theirs", 1))
        ],
        ir_version=10,
    )


def one_node(node: onnx.NodeProto, shape: tuple[Any, ...] = (1, 4), **more: Any) -> onnx.ModelProto:
    return graph_of([node], [value("x", FLOAT, shape)], [value("y", FLOAT, shape)], **more)


def window_model(
    shape: tuple[Any, ...] = (1, ROWS, COLUMNS), *, softmax: bool = False, seed: int = 0
) -> onnx.ModelProto:
    """Tanh of the flattened window, and a dense layer; in the names that ours have too."""
    rng = np.random.default_rng(seed)
    size = ROWS * COLUMNS
    nodes = [
        helper.make_node("Flatten", ["x"], ["history"], axis=len(shape) - 2),
        helper.make_node("Reshape", ["history", "flat"], ["row"]),
        helper.make_node("Tanh", ["row"], ["bent"]),
        helper.make_node("Gemm", ["bent", "w", "b"], ["logits"], name="head"),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["shares"], axis=-1))
    return graph_of(
        nodes,
        [value("x", FLOAT, shape)],
        [value("shares" if softmax else "logits", FLOAT, ["n", CLASSES])],
        {
            "flat": np.array([1, size]),
            "w": rng.normal(size=(size, CLASSES)).astype(np.float32),
            "b": rng.normal(size=CLASSES).astype(np.float32),
        },
    )


def saved(model: onnx.ModelProto, folder: Path, **options: Any) -> Path:
    path = folder / "theirs.onnx"
    onnx.save(model, path, **options)
    return path


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_steps(model: onnx.ModelProto, state: Any, rows: np.ndarray) -> np.ndarray:
    """Outputs (n, classes) of a step model over rows, from a fresh state."""
    step = session(model)
    kept = {item.input: item.fresh() for item in state}
    found = []
    for row in rows:
        logits, *after = step.run(None, {"x": row[None], **kept})
        kept = {item.input: array for item, array in zip(state, after, strict=True)}
        found.append(logits[0])
    return np.array(found)


def refusal(model: onnx.ModelProto, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_onnx(saved(model, folder))
    line = str(caught.value)
    assert "\n" not in line
    assert "theirs.onnx" in line
    return line


# Reading.


def test_a_dynamic_batch_becomes_one_and_exporters_notes_go(tmp_path: Path) -> None:
    theirs = window_model(("batch", ROWS, COLUMNS))
    helper.set_model_props(theirs, {"trace": "/home/somebody/model.py"})
    theirs.graph.node[0].doc_string = "/home/somebody/model.py"
    model = load_onnx(saved(theirs, tmp_path))
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 6, 4]
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [1, 3]
    assert b"somebody" not in model.SerializeToString()
    assert all(node.name for node in model.graph.node)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0.0, 0.999))
@example(share=0.974609375)  # only an operator set that nothing needs is lost
def test_a_cut_file_is_refused_unless_nothing_of_the_model_is_lost(
    share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = saved(window_model(), tmp_path_factory.mktemp("cut"))
    whole, data = load_onnx(path), path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    try:
        found = load_onnx(path)
    except InputError:
        return
    assert found.graph == whole.graph
    assert found.opset_import[0] == whole.opset_import[0]
    assert share > 0.9


def test_external_data_are_read_from_beside_the_file_and_missed(tmp_path: Path) -> None:
    options = {"save_as_external_data": True, "location": "theirs.data", "size_threshold": 0}
    path = saved(window_model(), tmp_path, **options)
    assert all(not t.external_data for t in load_onnx(path).graph.initializer)
    (tmp_path / "theirs.data").write_bytes((tmp_path / "theirs.data").read_bytes()[:50])
    with pytest.raises(InputError, match="external data"):
        load_onnx(path)
    (tmp_path / "theirs.data").unlink()
    with pytest.raises(InputError, match=r"external data.*copy them beside it"):
        load_onnx(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.onnx: cannot read the model"):
        load_onnx(tmp_path / "nothing.onnx")


def branch() -> onnx.ModelProto:
    out = value("inner", FLOAT, [1, 4])
    arms = [
        helper.make_graph([helper.make_node(op, ["x"], ["inner"])], op, [], [out])
        for op in ("Neg", "Identity")
    ]
    node = helper.make_node(
        "If", ["yes"], ["y"], name="choice", then_branch=arms[0], else_branch=arms[1]
    )
    return one_node(node, constants={"yes": np.array(True)})


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (branch(), r"node choice \(If\).*static step model"),
        (
            graph_of(
                [
                    helper.make_node("NonZero", ["x"], ["at"], name="where"),
                    helper.make_node("Cast", ["at"], ["y"], to=FLOAT),
                ],
                [value("x", FLOAT, [1, 4])],
                [value("y", FLOAT, [2, "n"])],
            ),
            r"node where \(NonZero\)",
        ),
        (
            one_node(helper.make_node("Swirl", ["x"], ["y"], "s1", domain="of.theirs")),
            r"node s1 \(Swirl of domain of\.theirs\)",
        ),
        (one_node(helper.make_node("Swirl", ["x"], ["y"], "s1")), r"node s1 \(Swirl\)"),
        (
            one_node(helper.make_node("Swirl", ["x"], ["y"], "s1", domain="com.microsoft")),
            r"node s1 \(Swirl\)",
        ),
        (
            graph_of(
                [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
                [value("x", FLOAT, [1, 4])],
                [value("y", FLOAT, [1, 2])],
                {"w": np.ones((5, 2), dtype=np.float32)},
            ),
            r"node product \(MatMul\).*Incompatible dimensions",
        ),
        (
            one_node(helper.make_node("Relu", ["x"], ["y"], "r"), (1, "time", 4)),
            r"input x, axis 1.*found time",
        ),
        (
            graph_of(
                [helper.make_node("Add", ["book", "trades"], ["y"])],
                [value("book", FLOAT, [1, 4]), value("trades", FLOAT, [1, 4])],
                [value("y", FLOAT, [1, 4])],
            ),
            r"exactly one book state.*book\[1, 4\], trades\[1, 4\]",
        ),
        (
            graph_of(
                [helper.make_node("Relu", ["x"], ["y"])],
                [value("x", TensorProto.DOUBLE, [1, 4])],
                [value("y", TensorProto.DOUBLE, [1, 4])],
            ),
            r"input x: the model does not take float32.*found float64",
        ),
    ],
    ids=[
        "control flow",
        "sizes",
        "domain",
        "operator",
        "contrib operator",
        "shapes",
        "dynamic axis",
        "two inputs",
        "double",
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line_that_names_it(
    model: onnx.ModelProto, said: str, tmp_path: Path
) -> None:
    line = refusal(model, tmp_path)
    assert re.search(said, line), line


def counter(past: str = "seen.past") -> onnx.ModelProto:
    """A step model of its own: the mean so far of four features, by a running sum."""
    return graph_of(
        [
            helper.make_node("Add", [past, "book"], ["seen.next"]),
            helper.make_node("Slice", ["seen.next", "from", "to", "axis"], ["sums"]),
        ],
        [value("book", FLOAT, [1, 4]), value(past, FLOAT, [1, 4])],
        [value("sums", FLOAT, [1, 3]), value("seen.next", FLOAT, [1, 4])],
        {"from": np.array([0]), "to": np.array([3]), "axis": np.array([1])},
    )


@pytest.mark.parametrize("past", ["seen.past", "seen"])
def test_a_step_model_with_state_of_its_own_only_gets_new_names(past: str, tmp_path: Path) -> None:
    theirs = load_onnx(saved(counter(past), tmp_path))
    model, state = as_step_model(
        theirs, n_features=4, columns=slice(None), window=1, n_classes=3, name="counter"
    )
    assert [item.name for item in model.graph.input] == ["x", past]
    assert [item.name for item in model.graph.output] == ["logits", "seen.next"]
    rows = np.arange(20, dtype=np.float32).reshape(5, 4)
    np.testing.assert_array_equal(run_steps(model, state, rows), np.cumsum(rows, axis=0)[:, :3])


# PyTorch.

NETWORKS = """
import torch
from torch import nn
from beside import WIDTH

class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)
        )
    def forward(self, x):
        return self.layers(x).softmax(1)

class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.cell, self.head = nn.GRUCell(4, 5), nn.Linear(5, 3)
    def forward(self, x, h):
        h = self.cell(x, h)
        return self.head(h), h

class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)

def dense(): return Dense(), torch.ones(1, 4)
def remembers(): return Remembers(), (torch.ones(1, 4), torch.zeros(1, 5))
def branches(): return Branches(), torch.ones(1, 4)
def random(): return Random(), torch.ones(1, 4)
def alone(): return Dense()
def broken(): raise KeyError("no weights")
number = 3
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    (folder / "beside.py").write_text("WIDTH = 4\n")
    (folder / "theirs.py").write_text(NETWORKS)
    return folder / "theirs.py"


def test_a_module_is_exported_in_evaluation_mode(networks: Path) -> None:
    model = load_torch(f"{networks}:dense")
    x = {"x": np.ones((1, 4), dtype=np.float32)}
    first, second = (session(model).run(None, x)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.sum() == pytest.approx(1.0)
    assert str(networks).encode() not in model.SerializeToString()
    assert model == load_torch(f"{networks}:dense")


def test_a_module_with_state_becomes_a_step_model_with_state(networks: Path) -> None:
    import torch

    torch.manual_seed(4)
    cell, head = torch.nn.GRUCell(4, 5), torch.nn.Linear(5, 3)
    model, state = as_step_model(
        load_torch(f"{networks}:remembers"),
        n_features=4,
        columns=slice(None),
        window=1,
        n_classes=3,
        name="gru",
    )
    assert [(item.input, item.shape) for item in state] == [("state.0", (1, 5))]
    rows = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    h, expected = torch.zeros(1, 5), []
    with torch.no_grad():
        for row in rows:
            h = cell(torch.from_numpy(row[None]), h)
            expected.append(head(h).numpy()[0])
    np.testing.assert_allclose(run_steps(model, state, rows), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("branches", "control flow or sizes that depend on data.*static step model"),
        ("random", "answers otherwise than the module.*randomness"),
        ("alone", r"expected \(torch.nn.Module, example input"),
        ("broken", "the model factory failed.*KeyError: 'no weights'"),
        ("nobody", "a function nobody in theirs.py"),
        ("number", "a function number in theirs.py; found int"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    networks: Path, factory: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_torch(f"{networks}:{factory}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("spec", ["theirs.py", "missing.py:dense", "theirs.py:not a name"])
def test_a_spec_that_names_no_factory_is_refused(networks: Path, spec: str) -> None:
    with pytest.raises(InputError, match=r"FILE\.py:FACTORY"):
        load_torch(str(networks.parent / spec))


# The step.


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (ROWS, COLUMNS),
        (1, ROWS, COLUMNS),
        (ROWS, 1, COLUMNS),
        (1, 1, ROWS, COLUMNS),
        (1, COLUMNS, ROWS),
        (1, COLUMNS, ROWS, 1),
        (COLUMNS, ROWS),
    ],
)
def test_a_step_over_rows_is_the_window_model_over_windows(
    shape: tuple[int, ...], softmax: bool
) -> None:
    picked = [5, 1, 0, 7]
    theirs = window_model(shape, softmax=softmax)
    model, state = as_step_model(
        theirs, n_features=9, columns=picked, window=ROWS, n_classes=CLASSES, name="window"
    )
    rows = np.random.default_rng(1).normal(size=(20, 9)).astype(np.float32)
    found = run_steps(model, state, rows)
    padded = np.concatenate([np.zeros((ROWS - 1, 9), dtype=np.float32), rows])[:, picked]
    window = session(window_model(shape))  # without the Softmax, which is cut off
    for number, logits in enumerate(found):
        seen = padded[number : number + ROWS]
        if shape.index(ROWS) > shape.index(COLUMNS):
            seen = seen.T
        (expected,) = window.run(None, {"x": seen.reshape(shape)})
        np.testing.assert_array_equal(logits, expected[0])


def test_a_step_model_names_its_ends_and_keeps_its_bytes() -> None:
    arguments = {"n_features": 9, "window": ROWS, "n_classes": CLASSES, "name": "window"}
    model, state = as_step_model(window_model(), columns=slice(2, 6), **arguments)
    assert [item.name for item in model.graph.input] == ["x", "history"]
    assert [item.name for item in model.graph.output] == ["logits", "history.next"]
    assert [(s.input, s.output, s.dtype, s.shape, s.initial) for s in state] == [
        ("history", "history.next", "float32", (ROWS - 1, COLUMNS), 0.0)
    ]
    assert {"w", "b"} <= {tensor.name for tensor in model.graph.initializer}
    assert "head" in {node.name for node in model.graph.node}
    again, _ = as_step_model(window_model(), columns=range(2, 6), **arguments)
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(
        deterministic=True
    )


def test_scores_in_another_shape_are_flattened() -> None:
    theirs = window_model()
    theirs.graph.node.append(helper.make_node("Reshape", ["logits", "three"], ["scores"]))
    theirs.graph.initializer.append(numpy_helper.from_array(np.array([3, 1]), "three"))
    theirs.graph.output[0].CopyFrom(value("scores", FLOAT, [3, 1]))
    arguments = {"n_features": 4, "columns": slice(None), "window": ROWS, "n_classes": 3}
    rows = np.random.default_rng(2).normal(size=(8, 4)).astype(np.float32)
    found = run_steps(*as_step_model(theirs, name="theirs", **arguments), rows)
    expected = run_steps(*as_step_model(window_model(), name="plain", **arguments), rows)
    np.testing.assert_array_equal(found, expected)


def test_a_square_window_needs_its_layout_said() -> None:
    rng = np.random.default_rng(5)
    theirs = graph_of(
        [
            helper.make_node("Slice", ["in", "start", "stop", "axes"], ["newest"]),
            helper.make_node("Reshape", ["newest", "shape"], ["out"]),
        ],
        [value("in", FLOAT, [1, 4, 4])],
        [value("out", FLOAT, [1, 4])],
        {
            "start": np.array([3]),
            "stop": np.array([4]),
            "axes": np.array([1]),
            "shape": np.array([1, 4]),
        },
    )
    arguments = {
        "n_features": 5,
        "columns": slice(4),
        "window": 4,
        "n_classes": 4,
        "name": "square",
    }
    with pytest.raises(InputError, match=r"cannot be told apart.*say which with the layout"):
        as_step_model(theirs, **arguments)
    rows = rng.normal(size=(6, 5)).astype(np.float32)
    found = run_steps(*as_step_model(theirs, layout="rows-columns", **arguments), rows)
    np.testing.assert_array_equal(found, rows[:, :4])
    turned = run_steps(*as_step_model(theirs, layout="columns-rows", **arguments), rows)
    np.testing.assert_array_equal(turned[-1], rows[-4:, 3])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 7}, r"no arrangement of the window.*7 rows of 4 columns.*found \[1, 6, 4\]"),
        ({"columns": [0, 1, 2]}, "no arrangement of the window"),
        ({"columns": [0, 1, 2, 9]}, "numbers from 0 to 8"),
        ({"columns": slice(9, 9)}, "numbers from 0 to 8"),
        ({"n_classes": 4}, r"one of 4 scores.*logits\[1, 3\]"),
        ({"window": 0}, "window: out of range"),
    ],
)
def test_what_does_not_fit_the_window_is_refused(change: dict[str, Any], said: str) -> None:
    arguments = {
        "n_features": 9,
        "columns": slice(4),
        "window": ROWS,
        "n_classes": CLASSES,
        "name": "window",
    } | change
    with pytest.raises(InputError, match=said):
        as_step_model(window_model(), **arguments)


def test_a_foreign_window_model_and_its_quantised_twin_are_served_by_the_engine(
    tmp_path: Path,
) -> None:
    n = features.N_FEATURES
    fp32, state = as_step_model(
        window_model(), n_features=n, columns=slice(4), window=ROWS, n_classes=3, name="theirs"
    )
    rows = np.random.default_rng(6).normal(size=(300, n)).clip(-4, 4).astype(np.float32)
    feeds = window_feeds(rows, columns=slice(4), window=ROWS)
    int8, _ = quantise_static(fp32, feeds)
    write_bundle(
        tmp_path / "bundle",
        "theirs",
        int8,
        fp32,
        numerics="tolerance",
        normalisation=Normalisation(np.zeros(n), np.ones(n), 4.0),
        classes=("down", "flat", "up"),
        state=StateSection(int8=state, fp32=state),
        bound=1e-3,
    )
    bundle = load_bundle(tmp_path / "bundle")
    named = {}
    for precision in ("fp32", "int8"):
        backend = OnnxBackend.open(bundle, precision=precision)
        out, found = np.zeros(3, dtype=np.float32), []
        for row in rows:
            backend.infer(0, row[None], out)
            found.append(out.copy())
        backend.close()
        named[precision] = np.array(found)
    np.testing.assert_allclose(named["fp32"], run_steps(fp32, state, rows), atol=1e-6)
    agreement = (named["int8"].argmax(axis=1) == named["fp32"].argmax(axis=1)).mean()
    assert agreement > 0.95
