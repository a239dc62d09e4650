"""Loading a bundle: what is taken, and how everything else is refused."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from engine import features
from engine.bundle import check_files, load_bundle
from engine.manifest import (
    FP32_NAME,
    INT8_NAME,
    MANIFEST_NAME,
    METADATA_KEY,
    CheckSection,
    Manifest,
    StateSection,
    StateTensor,
    model_hash,
)
from feeds.errors import InputError
from tests.engine.bundles import make_bundle, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good bundle."""
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def stateful(tmp_path: Path) -> Path:
    """A good bundle of models that remember."""
    make_bundle(tmp_path / "stateful", stateful=True)
    return tmp_path / "stateful"


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    """A good bundle of models that remember, with a value check."""
    make_bundle(tmp_path / "checked", stateful=True, checks=True)
    return tmp_path / "checked"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest by hand: its hash is not brought up to date."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def sign(folder: Path, **changes: Any) -> None:
    """Bring digests and hash up to date, as somebody who knows the format would."""
    manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
    digests = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (INT8_NAME, FP32_NAME)
    ]
    changes |= {"int8_sha256": digests[0], "fp32_sha256": digests[1]}
    write_manifest(folder, msgspec.structs.replace(manifest, **changes))


def refusal(folder: Path) -> InputError:
    """The one line with which a bundle is refused."""
    with pytest.raises(InputError) as caught:
        load_bundle(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in caught.value.where
    return caught.value


def test_a_good_bundle_says_what_the_engine_needs(tmp_path: Path) -> None:
    _, manifest = make_bundle(tmp_path)
    bundle = load_bundle(tmp_path)
    assert bundle.path == tmp_path
    assert bundle.name == "small"
    assert bundle.numerics == "exact-int8"
    assert bundle.classes == ("down", "flat", "up")
    assert bundle.n_outputs == 3
    assert bundle.n_features == features.N_FEATURES
    assert bundle.feature_hash == features.SCHEMA_HASH
    assert f"{bundle.model_hash:016x}" == manifest.model_hash
    assert bundle.state("int8") == bundle.state("fp32") == ()
    assert bundle.int8_path.is_file()
    assert bundle.fp32_path.is_file()
    for array, written in (
        (bundle.mean, manifest.input.mean),
        (bundle.inv_scale, manifest.input.inv_scale),
    ):
        assert array.dtype == np.float64
        assert array.flags.c_contiguous
        assert tuple(array) == written  # every float survives the JSON


def test_both_models_carry_the_feature_schema(folder: Path) -> None:
    for name in (INT8_NAME, FP32_NAME):
        props = {entry.key: entry.value for entry in onnx.load(folder / name).metadata_props}
        assert props == {METADATA_KEY: features.SCHEMA_HEX}


def test_loading_imports_neither_onnx_nor_torch(folder: Path) -> None:
    code = (
        "import sys; from engine.bundle import load_bundle;"
        "from engine.backends.registry import open_backend;"
        "open_backend('onnx', load_bundle(sys.argv[1]));"
        "sys.exit(int('onnx' in sys.modules or 'torch' in sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, check=False)
    assert done.returncode == 0


def test_the_hash_follows_what_is_computed_and_nothing_else(tmp_path: Path) -> None:
    _, manifest = make_bundle(tmp_path)
    known = model_hash(manifest)
    replace = msgspec.structs.replace
    for same in (
        replace(manifest, name="other"),
        replace(manifest, training={"note": 1}),
        replace(manifest, model_hash="00"),
        replace(manifest, bound=1e-6),
        replace(manifest, files={"report.html": "00" * 32}),
    ):
        assert model_hash(same) == known
    tensor = StateTensor("h", "h.next", "uint8", (1, 8), 128.0)
    mean = (math.nextafter(manifest.input.mean[0], 9.0), *manifest.input.mean[1:])
    for other in (
        replace(manifest, numerics="tolerance"),
        replace(manifest, feature_schema="00"),
        replace(manifest, int8_sha256="00"),
        replace(manifest, fp32_sha256="00"),
        replace(manifest, input=replace(manifest.input, mean=mean)),
        replace(manifest, input=replace(manifest.input, clip=5.0)),
        replace(manifest, output=replace(manifest.output, classes=("up", "flat", "down"))),
        replace(manifest, state=StateSection(int8=(tensor,))),
        replace(manifest, state=StateSection(fp32=(tensor,))),
        replace(manifest, state=StateSection(int8=(replace(tensor, initial=1.0),))),
        replace(manifest, checks=CheckSection("violations", (), (1.0,), (0,))),
    ):
        assert model_hash(other) != known


def test_layout_of_the_manifest_changes_no_hash(folder: Path) -> None:
    known = load_bundle(folder).model_hash
    path = folder / MANIFEST_NAME
    data = dict(reversed(json.loads(path.read_text()).items()))
    path.write_text(json.dumps(data, separators=(",", ":")))
    assert load_bundle(folder).model_hash == known


def test_no_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").found == "nothing"
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file").found == "a file"


@pytest.mark.parametrize("name", [MANIFEST_NAME, INT8_NAME, FP32_NAME])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder).where == str(folder / name)


@pytest.mark.parametrize("name", [INT8_NAME, FP32_NAME])
def test_one_flipped_bit_of_a_model_is_found(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    error = refusal(folder)
    assert error.where == str(path)
    assert hashlib.sha256(data).hexdigest() in error.found


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_model_cut_short_and_signed_all_the_same(folder: Path, keep: int) -> None:
    path = folder / INT8_NAME
    path.write_bytes(path.read_bytes()[:keep])
    sign(folder)
    assert refusal(folder).where.startswith(str(path))


def test_a_file_that_is_no_onnx(folder: Path) -> None:
    (folder / FP32_NAME).write_bytes(b"PK\x03\x04 not a model" * 50)
    sign(folder)
    assert refusal(folder).where == str(folder / FP32_NAME)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 2}', b"null"])
def test_a_manifest_that_is_none(folder: Path, data: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(data)
    assert refusal(folder).where == str(folder / MANIFEST_NAME)


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("", "numeric", "numerics"),
        ("input", "clipp", "clip"),
        ("output", "clases", "classes"),
        ("state", "int9", "int8"),
        ("checks", "max_constants", "max_constant"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(
    checked: Path, section: str, key: str, nearest: str
) -> None:
    edit_manifest(checked, lambda m: (m[section] if section else m).update({key: 1}))
    error = refusal(checked)
    assert error.where.endswith(f"{section}.{key}" if section else key)
    assert nearest in error.fix


def test_an_unknown_key_of_a_state_tensor_is_refused_with_the_nearest(stateful: Path) -> None:
    edit_manifest(stateful, lambda m: m["state"]["int8"][1].update(shap=[1]))
    error = refusal(stateful)
    assert error.where == f"{stateful / MANIFEST_NAME}: state.int8[1].shap"
    assert "shape" in error.fix


@pytest.mark.parametrize("number", [1, 3])
def test_another_format_is_refused_as_such_whatever_keys_it_has(folder: Path, number: int) -> None:
    edit_manifest(folder, lambda m: (m.update(format=number, other=1), m.pop("state")))
    error = refusal(folder)
    assert error.where == f"{folder / MANIFEST_NAME}: format"
    assert (error.expected, error.found) == ("2", str(number))


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("format", lambda m: m.update(format=1)),
    ("feature_schema", lambda m: m.update(feature_schema="0" * 64)),
    ("input.mean", lambda m: m["input"]["mean"].pop()),
    ("input.inv_scale", lambda m: m["input"]["inv_scale"].append(1.0)),
    ("input.inv_scale[3]", lambda m: m["input"]["inv_scale"].__setitem__(3, 0.0)),
    ("input.inv_scale[0]", lambda m: m["input"]["inv_scale"].__setitem__(0, -1.0)),
    ("input.clip", lambda m: m["input"].update(clip=0)),
    ("output.classes", lambda m: m["output"].update(classes=["up", "up", "down"])),
    ("output.classes", lambda m: m["output"].update(classes=[])),
    ("model_hash", lambda m: m["input"].update(clip=3.5)),
    ("model_hash", lambda m: m.update(model_hash="0" * 16)),
    ("model_hash", lambda m: m["state"]["int8"][0].update(initial=127)),
    ("bound", lambda m: m.update(bound=-1.0)),
    ("bound", lambda m: m.update(bound=1e-9)),
    ("files", lambda m: m.update(files={"../model": "0" * 64})),
    ("files", lambda m: m.update(files={"/etc/hosts": "0" * 64})),
    ("files", lambda m: m.update(files={INT8_NAME: "0" * 64})),
    ("files.report.html", lambda m: m.update(files={"report.html": "0" * 63})),
    ("state.int8[0].input", lambda m: m["state"]["int8"][0].update(input="x")),
    ("state.int8[0].output", lambda m: m["state"]["int8"][0].update(output="logits")),
    ("state.int8[1].input", lambda m: m["state"]["int8"][1].update(input="delay.last")),
    ("state.int8[0].shape", lambda m: m["state"]["int8"][0].update(shape=[1, 0])),
    ("state.int8[0].initial", lambda m: m["state"]["int8"][0].update(initial=0.5)),
    ("state.int8[0].initial", lambda m: m["state"]["int8"][0].update(initial=256)),
    ("state.int8[1].initial", lambda m: m["state"]["int8"][1].update(initial=0.1)),
    ("state.int8[1].initial", lambda m: m["state"]["int8"][1].update(initial=1e300)),
    ("state.fp32", lambda m: m["state"]["fp32"][0].update(shape=[1 << 30])),
]


@pytest.mark.parametrize(("key", "change"), CHANGES)
def test_values_that_cannot_be_served_name_their_key(
    stateful: Path, key: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit_manifest(stateful, change)
    error = refusal(stateful)
    assert error.where == f"{stateful / MANIFEST_NAME}: {key}"
    assert error.expected
    assert error.found
    assert error.fix


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", '"1"', "null"])
def test_numbers_that_are_none_are_refused(folder: Path, number: str) -> None:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["input"]["mean"][2] = "HERE"
    path.write_text(json.dumps(manifest).replace('"HERE"', number))
    assert str(path) in refusal(folder).where


def test_other_numerics_are_refused(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(numerics="exact"))
    assert refusal(folder).where == str(folder / MANIFEST_NAME)


@pytest.mark.parametrize(
    ("which", "name"), [("int8_schema", INT8_NAME), ("fp32_schema", FP32_NAME)]
)
def test_a_model_made_for_other_features(tmp_path: Path, which: str, name: str) -> None:
    make_bundle(tmp_path, **{which: "ab" * 32})
    error = refusal(tmp_path)
    assert error.where == f"{tmp_path / name}: metadata_props {METADATA_KEY}"
    assert error.expected == features.SCHEMA_HEX
    assert error.found == "ab" * 32


def test_a_model_of_another_width(tmp_path: Path) -> None:
    make_bundle(tmp_path / "wide", n_features=features.N_FEATURES + 1)
    make_bundle(tmp_path / "good")
    (tmp_path / "good" / FP32_NAME).write_bytes((tmp_path / "wide" / FP32_NAME).read_bytes())
    sign(tmp_path / "good")
    error = refusal(tmp_path / "good")
    assert error.where == f"{tmp_path / 'good' / FP32_NAME}: input of the graph"
    assert str(features.N_FEATURES) in error.expected
    assert str(features.N_FEATURES + 1) in error.found


def test_a_model_with_other_classes(tmp_path: Path) -> None:
    make_bundle(tmp_path / "two", n_classes=2)
    make_bundle(tmp_path / "good")
    (tmp_path / "good" / INT8_NAME).write_bytes((tmp_path / "two" / INT8_NAME).read_bytes())
    sign(tmp_path / "good")
    where = f"{tmp_path / 'good' / INT8_NAME}: output of the graph"
    assert refusal(tmp_path / "good").where == where


def test_a_model_that_changes_after_loading_is_not_served(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.model_bytes("int8") == (folder / INT8_NAME).read_bytes()
    (folder / INT8_NAME).write_bytes((folder / FP32_NAME).read_bytes())
    with pytest.raises(InputError):
        bundle.model_bytes("int8")
    with pytest.raises(InputError, match="precision"):
        bundle.model_bytes("fp16")
    with pytest.raises(InputError, match="precision"):
        bundle.state("fp16")


def test_a_bundle_says_what_its_models_remember(stateful: Path) -> None:
    bundle = load_bundle(stateful)
    delay, cell = bundle.state("int8")
    assert delay == StateTensor(
        "delay.last", "delay.next", "uint8", (3, features.N_FEATURES), 128.0
    )
    assert (cell.input, cell.dtype, cell.shape) == ("cell.last", "float32", (1, 8))
    (level,) = bundle.state("fp32")
    assert level.initial == 0.5
    for tensor in (delay, cell, level):
        fresh = tensor.fresh()
        assert (fresh.dtype.name, fresh.shape) == (tensor.dtype, tensor.shape)
        assert (fresh == tensor.initial).all()
        assert fresh.nbytes == tensor.nbytes


Tensors = tuple[StateTensor, ...]
STATES: list[tuple[str, Callable[[Tensors], Tensors]]] = [
    ("input of the graph, state delay", lambda s: (msgspec.structs.replace(s[0], input="delay"),)),
    ("output of the graph, state d", lambda s: (msgspec.structs.replace(s[0], output="d"), s[1])),
    (
        "input of the graph, state delay.last",
        lambda s: (msgspec.structs.replace(s[0], dtype="float32"), s[1]),
    ),
    (
        "input of the graph, state cell.last",
        lambda s: (s[0], msgspec.structs.replace(s[1], shape=(8, 1))),
    ),
    ("input of the graph, state cell.last", lambda s: s[::-1]),
    (
        "input of the graph, state more",
        lambda s: (*s, StateTensor("more", "more.next", "uint8", (1,), 0.0)),
    ),
    ("input of the graph", lambda s: s[:1]),
    ("input of the graph", lambda s: ()),
]


@pytest.mark.parametrize(("where", "change"), STATES)
def test_a_model_with_another_state_than_its_manifest_says(
    stateful: Path, where: str, change: Callable[[Tensors], Tensors]
) -> None:
    state = load_bundle(stateful).manifest.state
    sign(stateful, state=StateSection(int8=change(state.int8), fp32=state.fp32))
    error = refusal(stateful)
    assert error.where == f"{stateful / INT8_NAME}: {where}"
    assert error.expected
    assert error.found


def test_a_float_twin_with_another_state_than_its_manifest_says(stateful: Path) -> None:
    state = load_bundle(stateful).manifest.state
    sign(stateful, state=StateSection(int8=state.int8))
    error = refusal(stateful)
    assert error.where == f"{stateful / FP32_NAME}: input of the graph"
    assert "level.last" in error.found


def test_further_files_are_held_against_their_hashes_when_asked(folder: Path) -> None:
    files = {"report.html": b"<html>", "research/int8.onnx": b"graph"}
    (folder / "research").mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    sign(folder, files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    check_files(load_bundle(folder))
    (folder / "report.html").write_bytes(b"<html >")
    bundle = load_bundle(folder)  # serves all the same
    with pytest.raises(InputError, match=r"files\.report\.html") as caught:
        check_files(bundle)
    assert caught.value.where == str(folder / "report.html")
    (folder / "report.html").write_bytes(files["report.html"])
    (folder / "research" / "int8.onnx").unlink()
    with pytest.raises(InputError, match="cannot read") as caught:
        check_files(bundle)
    assert caught.value.where == str(folder / "research" / "int8.onnx")


def test_a_tolerance_bundle_may_state_a_bound(folder: Path) -> None:
    sign(folder, numerics="tolerance", bound=2.5e-7)
    assert load_bundle(folder).manifest.bound == 2.5e-7


def test_a_bundle_without_a_value_check_bounds_nothing(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.checks is None
    assert json.loads((folder / MANIFEST_NAME).read_text())["checks"] is None
    assert bundle.input_bound.tolist() == [math.inf] * bundle.n_features
    assert bundle.max_constant.tolist() == [0] * bundle.n_features
    edit_manifest(folder, lambda m: m.pop("checks"))  # as bundles were written before
    assert load_bundle(folder).model_hash == bundle.model_hash


def test_a_bundle_says_what_its_value_check_looks_at(checked: Path) -> None:
    bundle = load_bundle(checked)
    checks = bundle.checks
    assert checks is not None
    assert checks.output == "violations"
    assert checks.int8
    for array, written, dtype in (
        (bundle.input_bound, checks.input_bound, np.float64),
        (bundle.max_constant, checks.max_constant, np.int64),
    ):
        assert array.dtype == dtype
        assert array.shape == (bundle.n_features,)
        assert tuple(array.tolist()) == written


CHECKS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("output", lambda c: c.update(output="")),
    ("output", lambda c: c.update(output="logits")),
    ("output", lambda c: c.update(output="violation")),
    ("int8[0]", lambda c: c["int8"].__setitem__(0, "")),
    ("int8[1]", lambda c: c["int8"].__setitem__(1, c["int8"][0])),
    ("input_bound", lambda c: c["input_bound"].pop()),
    ("input_bound[4]", lambda c: c["input_bound"].__setitem__(4, 0.0)),
    ("input_bound[4]", lambda c: c["input_bound"].__setitem__(4, -1.0)),
    ("max_constant", lambda c: c["max_constant"].append(0)),
    ("max_constant[2]", lambda c: c["max_constant"].__setitem__(2, -1)),
    ("max_constant[2]", lambda c: c["max_constant"].__setitem__(2, 1 << 31)),
]


@pytest.mark.parametrize(("key", "change"), CHECKS)
def test_a_value_check_that_cannot_be_names_its_key(
    checked: Path, key: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit_manifest(checked, lambda m: change(m["checks"]))
    error = refusal(checked)
    assert error.where == f"{checked / MANIFEST_NAME}: checks.{key}"
    assert error.expected
    assert error.fix


@pytest.mark.parametrize("name", [INT8_NAME, FP32_NAME])
def test_graphs_and_manifest_agree_about_the_value_check(
    checked: Path, stateful: Path, name: str
) -> None:
    (checked / name).write_bytes((stateful / name).read_bytes())
    sign(checked)
    error = refusal(checked)
    assert error.where == f"{checked / name}: output of the graph, value check violations"
    assert error.found == "none"


def test_a_value_check_that_the_manifest_does_not_name_is_refused(checked: Path) -> None:
    sign(checked, checks=None)
    error = refusal(checked)
    assert error.where == f"{checked / INT8_NAME}: output of the graph"
    assert "violations" in error.found
