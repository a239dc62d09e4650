"""``octick bench value-checks``: what the value check inside a model's graph costs.

Sessions with and without it run the same rows in turn, in one process, one thread, all buffers
bound. The session without it runs twice: what these two differ by is what the machine adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.provenance import provenance
from engine.backends.onnx_providers import session_options
from engine.backends.qdq_graph import without_checks
from engine.bundle import Bundle, load_bundle
from feeds.errors import InputError

RUNS: Final = 20  # a round: long against the clock, short against what else the machine does
WARM_UP_RUNS: Final = 2_000
PRECISIONS: Final = ("int8", "fp32")
ONNX_TYPES: Final[dict[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
}


class CheckCost(msgspec.Struct, frozen=True):
    """One precision's cost, in microseconds; medians over rounds in turn.

    Attributes
    ----------
    without_us, with_us : float
        One inference.
    cost_us : float
        Median of each round's difference.
    quartiles_us : tuple of float
        First and third, of the differences.
    jitter_us : float
        Median of the differences of the session without the check to itself.
    nodes : int
        Nodes of the check in the file.
    """

    without_us: float
    with_us: float
    cost_us: float
    quartiles_us: tuple[float, float]
    jitter_us: float
    nodes: int


class ValueCheckBench(msgspec.Struct, frozen=True):
    """See `bench_value_checks`."""

    bundle: str
    rounds: int
    int8: CheckCost
    fp32: CheckCost
    machine: dict[str, str | int]
    versions: dict[str, str]
    commit: str
    date: str


def bench_value_checks(
    bundle: Path, rounds: int, *, progress: Callable[[str], Any] = lambda _: None
) -> ValueCheckBench:
    """Time both models of a bundle with their value check and without.

    Raises
    ------
    InputError
        If the bundle has none.
    """
    loaded = load_bundle(bundle)
    if loaded.checks is None:
        raise InputError(
            "the bundle has no value check",
            where=str(bundle),
            expected="checks in its manifest",
            fix="quantise it again with 'octick model quantize'",
        )
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        progress(f"{precision}, {rounds} rounds")
        found[precision] = _cost(loaded, precision, rounds)
    return ValueCheckBench(
        str(bundle),
        rounds,
        **found,
        **provenance(),
    )


class _Bound:
    """A session with all its ends bound; its input is in range and stays the same."""

    def __init__(self, model: onnx.ModelProto, x: np.ndarray) -> None:
        self.session = ort.InferenceSession(
            model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.arrays: list[np.ndarray] = []
        for i, end in enumerate(self.session.get_inputs()):
            array = x if i == 0 else np.zeros(end.shape, dtype=ONNX_TYPES[end.type])
            self._bind(self.binding.bind_input, end.name, array)
        for end in self.session.get_outputs():
            array = np.zeros(end.shape, dtype=ONNX_TYPES[end.type])
            self._bind(self.binding.bind_output, end.name, array)

    def _bind(self, bind: Callable[..., None], name: str, array: np.ndarray) -> None:
        bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
        self.arrays.append(array)

    def time_us(self, runs: int) -> float:
        """Mean time of one run."""
        run, binding = self.session.run_with_iobinding, self.binding
        run(binding)  # what ran before has been in the caches
        begin_ns = time.perf_counter_ns()
        for _ in range(runs):
            run(binding)
        return (time.perf_counter_ns() - begin_ns) / (1e3 * runs)


def _cost(bundle: Bundle, precision: str, rounds: int) -> CheckCost:
    checked = onnx.load_from_string(bundle.model_bytes(precision))
    plain = without_checks(checked)
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.5, 0.5, (1, bundle.n_features)).astype(np.float32) * np.float32(bundle.clip)
    sessions = [_Bound(model, x) for model in (plain, checked, plain)]
    for session in sessions:
        session.time_us(WARM_UP_RUNS)
    # In the file's order first, then reversed: no session always follows the same one.
    took = np.empty((rounds, 3))
    for number in range(rounds):
        for which in (0, 1, 2) if number % 2 else (2, 1, 0):
            took[number, which] = sessions[which].time_us(RUNS)
    difference = took[:, 1] - (took[:, 0] + took[:, 2]) / 2.0
    low, high = np.percentile(difference, (25, 75))
    return CheckCost(
        without_us=round(float(np.median(took[:, (0, 2)])), 3),
        with_us=round(float(np.median(took[:, 1])), 3),
        cost_us=round(float(np.median(difference)), 3),
        quartiles_us=(round(float(low), 3), round(float(high), 3)),
        jitter_us=round(float(np.median(took[:, 2] - took[:, 0])), 3),
        nodes=len(checked.graph.node) - len(plain.graph.node),
    )


def show(result: ValueCheckBench) -> None:
    """A table of both precisions."""
    from rich.table import Table

    from feeds.output import wide_console

    table = Table("", "without, us", "with, us", "cost, us", "quartiles", "jitter", "nodes")
    table.title = f"value check of {result.bundle}, medians of {result.rounds:,} rounds"
    for name in PRECISIONS:
        cost: CheckCost = getattr(result, name)
        quartiles = "{:.3f} to {:.3f}".format(*cost.quartiles_us)
        figures = (cost.without_us, cost.with_us, cost.cost_us)
        table.add_row(
            name.upper(),
            *(f"{value:.3f}" for value in figures),
            quartiles,
            f"{cost.jitter_us:+.3f}",
            str(cost.nodes),
        )
    wide_console().print(table)
