"""The conformance suite: every backend that opens here passes, and each fault fails its checks."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from engine.backend_cli import check, list_command
from engine.backends import conformance_checks, registry
from engine.backends.availability import devices_of, list_backends
from engine.backends.conformance import (
    CheckResult,
    NotConformantError,
    Reference,
    check_backend,
    hold_scores,
)
from engine.backends.conformance_bundles import GRAPHS, write_small_bundle
from engine.backends.conformance_checks import CHECKS
from engine.backends.exactness import prove_exact
from engine.backends.interface import Backend
from engine.backends.lowering import lower_bundle
from engine.backends.onnx import OnnxBackend
from engine.bundle import Bundle, load_bundle
from feeds.errors import InputError
from tests.engine import wrong_backends
from tests.engine.bundles import make_bundle, write_manifest

VECTORS = 96
SMALL = ("dense", "convolution", "lstm", "gru")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Small bundles with a value check, by the graph that they have."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in (*SMALL, "delays and cells"):
        make_bundle(folder / name, graph=name, checks=True)
    return {path.name: load_bundle(path) for path in folder.iterdir()}


def failed(results: list[CheckResult]) -> dict[str, str]:
    """What failed, and why."""
    return {result.check: result.detail for result in results if not result.ok}


PLACES: list[tuple[str, str, tuple[str, ...]]] = [
    ("onnx", "cpu", (*SMALL, "delays and cells")),
    ("compiled", "cpu", SMALL),
    ("compiled", "cpu:vnni", ("convolution",)),
    ("compiled", "cpu:avxvnni", ("convolution",)),
    ("compiled", "cpu:avx2", ("convolution",)),
    ("compiled", "cpu:plain", ("convolution",)),
    ("cuda", "cuda:0", SMALL),
    ("cuda", "cuda:0/persistent", SMALL),
    ("fpga", "rtl-sim", ("lstm",)),
    ("split", "compiled/cpu > lstm > compiled/cpu:plain", ("lstm",)),
]


@pytest.mark.parametrize(
    ("name", "device", "graph"),
    [(name, device, graph) for name, device, graphs in PLACES for graph in graphs],
)
def test_a_backend_that_opens_here_keeps_every_promise(
    name: str, device: str, graph: str, bundles: dict[str, Bundle]
) -> None:
    results = check_backend(name, bundles[graph], device, vectors=VECTORS)
    if not results[0].applies:
        pytest.skip(results[0].detail)
    assert failed(results) == {}
    assert [result.check for result in results] == ["opens", *CHECKS]
    assert {r.check for r in results if not r.applies} <= {"golden vectors", "references"}


def test_every_built_in_backend_has_a_place_in_this_test() -> None:
    assert {name for name, _, _ in PLACES} == registry.BUILT_IN.keys()


def opener(double: type) -> object:
    """An opener of one class, whatever the name."""

    def opened(
        name: str, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Backend:
        return double.open(bundle, device, threads=threads, precision=precision)  # type: ignore[no-any-return, attr-defined]

    return opened


def findings(double: type, bundle: Bundle) -> dict[str, str]:
    """What the suite finds in a double."""
    results = check_backend(
        "theirs",
        bundle,
        "cpu",
        opener=opener(double),  # type: ignore[arg-type]
        vectors=VECTORS,
    )
    assert results[0].applies
    return failed(results)


@pytest.mark.parametrize("graph", SMALL)
def test_a_backend_in_numpy_keeps_every_promise(graph: str, bundles: dict[str, Bundle]) -> None:
    assert findings(wrong_backends.Honest, bundles[graph]) == {}


FAULTS: list[tuple[type, set[str]]] = [
    (wrong_backends.HalfUp, {"scores", "masks"}),
    (wrong_backends.WrongZeroPoint, {"scores", "masks"}),
    (wrong_backends.SharedState, {"streams"}),
    (wrong_backends.ResetIgnored, {"reset"}),
    (wrong_backends.ResetOnlyOfBegun, {"early reset"}),
    (wrong_backends.ResetOfAll, {"streams"}),
    (wrong_backends.MaskDropped, {"masks", "bad inputs"}),
    (wrong_backends.LayerMasksDropped, {"masks"}),
    (wrong_backends.MaskOfNumpy, {"masks"}),
    (wrong_backends.PartlyWritten, {"scores", "output whole"}),
    (wrong_backends.Clobbering, {"input kept"}),
    (wrong_backends.TicketsSwapped, {"queue"}),
    (wrong_backends.NewestFirst, {"queue", "queue limit"}),
    (wrong_backends.NoneWhenEmpty, {"queue", "queue limit"}),
    (wrong_backends.WithoutLimit, {"queue limit"}),
    (wrong_backends.RefusedAndTaken, {"queue limit"}),
    (wrong_backends.LateReading, {"queue", "queue limit", "queue and infer"}),
    (wrong_backends.Poisoned, {"bad inputs"}),
    (wrong_backends.SharedBetweenInstances, {"two at once", "reopened"}),
    (wrong_backends.OpensAnything, {"refusals"}),
    (wrong_backends.BreaksOverDevices, {"refusals"}),
    (wrong_backends.OtherNumerics, {"info"}),
    (wrong_backends.Floating, {"scores", "masks", "bad inputs"}),
]


@pytest.mark.parametrize(("double", "checks"), FAULTS, ids=[d.__name__ for d, _ in FAULTS])
def test_a_fault_fails_its_own_checks_and_no_other(
    double: type, checks: set[str], bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance_checks, "MAX_SUBMITTED", 300)
    found = findings(double, bundles["lstm"])
    assert found.keys() == checks, found
    assert all("\n" not in detail for detail in found.values())


@pytest.mark.parametrize("graph", SMALL)
def test_every_small_graph_has_ties_enough_to_tell_the_rounding(
    graph: str, bundles: dict[str, Bundle]
) -> None:
    assert "scores" in findings(wrong_backends.HalfUp, bundles[graph])


def test_golden_vectors_are_the_bundles_own(reference_bundle: Path) -> None:
    found = findings(wrong_backends.WrongZeroPoint, load_bundle(reference_bundle))
    assert {"golden vectors", "scores"} <= found.keys()
    assert "golden.npz" in found["golden vectors"]


def test_the_reference_bundle_has_something_for_every_check(reference_bundle: Path) -> None:
    results = check_backend("onnx", load_bundle(reference_bundle), "cpu", vectors=VECTORS)
    assert failed(results) == {}
    assert all(result.applies for result in results)


def test_a_refused_bundle_is_no_fault_and_a_crash_is_one(bundles: dict[str, Bundle]) -> None:
    whole = bundles["delays and cells"]
    (result,) = check_backend("compiled", whole, "cpu")
    assert result.ok
    assert not result.applies
    assert "no place in an integer graph" in result.detail
    (result,) = check_backend(
        "theirs",
        whole,
        "cpu",
        opener=opener(wrong_backends.Broken),  # type: ignore[arg-type]
    )
    assert not result.ok
    assert result.detail == "ZeroDivisionError: at once"


def test_a_graph_that_does_not_lower_is_held_against_the_graph_as_written(
    bundles: dict[str, Bundle],
) -> None:
    reference = Reference(bundles["delays and cells"])
    assert reference.graph is None
    assert "no place in an integer graph" in reference.why_not
    results = check_backend("onnx", bundles["delays and cells"], "cpu", vectors=VECTORS)
    assert failed(results) == {}
    (found,) = [result for result in results if result.check == "references"]
    assert not found.applies


class Near(OnnxBackend):
    """ONNX Runtime, a little off."""

    off = 0.0

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        mask = super().infer(stream, x, out)
        out += np.float32(self.off)
        return mask


@pytest.mark.parametrize(("off", "checks"), [(0.0, set()), (0.005, set()), (-0.02, {"scores"})])
def test_a_tolerance_bundle_is_held_within_its_bound(
    off: float, checks: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, manifest = make_bundle(tmp_path, graph="lstm", checks=True)
    write_manifest(tmp_path, msgspec.structs.replace(manifest, numerics="tolerance", bound=0.01))
    monkeypatch.setattr(Near, "off", off)
    results = check_backend(
        "onnx",
        load_bundle(tmp_path),
        "cpu",
        opener=opener(Near),  # type: ignore[arg-type]
        vectors=VECTORS,
    )
    assert failed(results).keys() == checks


def test_no_number_is_within_any_bound_and_a_bit_is_a_difference() -> None:
    one = np.array([[1.0, -0.0]], np.float32)
    hold_scores(one, one, "themselves")
    for other, bound in (([[1.0, 0.0]], 0.0), ([[np.nan, 0.0]], 0.5), ([[1.6, 0.0]], 0.5)):
        with pytest.raises(NotConformantError, match=r"row 0, score"):
            hold_scores(np.array(other, np.float32), one, "these", bound=bound)
    hold_scores(np.array([[1.4, 0.1]], np.float32), one, "near", bound=0.5)


# ---- the small bundles


@pytest.mark.parametrize("name", GRAPHS)
def test_a_small_bundle_is_exact_and_the_same_each_time(name: str, tmp_path: Path) -> None:
    folders = [write_small_bundle(tmp_path / str(i), name) for i in range(2)]
    found = [load_bundle(folder) for folder in folders]
    assert found[0].model_hash == found[1].model_hash
    assert found[0].state("int8")
    prove_exact(
        onnx.load_model_from_string(found[0].model_bytes("int8")), list(found[0].state("int8"))
    )
    assert lower_bundle(found[0]).state == found[0].state("int8")
    other = load_bundle(write_small_bundle(tmp_path / "other", name, seed=1))
    assert other.model_hash != found[0].model_hash


def test_a_small_bundle_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such small bundle"):
        write_small_bundle(tmp_path, "transformer")


# ---- the commands


def run(*arguments: object) -> tuple[int, dict[str, object]]:
    """A command's exit code and its JSON object."""
    found = CliRunner().invoke(check, [str(item) for item in (*arguments, "--json")])
    return found.exit_code, json.loads(found.stdout) if found.stdout else {}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of another party is installed, with some backends."""
    names = {"theirs": "Honest", "forgetful": "Forgetful", "broken": "Broken", "gone": "Gone"}
    points = [
        registry.EntryPoint(name, f"{wrong_backends.__name__}:{found}", registry.GROUP)
        for name, found in names.items()
    ]
    monkeypatch.setattr(registry, "entry_points", lambda **_: points)


def test_check_passes_a_third_partys_backend_with_every_small_bundle(theirs: None) -> None:
    code, found = run("theirs", "--vectors", 8)
    assert (code, found["ok"], found["backend"], found["device"]) == (0, True, "theirs", "cpu")
    results = [msgspec.convert(item, CheckResult) for item in found["results"]]  # type: ignore[attr-defined]
    assert {result.bundle for result in results} == {"reference", *GRAPHS}
    assert {result.check for result in results} == {"opens", *CHECKS}


def test_check_fails_a_backend_that_forgets_nothing(theirs: None, tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "gru", "gru")
    write_small_bundle(tmp_path / "lstm", "lstm")
    paths = ("--bundle", tmp_path / "gru", "--bundle", tmp_path / "lstm")
    code, found = run("forgetful", "--vectors", 8, *paths)
    assert (code, found["ok"]) == (1, False)
    bad = [(item["bundle"], item["check"]) for item in found["results"] if not item["ok"]]  # type: ignore[attr-defined]
    assert bad == [("gru", "reset"), ("lstm", "reset")]
    shown = CliRunner().invoke(check, ["forgetful", "--vectors", "8", *map(str, paths)])
    assert shown.exit_code == 1
    assert shown.stdout.count("FAILED") == 2


def test_check_needs_a_backend_a_bundle_and_a_device_that_are_there(
    theirs: None, tmp_path: Path
) -> None:
    for arguments in (
        ["thiers"],
        ["theirs", "--bundle", str(tmp_path / "nowhere")],
        ["theirs", "--device", "moon"],
        ["gone"],
    ):
        found = CliRunner().invoke(check, arguments)
        assert isinstance(found.exception, InputError)
        assert "\n" not in str(found.exception)
    assert CliRunner().invoke(check, ["theirs", "--vectors", "0"]).exit_code == 2


def test_list_has_every_backend_and_says_why_one_does_not_open(
    theirs: None, reference_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        registry, "BUILT_IN", {"onnx": registry.BUILT_IN["onnx"], "split": "no.such:Backend"}
    )
    monkeypatch.setattr(wrong_backends.Honest, "devices", lambda: ("cpu", "moon"), raising=False)
    assert devices_of("theirs") == ("cpu", "moon")
    shown: list[float] = []
    found = list_backends(load_bundle(reference_bundle), lambda _what, share: shown.append(share))
    opened = {(item.backend, item.device): item for item in found}
    assert list(opened) == [
        ("broken", "cpu"),
        ("forgetful", "cpu"),
        ("forgetful", "moon"),
        ("gone", "cpu"),
        *(("onnx", device) for device in devices_of("onnx")),
        ("split", "cpu"),
        ("theirs", "cpu"),
        ("theirs", "moon"),
    ]
    assert {place for place, item in opened.items() if item.opens} == {
        ("forgetful", "cpu"),
        ("onnx", "cpu"),
        ("theirs", "cpu"),
    }
    assert opened["theirs", "cpu"].isa == "numpy"
    assert opened["broken", "cpu"].reason == "ZeroDivisionError: at once"
    assert "no such place" in opened["theirs", "moon"].reason
    assert all("\n" not in item.reason and item.opens != bool(item.reason) for item in found)
    assert shown == sorted(shown)
    result = CliRunner().invoke(list_command, ["--json"])
    assert result.exit_code == 0
    assert {item["backend"] for item in json.loads(result.stdout)["backends"]} == {
        item.backend for item in found
    }
    assert "numpy" in CliRunner().invoke(list_command, []).stdout
