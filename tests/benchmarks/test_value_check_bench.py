"""`octick bench value-checks`: the keys that the README's figures are read from."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks import cli
from feeds.errors import InputError
from tests.engine.bundles import make_bundle


def test_it_measures_both_models_with_and_without(reference_bundle: Path) -> None:
    arguments = ["--model", str(reference_bundle), "--rounds", "20"]
    result = CliRunner().invoke(cli.value_checks, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"machine", "versions", "commit", "date"} <= set(found)
    for precision in ("int8", "fp32"):
        cost = found[precision]
        assert cost["with_us"] > 0
        assert cost["without_us"] > 0
        assert cost["nodes"] > 0
        assert {"cost_us", "quartiles_us", "jitter_us"} <= set(cost)
    result = CliRunner().invoke(cli.value_checks, arguments)
    assert result.exit_code == 0
    assert "FP32" in result.stdout


def test_models_with_state_can_be_measured(tmp_path: Path) -> None:
    make_bundle(tmp_path, stateful=True, checks=True)
    arguments = ["--model", str(tmp_path), "--rounds", "2", "--json"]
    assert CliRunner().invoke(cli.value_checks, arguments).exit_code == 0


def test_a_bundle_without_checks_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    result = CliRunner().invoke(cli.value_checks, ["--model", str(tmp_path)])
    assert isinstance(result.exception, InputError)
