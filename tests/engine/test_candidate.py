"""Judging a candidate: what may take the serving bundle's place, and what is refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from engine import candidate as module
from engine import features
from engine.backends.registry import open_backend
from engine.bundle import load_bundle
from engine.candidate import GOLDEN_NAME, Verdict, answers, judge, main
from engine.manifest import FP32_NAME, INT8_NAME, MANIFEST_NAME, Manifest
from feeds.errors import InputError
from tests.conftest import ROOT
from tests.engine.bundles import float_twin, write_manifest, write_models
from tests.engine.integer_graphs import delays_and_cells, dense

N = features.N_FEATURES
OTHER_CLASSES = ("up", "flat", "down")


def bundle_in(
    folder: Path, *, seed: int = 0, stateful: bool = False, agreeing: bool = True, **schemas: str
) -> Path:
    """A bundle whose twins are one graph, or two that know nothing of each other."""
    rng = np.random.default_rng(seed)
    int8 = (delays_and_cells if stateful else dense)(rng, N, 3)
    fp32 = int8 if agreeing else float_twin(rng, N, 3, stateful)
    write_models(folder, int8, fp32, **schemas)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Change the manifest as somebody who knows the format would: its hash fits."""
    manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
    write_manifest(folder, msgspec.structs.replace(manifest, **changes))


def add_golden(folder: Path, change: Callable[[dict[str, np.ndarray]], None] | None = None) -> None:
    """Golden vectors as the models answer here, or altered."""
    bundle = load_bundle(folder)
    x = np.random.default_rng(1).normal(size=(40, N)).astype(np.float32)
    golden = {"x": x}
    for precision in ("int8", "fp32"):
        backend = open_backend("onnx", bundle, precision=precision)
        golden[precision] = answers(backend, x).scores
        backend.close()
    if change is not None:
        change(golden)
    data = io.BytesIO()
    np.savez(data, **golden)  # type: ignore[arg-type]
    (folder / GOLDEN_NAME).write_bytes(data.getvalue())
    edit(folder, files={GOLDEN_NAME: hashlib.sha256(data.getvalue()).hexdigest()})


def raw_rows(n: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, N))


@pytest.fixture
def serving(tmp_path: Path) -> Path:
    return bundle_in(tmp_path / "serving")


@pytest.fixture
def offered(tmp_path: Path) -> Path:
    folder = bundle_in(tmp_path / "offered", seed=1)
    add_golden(folder)
    return folder


def reason(verdict: Verdict) -> str:
    """The one line with which a candidate is refused."""
    assert not verdict.ok
    (line,) = verdict.reasons
    assert "\n" not in line
    return line


# What may serve


@pytest.mark.parametrize("stateful", [False, True])
def test_a_good_candidate_may_serve(stateful: bool, tmp_path: Path) -> None:
    serving = bundle_in(tmp_path / "serving", stateful=stateful)
    offered = bundle_in(tmp_path / "offered", seed=1, stateful=stateful)
    add_golden(offered)
    inputs, streams = raw_rows(300), np.arange(300) % 3
    verdict = judge(serving, offered, inputs=inputs, streams=streams)
    assert verdict.ok, verdict.reasons
    assert verdict.agreement_serving == verdict.agreement_candidate == 1.0
    assert verdict.rows == 300
    assert verdict.model_hash == f"{load_bundle(offered).model_hash:016x}"
    assert judge(serving, offered).rows == 0


def test_streams_keep_their_own_state(tmp_path: Path) -> None:
    bundle = load_bundle(bundle_in(tmp_path, stateful=True))
    x = np.random.default_rng(0).normal(size=(60, N)).astype(np.float32)
    backend = open_backend("onnx", bundle)
    apart = [answers(backend, x[k::2]).scores for k in range(2)]
    mixed = answers(backend, x, np.arange(60) % 2).scores
    for k in range(2):
        assert mixed[k::2].tobytes() == apart[k].tobytes()


# What is refused before anything runs


@pytest.mark.parametrize("name", [INT8_NAME, FP32_NAME, MANIFEST_NAME, GOLDEN_NAME])
def test_a_truncated_candidate_is_refused_by_file(name: str, serving: Path, offered: Path) -> None:
    path = offered / name
    path.write_bytes(path.read_bytes()[:-7])
    assert str(path) in reason(judge(serving, offered))


def test_a_wrong_hash_is_refused(serving: Path, offered: Path) -> None:
    path = offered / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["model_hash"] = "0" * 16
    path.write_text(json.dumps(manifest))
    line = reason(judge(serving, offered))
    assert "model_hash" in line
    assert "does not match its own hash" in line


def test_a_wrong_schema_is_refused_in_manifest_and_graph(serving: Path, tmp_path: Path) -> None:
    in_graph = bundle_in(tmp_path / "graph", fp32_schema="00" * 8)
    line = reason(judge(serving, in_graph))
    assert "made for other features" in line
    assert FP32_NAME in line
    in_manifest = bundle_in(tmp_path / "manifest")
    edit(in_manifest, feature_schema="00" * 8)
    assert "feature_schema" in reason(judge(serving, in_manifest))


def test_a_missing_candidate_is_refused(serving: Path, tmp_path: Path) -> None:
    verdict = judge(serving, tmp_path / "none")
    assert "no such model bundle" in reason(verdict)
    assert verdict.model_hash == ""


# What does not fit


def test_other_classes_or_another_order_are_refused(serving: Path, offered: Path) -> None:
    manifest = msgspec.json.decode((offered / MANIFEST_NAME).read_bytes(), type=Manifest)
    edit(offered, output=msgspec.structs.replace(manifest.output, classes=OTHER_CLASSES))
    assert "other classes: up, flat, down in place of down, flat, up" in reason(
        judge(serving, offered)
    )


def test_exact_is_not_replaced_by_tolerance_unless_allowed(serving: Path, offered: Path) -> None:
    edit(offered, numerics="tolerance", bound=1e-6)
    assert "weaker" in reason(judge(serving, offered))
    assert judge(serving, offered, allow_tolerance=True).ok
    assert judge(offered, serving).ok


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_golden_vectors_that_do_not_come_out_are_refused(
    precision: str, serving: Path, tmp_path: Path
) -> None:
    def bend(golden: dict[str, np.ndarray]) -> None:
        scores = golden[precision]
        # One bit for the exact one; the other has a bound.
        up = np.nextafter(scores[5, 1], np.float32(np.inf))
        scores[5, 1] = up if precision == "int8" else scores[5, 1] + 0.1

    folder = bundle_in(tmp_path / "offered", seed=1)
    add_golden(folder, bend)
    line = reason(judge(serving, folder))
    assert "golden vectors do not come out" in line
    assert f"{GOLDEN_NAME}: {precision}[5, 1]" in line


def test_golden_vectors_of_a_tolerant_model_have_its_bound(tmp_path: Path) -> None:
    def shift(golden: dict[str, np.ndarray]) -> None:
        golden["int8"] = golden["int8"] + np.float32(0.01)

    serving = bundle_in(tmp_path / "serving")
    edit(serving, numerics="tolerance", bound=0.1)
    folder = bundle_in(tmp_path / "offered", seed=1)
    add_golden(folder, shift)
    edit(folder, numerics="tolerance", bound=0.02)
    assert judge(serving, folder).ok
    edit(folder, numerics="tolerance", bound=0.001)
    assert "within 0.001" in reason(judge(serving, folder))


@pytest.mark.parametrize("change", ["dtype", "shape", "missing"])
def test_golden_vectors_of_another_form_are_refused(
    change: str, serving: Path, tmp_path: Path
) -> None:
    def spoil(golden: dict[str, np.ndarray]) -> None:
        if change == "dtype":
            golden["x"] = golden["x"].astype(np.float64)
        elif change == "shape":
            golden["int8"] = golden["int8"][:-1]
        else:
            del golden["fp32"]

    folder = bundle_in(tmp_path / "offered", seed=1)
    add_golden(folder, spoil)
    assert GOLDEN_NAME in reason(judge(serving, folder))


# What is worse


def test_a_candidate_further_from_its_own_twin_is_refused(serving: Path, tmp_path: Path) -> None:
    worse = bundle_in(tmp_path / "worse", seed=1, agreeing=False)
    verdict = judge(serving, worse, inputs=raw_rows(300))
    assert "worse than the serving model: agreement of INT8 with FP32" in reason(verdict)
    assert "against 100.00% on 300 rows" in reason(verdict)
    assert verdict.agreement_candidate is not None
    assert verdict.agreement_candidate < 0.9
    assert judge(serving, worse).ok  # without rows there is nothing to compare
    assert judge(serving, worse, inputs=raw_rows(300), max_agreement_loss=1.0).ok
    assert judge(serving, worse, inputs=raw_rows(300), precision="fp32").ok
    assert judge(worse, serving, inputs=raw_rows(300)).ok


def test_a_candidate_that_violates_its_value_checks_more_often_is_refused(
    serving: Path, offered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: str, bundle: Any, device: str = "cpu", **options: Any) -> Any:
        backend = open_backend(name, bundle, device, **options)
        if bundle.path == offered and options["precision"] == "int8":
            infer = backend.infer

            def checked(stream: int, x: np.ndarray, out: np.ndarray) -> int:
                infer(stream, x, out)
                return 256 if x[0, 0] > 0 else 0

            monkeypatch.setattr(backend, "infer", checked)
        return backend

    monkeypatch.setattr(module, "open_backend", opened)
    verdict = judge(serving, offered, inputs=raw_rows(200))
    assert "value checks" in reason(verdict)
    assert verdict.violations_serving == 0
    assert 0 < verdict.violations_candidate < 200
    assert judge(serving, offered, inputs=raw_rows(200), max_violation_gain=1.0).ok


# Usage


def test_inputs_that_are_no_raw_rows_are_bad_usage(serving: Path, offered: Path) -> None:
    hole = raw_rows(5)
    hole[2, 7] = np.nan
    for inputs in (np.zeros((0, N)), np.zeros((4, N - 1)), raw_rows(4).astype(np.float32), hole):
        with pytest.raises(InputError, match="--inputs"):
            judge(serving, offered, inputs=inputs)
    for streams in (np.zeros(3, dtype=np.int64), np.full(5, -1), np.zeros(5)):
        with pytest.raises(InputError, match="stream"):
            judge(serving, offered, inputs=raw_rows(5), streams=streams)


def test_the_module_prints_one_verdict(serving: Path, offered: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", raw_rows(50))
    arguments = (serving, offered, "--inputs", tmp_path / "rows.npy")
    done = subprocess.run(
        [sys.executable, "-m", "engine.candidate", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert msgspec.json.decode(done.stdout, type=Verdict).rows == 50
    assert done.stdout.count("\n") == 1


def test_exit_codes(serving: Path, offered: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.npz"
    np.savez(rows, vector=raw_rows(50), stream=np.arange(50) % 2)

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(main, [str(item) for item in arguments])

    assert call(serving, offered, "--inputs", rows).exit_code == 0
    (offered / INT8_NAME).unlink()
    done = call(serving, offered)
    assert done.exit_code == 1
    assert not json.loads(done.stdout)["ok"]
    (tmp_path / "no.npy").write_bytes(b"no rows")
    for arguments in (
        (serving,),
        (tmp_path / "none", serving),
        (serving, serving, "--device", "abacus"),
        (serving, serving, "--backend", "abacus"),
        (serving, serving, "--inputs", tmp_path / "no.npy"),
    ):
        done = call(*arguments)
        assert done.exit_code == 2, arguments
        assert done.stdout == ""
