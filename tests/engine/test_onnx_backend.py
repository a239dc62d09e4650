"""The reference backend: its bits, its fused graph, its devices, its cost in memory."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from engine.backends import registry
from engine.backends.answers import MAX_IN_FLIGHT
from engine.backends.integer_reference import IntegerReference
from engine.backends.onnx import OnnxBackend, host_isa
from engine.backends.onnx_providers import PROVIDERS, session_options
from engine.bundle import Bundle, load_bundle
from engine.manifest import INT8_NAME
from feeds.errors import InputError
from tests.engine import integer_graphs, onnx_sessions
from tests.engine.bundles import make_bundle, write_manifest

DENSE_LAYERS = 3
Made = tuple[Bundle, IntegerReference]


@pytest.fixture(params=onnx_sessions.KINDS, autouse=True)
def each_session(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said here holds for both kinds of session."""
    onnx_sessions.use(request.param, monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle, and the reference of its INT8 model."""
    folder = tmp_path_factory.mktemp("bundle")
    reference, _ = make_bundle(folder)
    return load_bundle(folder), reference


def inputs(bundle: Bundle, n: int, seed: int = 0) -> np.ndarray:
    """Normalised inputs, some of them saturated, some half way between two codes."""
    return integer_graphs.inputs(np.random.default_rng(seed), n, bundle.n_features)


def answers(backend: OnnxBackend, x: np.ndarray, n_outputs: int) -> np.ndarray:
    """Outputs row by row through one pair of arrays, as the pipeline does it."""
    row, out = np.empty((1, x.shape[1]), np.float32), np.empty(n_outputs, np.float32)
    found = np.empty((len(x), n_outputs), np.float32)
    for i in range(len(x)):
        row[0] = x[i]
        backend.infer(0, row, out)
        found[i] = out
    return found


def test_info_says_what_answers(made: Made) -> None:
    bundle, _ = made
    info = OnnxBackend.open(bundle, "cpu").info()
    assert (info.name, info.device, info.precision) == ("onnx", "cpu", "int8")
    assert info.numerics == "exact-int8"
    assert info.input_shape == (1, bundle.n_features)
    assert info.output_shape == (3,)
    assert info.input_dtype == info.output_dtype == "float32"
    assert info.model_hash == bundle.model_hash
    assert info.isa == host_isa()
    assert OnnxBackend.open(bundle, precision="fp32").info().numerics == "tolerance"


@pytest.mark.parametrize("threads", [1, 2])
def test_int8_is_bit_for_bit_the_integer_reference(made: Made, threads: int) -> None:
    bundle, reference = made
    x = inputs(bundle, 1_500)
    found = answers(OnnxBackend.open(bundle, threads=threads), x, 3)
    assert found.tobytes() == reference.run(x).tobytes()


def test_threads_do_not_change_the_float_twin(made: Made) -> None:
    bundle, _ = made
    x = inputs(bundle, 500)
    one = answers(OnnxBackend.open(bundle, precision="fp32", threads=1), x, 3)
    two = answers(OnnxBackend.open(bundle, precision="fp32", threads=2), x, 3)
    assert one.tobytes() == two.tobytes()


def test_every_dense_layer_is_one_fused_integer_node(made: Made, tmp_path: Path) -> None:
    bundle, _ = made
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(bundle.model_bytes("int8"), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert nodes == ["QuantizeLinear"] + ["QGemm"] * DENSE_LAYERS


def test_a_model_that_claims_to_be_exact_and_is_not_does_not_open(tmp_path: Path) -> None:
    _, manifest = make_bundle(tmp_path)
    model = onnx.load(tmp_path / INT8_NAME)
    scales = {node.input[1] for node in model.graph.node if node.op_type.endswith("Linear")}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            scale = onnx.numpy_helper.to_array(tensor) * np.float32(1.1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    data = model.SerializeToString()
    (tmp_path / INT8_NAME).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    manifest = msgspec.structs.replace(manifest, int8_sha256=digest)
    write_manifest(tmp_path, manifest)
    with pytest.raises(InputError, match="not exact on this machine"):
        OnnxBackend.open(load_bundle(tmp_path))
    write_manifest(tmp_path, msgspec.structs.replace(manifest, numerics="tolerance"))
    assert OnnxBackend.open(load_bundle(tmp_path)).info().numerics == "tolerance"


def test_other_arrays_may_come_at_any_time(made: Made) -> None:
    bundle, reference = made
    backend = OnnxBackend.open(bundle)
    x = inputs(bundle, 6)
    expected = reference.run(x)
    rows = [x[i : i + 1].copy() for i in range(6)]
    outs = [np.empty(3, np.float32) for _ in range(2)]
    for i in (0, 1, 1, 2, 0, 5, 4, 3, 0):
        backend.infer(i, rows[i], outs[i % 2])
        assert outs[i % 2].tobytes() == expected[i].tobytes()


def test_arrays_of_another_shape_type_or_layout_are_refused(
    made: Made,
) -> None:
    bundle, _ = made
    backend = OnnxBackend.open(bundle)
    n = bundle.n_features
    x, out = np.zeros((1, n), np.float32), np.zeros(3, np.float32)
    frozen = np.zeros(3, np.float32)
    frozen.flags.writeable = False
    for bad_x, bad_out in (
        (np.zeros((1, n)), out),
        (np.zeros((1, n + 1), np.float32), out),
        (np.zeros(n, np.float32), out),
        (np.zeros((1, 2 * n), np.float32)[:, ::2], out),
        (x, np.zeros(4, np.float32)),
        (x, np.zeros(3)),
        (x, frozen),
    ):
        with pytest.raises(AssertionError):
            backend.infer(0, bad_x, bad_out)


def test_inference_keeps_no_memory(made: Made) -> None:
    bundle, _ = made
    backend = OnnxBackend.open(bundle)
    x, out = np.zeros((1, bundle.n_features), np.float32), np.empty(3, np.float32)

    def growth() -> int:
        before = sys.getallocatedblocks()
        for _ in range(10_000):
            backend.infer(0, x, out)
        return sys.getallocatedblocks() - before

    # A few blocks are this loop's own integers; a leak would take 10,000.
    assert min(growth() for _ in range(3)) < 10


def test_submitted_inferences_come_back_in_order(made: Made) -> None:
    bundle, reference = made
    backend = OnnxBackend.open(bundle)
    x = inputs(bundle, MAX_IN_FLIGHT + 1)
    expected = reference.run(x)
    out = np.zeros(3, np.float32)
    for round_start in (0, 1_000):
        assert backend.poll(out) == -1
        for i in range(MAX_IN_FLIGHT):
            assert backend.submit(0, round_start + i, x[i : i + 1])
        assert not backend.submit(0, 7, x[:1]), "full: refused, not lost"
        for i in range(MAX_IN_FLIGHT):
            assert backend.poll(out) == round_start + i
            assert out.tobytes() == expected[i].tobytes()
    assert backend.poll(out) == -1


def test_a_closed_backend_answers_no_more(made: Made) -> None:
    bundle, _ = made
    backend = OnnxBackend.open(bundle)
    x, out = np.zeros((1, bundle.n_features), np.float32), np.empty(3, np.float32)
    backend.infer(0, x, out)
    backend.reset(0)
    backend.close()
    with pytest.raises(AssertionError, match="closed"):
        backend.infer(0, x, out)


def test_devices_that_are_not_here_are_refused(made: Made) -> None:
    bundle, _ = made
    absent = [
        name
        for name, provider in PROVIDERS.items()
        if provider not in ort.get_available_providers()
    ]
    for device in absent:
        with pytest.raises(InputError) as caught:
            OnnxBackend.open(bundle, device)
        assert caught.value.where == "model.device"
        assert caught.value.expected == PROVIDERS[device]
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="did you mean cuda"):
        OnnxBackend.open(bundle, "cuba")


def test_falling_back_to_another_device_is_an_error(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = made
    onnx_sessions.use("python", monkeypatch)
    monkeypatch.setattr(
        ort.InferenceSession, "get_providers", lambda _: ["SomeOtherExecutionProvider"]
    )
    with pytest.raises(InputError, match="fell back"):
        OnnxBackend.open(bundle, "cpu")


def test_impossible_thread_counts_and_precisions(made: Made) -> None:
    bundle, _ = made
    for threads in (0, -1, 100_000):
        with pytest.raises(InputError, match=r"model\.threads"):
            OnnxBackend.open(bundle, threads=threads)
    with pytest.raises(InputError, match=r"model\.precision"):
        OnnxBackend.open(bundle, precision="int4")


def test_a_failure_of_the_runtime_is_a_runtime_error(made: Made) -> None:
    bundle, _ = made
    backend = OnnxBackend.open(bundle)
    x, out = np.zeros((1, bundle.n_features), np.float32), np.empty(3, np.float32)
    backend.infer(0, x, out)
    failing = onnx_sessions.Failing(backend)
    failing.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match=onnx_sessions.GONE):
            backend.infer(0, x, out)
    failing.fails = False
    backend.infer(0, x, out)


def test_registry_finds_the_built_in_backend() -> None:
    assert registry.find_backend("onnx") is OnnxBackend
    assert "onnx" in registry.backend_names()


def test_registry_refuses_an_unknown_name_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean onnx"):
        registry.find_backend("onx")
    with pytest.raises(InputError, match=r"model\.backend"):
        registry.find_backend("something else")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("no.such.module:Backend", "cannot load"),
        ("engine.backends.onnx:Absent", "cannot load"),
        ("engine.bundle:Bundle", "not a backend"),
    ],
)
def test_registry_says_what_is_wrong_with_a_third_partys(
    value: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = registry.EntryPoint("theirs", value, registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [point])
    assert set(registry.backend_names()) == {*registry.BUILT_IN, "theirs"}
    with pytest.raises(InputError, match=what):
        registry.find_backend("theirs")


def test_registry_finds_a_third_partys_and_refuses_two_of_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = registry.EntryPoint("theirs", "engine.backends.onnx:OnnxBackend", registry.GROUP)
    other = registry.EntryPoint("theirs", "engine.backends.other:Backend", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [good])
    assert registry.find_backend("theirs") is OnnxBackend
    monkeypatch.setattr(registry, "entry_points", lambda **_: [good, other])
    with pytest.raises(InputError, match="two installed packages"):
        registry.find_backend("theirs")
