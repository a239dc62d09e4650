"""What verification and comparison found, in words: the first lines of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from models.report.page import decimal, is_figure, percent, whole

SAME_SPEED: Final = 0.02
LEAST_POINTS: Final = 0.01
MAX_NAMED: Final = 5  # of the checks that fail


def verdict(found: Mapping[str, Any] | None) -> tuple[str, bool | None]:
    """Whether a bundle is verified, in words and as a flag; None where nobody looked.

    Parameters
    ----------
    found : mapping or None
        Fields of `models.verify.Verification`.
    """
    if found is None or not found["checks"]:
        return "Not verified yet: nothing was checked.", None
    checks = found["checks"]
    failed = [str(check["name"]) for check in checks if not check["ok"]]
    if failed:
        more = [f"{len(failed) - MAX_NAMED} more"] if len(failed) > MAX_NAMED else []
        names = "; ".join([*failed[:MAX_NAMED], *more])
        return f"Not verified: {len(failed)} of {len(checks)} checks fail: {names}.", False
    if not found["ok"]:
        return "Not verified: the record says that a check fails, but names none.", False
    return f"Verified: {len(checks)} of {len(checks)} checks hold.", True


def sentences(comparison: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[str]:
    """What quantisation cost and bought, one plain sentence each; nothing where nobody measured.

    Parameters
    ----------
    comparison : mapping
        Fields of `models.comparison.Comparison`.
    baselines : mapping of str to mapping or float
        Fields of `models.metrics.Metrics`, or an accuracy.
    """
    found = [
        _agreement(comparison),
        _loss(comparison),
        _beside(baselines),
        _size(comparison),
        _speed(comparison, "p50", "At the median"),
        _speed(comparison, "p99", "At p99"),
        _integers(comparison),
    ]
    return [text for text in found if text]


def accuracy_of(measured: Any) -> Any:
    """Of metrics, or the accuracy that stands there alone."""
    return measured.get("accuracy") if isinstance(measured, Mapping) else measured


def _agreement(comparison: Mapping[str, Any]) -> str:
    share = comparison.get("agreement")
    if not is_figure(share):
        return ""
    rows = whole(comparison.get("rows"))
    return f"INT8 agrees with FP32 on the class of {percent(share)} of {rows} rows."


def _loss(comparison: Mapping[str, Any]) -> str:
    points = comparison.get("accuracy_loss_points")
    if not is_figure(points):
        return ""
    int8, fp32 = (percent(accuracy_of(comparison.get(name))) for name in ("int8", "fp32"))
    if points == 0.0:
        return f"Its accuracy is the same, {int8}."
    size = abs(points)
    amount = f"{size:.2f}" if size >= LEAST_POINTS else f"less than {LEAST_POINTS}"
    verb = "loses" if points > 0.0 else "gains"
    return f"It {verb} {amount} points of accuracy: {int8} against {fp32}."


def _beside(baselines: Mapping[str, Any]) -> str:
    texts = [f"{name} {percent(accuracy_of(value))}" for name, value in baselines.items()]
    return f"Beside it stand {', '.join(texts)}." if texts else ""


def _size(comparison: Mapping[str, Any]) -> str:
    ratio = comparison.get("size_ratio")
    if not is_figure(ratio):
        return ""
    int8, fp32 = (whole(comparison.get(f"bytes_{name}")) for name in ("int8", "fp32"))
    word = "smaller" if ratio < 1.0 else "not smaller"
    return f"Its file is {word}: {ratio:.2f} times the size, {int8} bytes against {fp32}."


def _speed(comparison: Mapping[str, Any], quantile: str, where: str) -> str:
    int8, fp32 = (comparison.get(f"{quantile}_us_{name}") for name in ("int8", "fp32"))
    if not (is_figure(int8) and is_figure(fp32) and int8 > 0.0 and fp32 > 0.0):
        return ""
    times, ratio = f"{decimal(int8)} µs a step against {decimal(fp32)} µs", int8 / fp32
    if abs(ratio - 1.0) <= SAME_SPEED:
        return f"{where} INT8 is as fast as FP32: {times}."
    if ratio > 1.0:
        return f"{where} INT8 is slower than FP32: {times}, {ratio:.2f} times as long."
    return f"{where} INT8 is faster than FP32: {times}, {1.0 / ratio:.2f} times as fast."


def _integers(comparison: Mapping[str, Any]) -> str:
    nodes = comparison.get("int8_nodes")
    if not is_figure(nodes):
        return ""
    if nodes == 0:
        return (
            "No node computes in integers once ONNX Runtime has fused the graph: INT8 saves size,"
            " not arithmetic."
        )
    some = "1 node computes" if nodes == 1 else f"{whole(nodes)} nodes compute"
    return f"{some} in integers once ONNX Runtime has fused the graph."
