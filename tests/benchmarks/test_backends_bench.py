"""`octick bench backends`: its keys, what it refuses to call exact, and how it takes turns."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks import cli
from benchmarks.agreement import STREAMS, hold_against, write_script
from benchmarks.backends import backend_lane, bench_backends, candidates
from benchmarks.contest import Lane, time_in_turn
from benchmarks.power import NO_COUNTER, counter_of, nvml_counter, power_of, rapl_counter
from benchmarks.rivals import model_alone
from benchmarks.untrained import make_untrained
from engine.backends import registry
from engine.backends.exact_proof import plain_session
from engine.backends.onnx import OnnxBackend
from engine.backends.onnx_providers import PROVIDERS
from engine.bundle import load_bundle
from feeds.errors import InputError
from tests.engine.bundles import make_bundle

KEYS = {
    "backend",
    "device",
    "model",
    "numerics",
    "p50_us",
    "p99_us",
    "per_s",
    "vectors",
    "disagreements",
    "size_bytes",
    "power",
    "reason",
    "machine",
    "versions",
    "commit",
    "date",
    "jitter",
}
VECTORS = 60


@pytest.fixture(autouse=True)
def short_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.backends.JITTER_S", 0.01)


@pytest.fixture(scope="module", params=[False, True], ids=["stateless", "stateful"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a value check."""
    path = tmp_path_factory.mktemp("bundle")
    make_bundle(path, stateful=request.param, checks=True)
    return path


def bench(*arguments: str) -> tuple[Result, list[dict[str, Any]]]:
    result = CliRunner().invoke(
        cli.backends, [*arguments, "--rounds", "2", "--vectors", str(VECTORS), "--json"]
    )
    return result, [json.loads(line) for line in result.stdout.splitlines()]


class Opened(OnnxBackend):
    """Right until it is open."""

    answered: int | None = None

    @classmethod
    def open(cls, *arguments: Any, **keys: Any) -> Self:
        backend = super().open(*arguments, **keys)
        backend.answered = 0
        return backend

    def turn(self) -> bool:
        """Whether this answer is to be wrong: every seventh."""
        if self.answered is None:
            return False
        self.answered += 1
        return self.answered % 7 == 0


class FlippedBit(Opened):
    """Wrong by the least bit of a score, now and then."""

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        mask = super().infer(stream, x, out)
        if self.turn():
            out.view(np.int32)[0] ^= 1
        return mask


class FlippedMask(Opened):
    """Right scores, another value check."""

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        return super().infer(stream, x, out) ^ (256 if self.turn() else 0)


class Forgetless(OnnxBackend):
    """Goes on with the old state after a reset."""

    def reset(self, stream: int) -> None:
        pass


def claim(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a class of this module be installed as the backend ``theirs``."""
    point = registry.EntryPoint("theirs", f"{__name__}:{name}", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [point])


def test_every_line_has_the_keys_and_a_refusal_its_reason(folder: Path) -> None:
    absent = next(n for n, p in PROVIDERS.items() if p not in available())
    result, lines = bench(
        "--bundle", str(folder), "--backend", "onnx/cpu", "--backend", f"onnx/{absent}"
    )
    assert result.exit_code == 0, result.output
    assert [(line["backend"], line["device"]) for line in lines] == [
        ("onnx", "cpu"),
        ("onnx", absent),
    ]
    assert all(set(line) >= KEYS for line in lines)
    good, refused = lines
    assert (good["vectors"], good["disagreements"], good["mask_disagreements"]) == (VECTORS, 0, 0)
    assert good["numerics"] == "exact-int8"
    assert 0 < good["p50_us"] <= good["p99_us"]
    assert good["per_s"] > 0
    assert good["size_bytes"] == (folder / "model.int8.onnx").stat().st_size
    assert good["reason"] == ""
    assert refused["p50_us"] is refused["p99_us"] is refused["per_s"] is None
    assert f"cannot run on {absent}" in refused["reason"]
    assert "\n" not in refused["reason"]


def available() -> list[str]:
    import onnxruntime as ort

    found: list[str] = ort.get_available_providers()
    return found


@pytest.mark.parametrize(
    ("name", "key"), [("FlippedBit", "disagreements"), ("FlippedMask", "mask_disagreements")]
)
def test_an_exact_backend_that_disagrees_fails_the_command(
    name: str, key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(name, monkeypatch)
    result, (line,) = bench("--bundle", str(folder), "--backend", "theirs")
    assert line["reason"] == ""
    assert line[key] > 0
    other = {"disagreements", "mask_disagreements"} - {key}
    assert line[other.pop()] == 0
    assert result.exit_code == 1


def test_one_that_does_not_forget_at_a_reset_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path, stateful=True)
    bundle = load_bundle(tmp_path)
    monkeypatch.setattr("benchmarks.agreement.RESET_SHARE", 0.2)
    script = write_script(bundle, VECTORS)
    assert script.reset.sum() > STREAMS
    wrong = Forgetless.open(bundle)
    assert hold_against(script, lambda i: backend_lane(wrong, i), exact=True).disagreements > 0
    right = OnnxBackend.open(bundle)
    assert hold_against(script, lambda i: backend_lane(right, i), exact=True).disagreements == 0


def test_within_its_bound_a_tolerance_model_agrees(tmp_path: Path) -> None:
    make_bundle(tmp_path, checks=True)
    bundle = load_bundle(tmp_path)
    script = write_script(bundle, 30)
    backend = FlippedBit.open(bundle)
    loose = replace(script, bound=1e-3)
    assert hold_against(loose, lambda i: backend_lane(backend, i), exact=False).disagreements == 0
    assert hold_against(script, lambda i: backend_lane(backend, i), exact=False).disagreements > 0


def test_a_backend_that_is_none_is_wrong_usage() -> None:
    with pytest.raises(InputError, match="unknown backend"):
        candidates(["onyx"])
    assert ("onnx", "openvino") in candidates()
    assert candidates(["onnx/cpu", "compiled/cpu:plain"]) == [
        ("onnx", "cpu"),
        ("compiled", "cpu:plain"),
    ]
    assert len(candidates()) == len(set(candidates()))


def test_rivals_run_the_same_graphs_in_the_same_rounds(folder: Path) -> None:
    rows = bench_backends([folder], 2, VECTORS, only=["onnx/cpu"], rivals=True)
    by_name = {row.backend: row for row in rows}
    assert set(by_name) == {"onnx"} | {
        f"rival {library}-{precision}"
        for library in ("ort", "openvino")
        for precision in ("fp32", "int8")
    }
    ours, theirs = by_name["onnx"], by_name["rival ort-int8"]
    assert (theirs.vectors, theirs.disagreements) == (VECTORS, 0)
    assert theirs.size_bytes < ours.size_bytes, "without the value check"
    ran = [row for row in rows if row.backend != "onnx" and not row.reason]
    assert min(row.ratio for row in ran if row.ratio is not None) == 1.0
    assert ours.ratio is not None
    assert all(row.p50_us is not None and row.p50_us > row.empty_us > 0 for row in ran)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_rival_gets_the_model_without_the_check_and_its_clip(
    precision: str, folder: Path
) -> None:
    bundle = load_bundle(folder)
    alone, whole = (
        plain_session(data)
        for data in (model_alone(bundle, precision), bundle.model_bytes(precision))
    )
    assert len(alone.get_outputs()) == len(whole.get_outputs()) - 1
    state = {tensor.input: tensor.fresh() for tensor in bundle.state(precision)}
    x = np.random.default_rng(0).normal(size=(1, bundle.n_features)).astype(np.float32)
    x = np.clip(x, -bundle.clip, bundle.clip)
    found, expected = (
        session.run([bundle.output_name], {"x": x, **state})[0] for session in (alone, whole)
    )
    assert found.tobytes() == expected.tobytes()
    far = np.full_like(x, 1e3)
    clipped, raw = (
        session.run([bundle.output_name], {"x": far, **state})[0] for session in (whole, alone)
    )
    assert (clipped.tobytes() == raw.tobytes()) == (precision == "int8")


def test_the_table_names_everything(folder: Path) -> None:
    result = CliRunner().invoke(
        cli.backends,
        ["--bundle", str(folder), "--backend", "onnx/cpu", "--rounds", "1", "--vectors", "5"],
    )
    assert result.exit_code == 0, result.output
    for text in ("onnx", "exact-int8", "0 of 5", "host jitter"):
        assert text in result.stdout


def lane(call: Any) -> Lane:
    return Lane(np.zeros((1, 2), np.float32), np.zeros(1, np.float32), (call,), lambda: None)


def test_contestants_take_turns_and_a_slow_one_is_let_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.contest.BLOCK_NS", 20_000)
    monkeypatch.setattr("benchmarks.contest.MAX_CONTESTANT_NS", 60_000_000)
    order: list[str] = []
    slow_ns = 2_000_000

    def slow() -> None:
        order.append("slow")
        end = time.perf_counter_ns() + slow_ns
        while time.perf_counter_ns() < end:
            pass

    lanes = [lane(lambda: order.append("fast")), lane(slow)]
    fast, late = time_in_turn(lanes, np.zeros((3, 2), np.float32), 60)
    assert fast.rounds == 60
    assert late.rounds < 60
    assert late.p50_us >= slow_ns / 1e3 > fast.p50_us
    assert late.per_s <= 1e9 / slow_ns
    blocks = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert Counter(blocks)["slow"] > 1, "in turn, not one after the other"


def test_inputs_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    seen: list[float] = []
    item = lane(lambda: seen.append(float(item.x[0, 0])))
    time_in_turn([item], rows, 1)
    assert set(seen) == set(rows[:, 0].tolist())


def test_rapl_is_read_where_it_may_be_and_its_wrap_is_borne(tmp_path: Path) -> None:
    assert rapl_counter(tmp_path) is None
    folder = tmp_path / "sys/class/powercap/intel-rapl:0"
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text("3000000\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")
    counter = counter_of("cpu", tmp_path)
    assert counter is not None
    assert counter.read() == 3.0
    assert counter.used(3.0, 4.5) == 1.5
    assert counter.used(9.0, 1.0) == 2.0
    power = power_of(counter, 6.0, 2.0, 3_000)
    assert (power.watts, power.uj_per_inference) == (3.0, 2_000.0)


def test_a_gpu_is_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_counter(0) is None
    used = iter([1_000, 1_000, 4_500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTotalEnergyConsumption=lambda card: next(used),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    counter = counter_of("cuda:1")
    assert counter is not None
    assert counter.name == "NVML GPU 1"
    assert counter.used(counter.read(), counter.read()) == 3.5


def test_without_a_counter_that_is_said() -> None:
    assert power_of(None, 0.0, 1.0, 10).counter == NO_COUNTER


def test_an_untrained_bundle_is_whole_exact_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the models extra is not installed")
    first, again = (make_untrained("gru", tmp_path / name) for name in ("a", "b"))
    bundle = load_bundle(first)
    assert bundle.numerics == OnnxBackend.open(bundle).info().numerics == "exact-int8"
    assert bundle.checks is not None
    assert bundle.state("int8")
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    with pytest.raises(InputError, match="unknown architecture"):
        make_untrained("gnu", tmp_path / "c")
