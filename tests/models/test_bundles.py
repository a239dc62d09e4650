"""A whole bundle: everything in it, verified; and what verification does not let pass."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from engine.backends.qdq_graph import without_checks
from engine.bundle import Bundle, check_files, load_bundle
from engine.manifest import INT8_NAME, MANIFEST_NAME, Manifest
from feeds.errors import InputError
from models.bundles import Made, live_rows, make_bundle
from models.export import CALIBRATION_NAME, GOLDEN_NAME, REPORT_NAME, npz_bytes, write_manifest
from models.quantisation import Options
from models.runs import Run, load_run
from models.source import SOURCE_NAME, load_source
from models.train_run import Request, train_run
from models.verify import verify
from models.verify_system import TapeSource, recorded_rows, system_level

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["mlp", "gru"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short run, without and with state."""
    folder = tmp_path_factory.mktemp(request.param)
    train_run(Request(arch=request.param, simulate=60_000, epochs=2, seed=2), folder)
    return load_run(folder)


@pytest.fixture(scope="module")
def made(run: Run) -> tuple[Bundle, Made]:
    """Its exact bundle."""
    folder = run.folder / "exact"
    report = make_bundle(run, Options(scales="power-of-two", observer="mse"), folder)
    return load_bundle(folder), report


def test_everything_is_in_the_bundle_and_vouched_for(made: tuple[Bundle, Made]) -> None:
    bundle, report = made
    check_files(bundle)
    names = {path.name for path in bundle.path.iterdir()}
    assert names == {
        MANIFEST_NAME,
        INT8_NAME,
        "model.fp32.onnx",
        REPORT_NAME,
        *bundle.manifest.files,
    }
    assert {GOLDEN_NAME, CALIBRATION_NAME, SOURCE_NAME} < set(bundle.manifest.files)
    assert report.failed == ()
    assert report.unchecked == ""
    assert bundle.checks is not None
    assert list(bundle.checks.int8) == list(bundle.manifest.training["value_check"])
    assert report.numerics == bundle.numerics == "exact-int8"
    assert report.comparison.agreement > 0.97
    assert report.comparison.size_ratio < 0.5
    assert bundle.manifest.training["label"] == {
        "kind": "smoothed",
        "horizon": 100,
        "threshold": bundle.manifest.training["label"]["threshold"],
    }
    props = {p.key: p.value for p in onnx.load(bundle.int8_path).metadata_props}
    assert props["octick.horizon"] == "100"
    assert props["octick.classes"] == "down,flat,up"


def test_all_three_levels_hold(run: Run, made: tuple[Bundle, Made]) -> None:
    bundle, _ = made
    tape = TapeSource(None)
    found = verify(
        bundle,
        recorded_rows(bundle, tape),
        system=lambda checks: system_level(bundle, tape, checks),
    )
    assert found.ok, [check for check in found.checks if not check.ok]
    assert {check.level for check in found.checks} == {"operator", "subgraph", "system"}
    assert found.system["digest"] == found.system["digest_two_threads"]
    assert found.bound == 0.0
    assert found.sqnr_db["scores"] > 10.0


def altered(bundle: Bundle, folder: Path, change: str) -> Bundle:
    """A bundle that is wrong inside and whole outside: hashes fit."""
    shutil.copytree(bundle.path, folder)
    manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
    files, int8 = dict(manifest.files), manifest.int8_sha256
    if change == "golden":
        with np.load(folder / GOLDEN_NAME) as file:
            golden = {name: file[name] for name in file.files}
        golden["int8"][3, 1] += 0.125
        data = npz_bytes(golden)
        (folder / GOLDEN_NAME).write_bytes(data)
        files[GOLDEN_NAME] = hashlib.sha256(data).hexdigest()
    else:
        model = onnx.load(folder / INT8_NAME)
        for item in model.graph.initializer:
            array = onnx.numpy_helper.to_array(item).copy()
            if change == "weight" and item.name == "head.weight.q":
                array[0, :] = -array[0, :]
            elif change == "scale" and item.name == "x.scale":
                array *= np.float32(1.1)
            elif change == "table" and item.name.endswith("gates.q.table"):
                array[100:140] = 0
            else:
                continue
            item.CopyFrom(onnx.numpy_helper.from_array(array, item.name))
        data = model.SerializeToString(deterministic=True)
        (folder / INT8_NAME).write_bytes(data)
        int8 = hashlib.sha256(data).hexdigest()
    write_manifest(folder, msgspec.structs.replace(manifest, files=files, int8_sha256=int8))
    return load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("golden", "golden vectors, INT8"),
        ("weight", "PyTorch against ONNX Runtime, INT8"),
        ("scale", "sums within 2**24"),
        ("table", "PyTorch against ONNX Runtime, INT8"),
    ],
)
def test_verification_fails_what_is_wrong(
    change: str, told: str, run: Run, made: tuple[Bundle, Made], tmp_path: Path
) -> None:
    if change == "table" and run.spec.arch == "mlp":
        pytest.skip("an MLP has no table")
    bundle = altered(made[0], tmp_path / "altered", change)
    found = verify(bundle, live_rows(run.data), levels=("operator",))
    assert not found.ok
    assert told in [check.name for check in found.checks if not check.ok]


def test_a_changed_file_is_refused_by_name(made: tuple[Bundle, Made], tmp_path: Path) -> None:
    shutil.copytree(made[0].path, tmp_path / "bundle")
    (tmp_path / "bundle" / GOLDEN_NAME).write_bytes(b"PK")
    with pytest.raises(InputError, match=GOLDEN_NAME):
        check_files(load_bundle(tmp_path / "bundle"))


def test_the_source_makes_the_graphs_again(made: tuple[Bundle, Made]) -> None:
    from models.quantised_graph import quantised_graph

    bundle, _ = made
    source = load_source(bundle.path / SOURCE_NAME)
    assert source.scheme is not None
    again, state = quantised_graph(source.spec, source.int8, source.scheme, {})
    assert state == bundle.state("int8")
    first, second = without_checks(onnx.load(bundle.int8_path)).graph, again.graph
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_free_scales_state_their_bound(run: Run, tmp_path: Path) -> None:
    report = make_bundle(run, Options(scales="free"), tmp_path / "free", with_report=False)
    bundle = load_bundle(tmp_path / "free")
    assert bundle.numerics == "tolerance"
    assert report.bound == bundle.manifest.bound > 0.0
    assert verify(bundle, live_rows(run.data), levels=("operator",)).ok


@pytest.mark.parametrize(
    "options",
    [
        Options(method="qat", scales="power-of-two"),
        Options(method="dynamic"),
        Options(method="int4"),
        Options(prune=0.5, scales="power-of-two"),
        Options(keep_worst=1),
        Options(observer="entropy", per_channel=False, symmetric=False),
    ],
)
def test_every_method_makes_a_bundle_that_holds(options: Options, run: Run, tmp_path: Path) -> None:
    report = make_bundle(run, options, tmp_path / "bundle", with_report=False)
    assert report.failed == ()
    assert report.comparison.agreement > 0.9
    checks = load_bundle(tmp_path / "bundle").checks
    assert checks is not None
    # Where ONNX Runtime takes a range from each row there is nothing that could saturate.
    assert bool(checks.int8) == (options.method in ("ptq", "qat"))
    assert len(report.sensitivities) >= options.keep_worst


def test_a_refused_request_leaves_nothing_half_written(run: Run, tmp_path: Path) -> None:
    for options, told in (
        (Options(method="dynamic", scales="power-of-two"), "does not go with"),
        (Options(keep={"no_such": "fp32"}), "no such layer"),
        (Options(observer="best"), "no such observer"),
        (Options(prune=1.0), "nothing would be left"),
    ):
        with pytest.raises(InputError, match=told):
            make_bundle(run, options, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_constant_calibration_set_and_nan_are_refused(run: Run, tmp_path: Path) -> None:
    from dataclasses import replace

    flat = replace(run, data=replace(run.data, x=np.zeros_like(run.data.x)))
    with pytest.raises(InputError, match="constant"):
        make_bundle(flat, Options(), tmp_path / "bundle")
    bad = run.data.x.copy()
    bad[:, 7] = np.nan
    with pytest.raises(InputError, match="finite"):
        make_bundle(replace(run, data=replace(run.data, x=bad)), Options(), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_npz_files_are_the_same_for_the_same_arrays() -> None:
    arrays = {"b": np.arange(3), "a": np.ones((2, 2), dtype=np.float32)}
    assert npz_bytes(arrays) == npz_bytes(dict(reversed(arrays.items())))
    with np.load(io.BytesIO(npz_bytes(arrays)), allow_pickle=False) as file:
        assert np.array_equal(file["a"], arrays["a"])
