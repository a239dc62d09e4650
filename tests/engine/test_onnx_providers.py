"""Devices of ONNX Runtime: named, wholly used or refused, and exact or refused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from engine.backends import onnx_providers
from engine.backends.hard_inputs import hard_inputs
from engine.backends.integer_reference import IntegerReference
from engine.backends.onnx import OnnxBackend
from engine.backends.onnx_providers import PROVIDERS, device_of, open_session
from engine.bundle import Bundle, load_bundle
from engine.trust import CHECK_INPUT, CHECK_LAYERS
from feeds.errors import InputError
from tests.engine import integer_graphs
from tests.engine.bundles import make_bundle
from tests.engine.pretended_gpu import Gpu, pretend

Made = tuple[Bundle, IntegerReference]
needs_openvino = pytest.mark.skipif(
    PROVIDERS["openvino"] not in ort.get_available_providers(),
    reason="this ONNX Runtime has no OpenVINO; onnxruntime-openvino takes its place",
)


@pytest.fixture(scope="module", params=[False, True], ids=["stateless", "stateful"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle with a value check, and the reference of its INT8 model."""
    folder = tmp_path_factory.mktemp("bundle")
    reference, _ = make_bundle(folder, stateful=request.param, checks=True)
    return load_bundle(folder), reference


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the kernels of the CPU, which play the GPU's."""
    monkeypatch.setattr("engine.backends.onnx.PROOF_SEQUENCES_ELSEWHERE", 2)


def inputs(bundle: Bundle, n: int, seed: int = 0) -> np.ndarray:
    """Normalised inputs, some of them saturated, some half way between two codes."""
    return integer_graphs.inputs(np.random.default_rng(seed), n, bundle.n_features)


def answers(backend: OnnxBackend, x: np.ndarray, stream: int = 0) -> tuple[np.ndarray, list[int]]:
    """Scores and masks row by row."""
    row = np.empty(backend.info().input_shape, np.float32)
    out = np.empty(backend.info().output_shape, np.float32)
    scores, masks = [], []
    for values in x:
        row[0] = values
        masks.append(backend.infer(stream, row, out))
        scores.append(out.copy())
    return np.array(scores), masks


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuba", "one of cpu, cuda, tensorrt, openvino, or one like cuda:0"),
        ("cuda:", "one of cpu, cuda, tensorrt, openvino, or one like cuda:0"),
        ("cuda:first", "a number below 256"),
        ("cuda:-1", "a number below 256"),
        ("cuda:256", "a number below 256"),
        ("cpu:0", "cpu alone"),
        ("", "one of cpu, cuda, tensorrt, openvino, or one like cuda:0"),
    ],
)
def test_a_device_that_cannot_be_is_refused_in_one_line(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, Gpu())
    with pytest.raises(InputError) as caught:
        device_of(name)
    assert caught.value.where == "model.device"
    assert caught.value.expected == expected
    assert "\n" not in str(caught.value)


def test_a_device_may_be_named_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Gpu())
    assert (device_of("cuda").index, device_of("cuda:3").index) == (0, 3)
    assert device_of("cpu").part == ""
    assert not device_of("cpu").on_gpu


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt", "openvino", "openvino:cpu"])
def test_a_provider_that_is_not_here_is_refused(device: str, made: Made) -> None:
    if PROVIDERS[device.partition(":")[0]] in ort.get_available_providers():
        pytest.skip("it is here")
    with pytest.raises(InputError, match=f"cannot run on {device}") as caught:
        OnnxBackend.open(made[0], device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("captures", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("kind", ["cuda", "tensorrt"])
def test_a_gpu_gives_the_bits_of_the_reference_and_the_masks_of_the_cpu(
    kind: str, captures: bool, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, reference = made
    x = inputs(bundle, 150)
    masks = answers(OnnxBackend.open(bundle), x)[1]
    gpu = pretend(monkeypatch, Gpu(kind, captures=captures))
    backend = OnnxBackend.open(bundle, f"{kind}:2")
    info = backend.info()
    assert (info.device, info.numerics) == (f"{kind}:2", "exact-int8")
    assert info.library.endswith("CUDA graph") == captures
    assert gpu.options[-1]["device_id"] == "2"
    assert gpu.captured == captures
    scores, found = answers(backend, x)
    assert scores.tobytes() == reference.run(x).tobytes()
    assert found == masks
    assert max(masks) >= CHECK_LAYERS, "inputs drive some layer into saturation"


def test_streams_on_a_gpu_do_not_mix_whichever_graph_is_replayed(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, reference = made
    gpu = pretend(monkeypatch, Gpu())
    backend = OnnxBackend.open(bundle, "cuda")
    streams = {stream: inputs(bundle, 30, seed=stream) for stream in (0, 3, 9)}
    found: dict[int, list[np.ndarray]] = {stream: [] for stream in streams}
    for i in range(30):
        for stream, x in streams.items():
            found[stream].append(answers(backend, x[i : i + 1], stream)[0][0])
    for stream, x in streams.items():
        assert np.array(found[stream]).tobytes() == reference.run(x).tobytes()
    backend.reset(3)
    again = answers(backend, streams[3][:5], 3)[0]
    assert again.tobytes() == reference.run(streams[3][:5]).tobytes()
    assert gpu.captured == 1


def test_state_stays_on_the_gpu_from_step_to_step(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = made
    gpu = pretend(monkeypatch, Gpu())
    backend = OnnxBackend.open(bundle, "cuda", precision="fp32")
    x = inputs(bundle, 20)
    answers(backend, x[:1])
    gpu.copies.clear()
    answers(backend, x)
    state = sum(tensor.nbytes for tensor in bundle.state("fp32"))
    scores = 4 * bundle.n_outputs
    assert gpu.copies["in"] == x.nbytes
    assert gpu.copies["within"] == 20 * 2 * state
    # The scores twice: the value check looks at them as well.
    assert gpu.copies["out"] == 20 * 2 * scores


def test_a_failed_step_on_a_gpu_leaves_the_state_as_it_was(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, reference = made
    gpu = pretend(monkeypatch, Gpu())
    backend = OnnxBackend.open(bundle, "cuda")
    x, wild = inputs(bundle, 12), inputs(bundle, 12, seed=5)
    expected = reference.run(x)
    for i in range(12):
        gpu.fails = True
        with pytest.raises(RuntimeError, match="the device is gone"):
            answers(backend, wild[i : i + 1])
        gpu.fails = False
        assert answers(backend, x[i : i + 1])[0][0].tobytes() == expected[i].tobytes()


def test_a_gpu_that_fails_from_the_start_is_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, Gpu(fails=True))
    with pytest.raises(InputError, match="cannot run the int8 model on cuda") as caught:
        OnnxBackend.open(made[0], "cuda")
    assert "the device is gone" in caught.value.found


def test_a_node_that_would_run_elsewhere_is_refused_by_its_name(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = made
    first, *_ = [node for node in onnx.load(bundle.int8_path).graph.node if node.op_type == "Gemm"]
    pretend(monkeypatch, Gpu(lacks={first.name}))
    with pytest.raises(InputError, match="cuda cannot run the whole model") as caught:
        OnnxBackend.open(bundle, "cuda")
    assert caught.value.where == f"{bundle.path}: node {first.name} (Gemm)"
    assert "\n" not in str(caught.value)


def test_the_fallback_is_found_even_where_onnx_runtime_allows_it(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = made
    gpu = pretend(monkeypatch, Gpu())
    true = onnx_providers._session

    def lax(*arguments: object, **keys: object) -> ort.InferenceSession:
        session = true(*arguments, **keys)  # type: ignore[arg-type]
        gpu.lacks = {"head"}
        return session

    monkeypatch.setattr(onnx_providers, "_session", lax)
    with pytest.raises(InputError, match=r"node head \(Gemm\)"):
        OnnxBackend.open(bundle, "cuda")


def test_a_driver_that_is_not_there_is_no_cpu_in_disguise(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, Gpu(driver=False))
    with pytest.raises(InputError, match="fell back from cuda"):
        OnnxBackend.open(made[0], "cuda")


def test_a_model_that_cannot_be_served_at_all_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="cannot serve the int8 model on cpu") as caught:
        open_session(b"no model", device_of("cpu"), 1, "int8", "here")
    assert caught.value.where == "here"


def test_full_float32_is_asked_for(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = made
    gpu = pretend(monkeypatch, Gpu())
    OnnxBackend.open(bundle, "cuda", precision="fp32")
    assert gpu.options[-1]["use_tf32"] == "0"


def test_a_gpu_that_adds_the_zero_point_before_it_rounds_is_found_out(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just beside a tie float32 then lacks the bits: what OpenVINO 2026.4 does."""
    bundle, _ = made
    pretend(monkeypatch, Gpu())
    true = OnnxBackend.infer
    step = np.ldexp(np.float32(1), integer_graphs.X_EXPONENT)
    zero = np.float32(integer_graphs.X_ZERO)

    def shifted(self: OnnxBackend, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        codes = np.rint(x / step + zero) - zero
        return true(self, stream, (codes * step).astype(np.float32), out)

    monkeypatch.setattr(OnnxBackend, "infer", shifted)
    with pytest.raises(InputError, match="is not exact on this machine") as caught:
        OnnxBackend.open(bundle, "cuda")
    assert caught.value.fix == "use cpu"


@pytest.mark.parametrize("off", [1.0, np.nan])
def test_a_gpu_that_does_not_keep_a_tolerance_is_refused(
    off: float, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = made
    pretend(monkeypatch, Gpu())
    true = OnnxBackend.infer

    def wrong(self: OnnxBackend, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        mask = true(self, stream, x, out)
        out[0] += off
        return mask

    assert OnnxBackend.open(bundle, "cuda", precision="fp32").info().numerics == "tolerance"
    monkeypatch.setattr(OnnxBackend, "infer", wrong)
    with pytest.raises(InputError, match="does not keep its tolerance"):
        OnnxBackend.open(bundle, "cuda", precision="fp32")


def test_inputs_that_cannot_be_are_seen_beside_a_gpu_as_on_the_cpu(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = made
    # NaN last: what a float state makes of it stays.
    x = np.zeros((6, bundle.n_features), dtype=np.float32)
    x[1, 5], x[3, 0], x[5, 7] = 4.5, -1e30, np.nan
    for precision in ("int8", "fp32"):
        expected = answers(OnnxBackend.open(bundle, precision=precision), x)[1]
        assert all(mask & CHECK_INPUT for mask in expected[1::2])
        with monkeypatch.context() as patch:
            pretend(patch, Gpu())
            found = answers(OnnxBackend.open(bundle, "cuda", precision=precision), x)[1]
        assert found == expected


def test_a_bundle_without_a_check_has_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = make_bundle(tmp_path)
    bundle = load_bundle(tmp_path)
    pretend(monkeypatch, Gpu())
    x = inputs(bundle, 10)
    scores, masks = answers(OnnxBackend.open(bundle, "cuda"), x)
    assert scores.tobytes() == reference.run(x).tobytes()
    assert masks == [0] * 10


def test_a_closed_gpu_answers_no_more(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Gpu())
    backend = OnnxBackend.open(made[0], "cuda")
    backend.close()
    with pytest.raises(AssertionError, match="closed"):
        answers(backend, inputs(made[0], 1))


def opened(bundle: Bundle, device: str) -> OnnxBackend | InputError:
    """The backend, or why there is none."""
    try:
        return OnnxBackend.open(bundle, device)
    except InputError as error:
        return error


@needs_openvino
def test_openvino_is_exact_or_refused(
    made: Made, reference_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for folder in (made[0].path, reference_bundle):
        bundle = load_bundle(folder)
        found = opened(bundle, "openvino")
        if isinstance(found, InputError):
            assert found.what == "this model declares exact-int8, and is not exact on this machine"
            continue
        reference = IntegerReference(bundle.model_bytes("int8"), bundle.state("int8"))
        steps = (2.0**integer_graphs.X_EXPONENT,)
        rows = hard_inputs(np.random.default_rng(7), (1, bundle.n_features), bundle.clip, steps)
        x = np.concatenate(list(islice(rows, 1_000)))
        assert answers(found, x)[0].tobytes() == reference.run(x).tobytes()


@needs_openvino
def test_openvino_serves_the_float_twin_with_its_mask(made: Made) -> None:
    bundle, _ = made
    x = inputs(bundle, 200)
    x[-2, 3] = np.inf
    x[-1, 0] = np.nan
    scores, masks = answers(OnnxBackend.open(bundle, precision="fp32"), x)
    found, seen = answers(OnnxBackend.open(bundle, "openvino", precision="fp32"), x)
    # What a clipped NaN is, ONNX leaves open: there only the input is sure to be called bad.
    assert seen[-1] & CHECK_INPUT
    assert seen[:-1] == masks[:-1]
    np.testing.assert_allclose(found[:-1], scores[:-1], rtol=1e-4, atol=1e-4)


@needs_openvino
def test_openvino_names_the_nodes_that_it_does_not_take() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"], name="relu"),
        helper.make_node("Det", ["positive"], ["det"], name="determinant"),
        helper.make_node("Add", ["det", "det"], ["y"], name="twice"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 3, 3]), ("y", [1]))
    ]
    graph = helper.make_graph(nodes, "test", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    with pytest.raises(InputError, match=r"determinant \(Det\)"):
        open_session(model.SerializeToString(), device_of("openvino"), 1, "fp32", "here")
