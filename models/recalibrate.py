"""New ranges for a serving bundle from the recent tape: the same weights, quantised again.

The float weights and the options are the bundle's own; what changes is what the observers see.
The last rows of the tapes are cut in time: the earlier ones go into the calibration set, the later
ones are held out, and on these the candidate stands beside the bundle that serves. What comes out
is a whole bundle that is verified in three levels, or a refusal that says why, and nothing else.

The same tapes and the same calibration set give the same bytes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec

from engine.bundle import Bundle, check_files, load_bundle
from engine.manifest import MANIFEST_NAME, read_manifest
from feeds.errors import InputError
from models.bundles import live_rows, make_bundle
from models.calibration import check_rows
from models.calibration_set import (
    BLOCK_ROWS,
    CAPACITY_BLOCKS,
    HALF_LIFE_NS,
    CalibrationSet,
    load_calibration_set,
    mixed,
    no_blocks,
    save_calibration_set,
)
from models.check_limits import INPUT_BOUND_FACTOR
from models.export import write_manifest
from models.labels import CLASSES
from models.quantisation import Options
from models.recalibration_data import calibration_dataset, held_out
from models.recent_rows import FrozenTapes, RecentRows, recent_rows
from models.runs import Run, RunRecord
from models.sequences import MIN_ROWS, TEST, Facts
from models.serving_comparison import (
    Limits,
    ServingComparison,
    Standing,
    compare_with_serving,
    worse,
)
from models.source import Source
from models.train_run import PACKAGES
from models.training import one_thread
from models.verify import Check, source_of, verify
from models.verify_system import system_level

ROWS: Final = 65_536
HELD_OUT_SHARE: Final = 0.25
MIN_BLOCKS: Final = 4
FACTS_KEY: Final = "recalibration"
_STAMP: Final = re.compile(r"-\d{8}T\d{6}Z$")
Progress = Callable[[str, float], None]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What ``octick model recalibrate`` is asked for.

    Attributes
    ----------
    rows : int
        Tradable rows taken from the end of the tapes.
    held_out_share : float
        The last part of them, by time, that is only compared on.
    calibration_set : Path or None
        File that keeps blocks from one recalibration to the next; without one only the recent rows
        calibrate.
    capacity : int
        Blocks of `models.calibration_set.BLOCK_ROWS` rows in it.
    half_life_ns : int
        Of event time, see `models.calibration_set.mixed`.
    seed : int
    limits : Limits
    """

    rows: int = ROWS
    held_out_share: float = HELD_OUT_SHARE
    calibration_set: Path | None = None
    capacity: int = CAPACITY_BLOCKS
    half_life_ns: int = HALF_LIFE_NS
    seed: int = 0
    limits: Limits = Limits()


class Recalibration(msgspec.Struct, frozen=True):
    """What came of it.

    Attributes
    ----------
    ok : bool
    refused : tuple of str
        Why there is no candidate, a line each.
    bundle : str
        Its folder; "" where refused.
    name, model_hash : str
        Of the candidate.
    parent_hash : str
        Of the bundle that serves.
    unchanged : bool
        The candidate computes the very bits that the serving bundle does: its ranges came out the
        same. Its calibration statistics are new all the same.
    rows : int
        Recent rows taken, of ``rows_on_tape``.
    event_time_from_ns, event_time_to_ns : int
        Exchange time of these.
    calibration_blocks, calibration_rows : int
        Of the calibration set; rows that the observers counted.
    checks : tuple of Check
        Of the three levels of verification.
    system : dict
        What the third found; its latencies are this machine's.
    comparison : ServingComparison or None
    """

    ok: bool
    refused: tuple[str, ...]
    bundle: str
    name: str
    model_hash: str
    parent_hash: str
    unchanged: bool = False
    rows: int = 0
    rows_on_tape: int = 0
    event_time_from_ns: int = 0
    event_time_to_ns: int = 0
    calibration_blocks: int = 0
    calibration_rows: int = 0
    checks: tuple[Check, ...] = ()
    system: dict[str, Any] = {}
    comparison: ServingComparison | None = None


@dataclass(frozen=True)
class Parent:
    """The bundle that serves, with what a new one is made of."""

    bundle: Bundle
    source: Source
    options: Options
    facts: Facts

    @property
    def training(self) -> dict[str, Any]:
        """How it was made, as its manifest says."""
        return self.bundle.manifest.training


def load_parent(folder: Path) -> Parent:
    """Read a bundle and what it says of how it was made.

    Raises
    ------
    InputError
        If it cannot be made again: it is damaged, another's model, or of a method that
        calibrates nothing.
    """
    bundle = load_bundle(folder)
    check_files(bundle)
    source, training = source_of(bundle), bundle.manifest.training
    where = str(folder / MANIFEST_NAME)
    if source is None or bundle.classes != CLASSES:
        raise InputError(
            "the bundle does not carry what it was quantised from",
            where=where,
            expected="source.npz, as bundles of our own networks have",
            fix="quantise the model again with 'octick model quantize'",
        )
    try:
        recorded = msgspec.convert(training["options"], Options)
        label = training["label"]
        checked = bundle.manifest.checks is not None
        facts = Facts(
            label=label["kind"],
            horizon=int(label["horizon"]),
            threshold=float(label["threshold"]),
            embargo_ns=0,
            validation_share=0.0,
            test_share=0.0,
            clip=bundle.clip,
            mean=tuple(bundle.mean.tolist()),
            inv_scale=tuple(bundle.inv_scale.tolist()),
            source="",
            # What an input can be does not change with its recent ranges.
            greatest=tuple((bundle.input_bound / INPUT_BOUND_FACTOR).tolist()) if checked else (),
            max_constant=tuple(bundle.max_constant.tolist()) if checked else (),
        )
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise InputError(
            "the manifest does not say how the bundle was quantised",
            where=f"{where}: training",
            expected="options and label, as 'octick model quantize' writes them",
            found=f"{type(error).__name__} {error}",
        ) from None
    if source.scheme is None or recorded.method not in ("ptq", "qat"):
        raise InputError(
            "there is nothing to calibrate",
            where=f"{where}: training.options.method",
            expected="ptq or qat",
            found=recorded.method,
        )
    # Pruning is done: the weights are those that were left. Layers kept in floating point are
    # those that were found then, so that the graph stays the one whose speed is known.
    options = msgspec.structs.replace(
        recorded, prune=0.0, keep=dict(source.scheme.kept), keep_worst=0
    )
    return Parent(bundle, source, options, facts)


def recalibrate(
    parent: Parent,
    tapes: Sequence[Path],
    out: Path,
    request: Request = Request(),  # noqa: B008 - frozen
    progress: Progress = lambda stage, share: None,
) -> Recalibration:
    """Make a candidate from recent tapes, or say why there is none.

    The calibration set on disk follows the market whether the candidate is taken or not.

    Parameters
    ----------
    parent : Parent
    tapes : sequence of Path
        One of them may still be growing.
    out : Path
        Folder of the candidate, which must not exist; it appears when everything has passed.
    request : Request

    Raises
    ------
    InputError
        If something that was named cannot be read or written.
    """
    if out.exists():
        raise InputError(
            "there is something in the candidate's place",
            where=str(out),
            expected="no such folder",
            fix="name another --out: a bundle that may be serving is not replaced",
        )
    older = no_blocks()
    if request.calibration_set is not None:
        older = load_calibration_set(request.calibration_set)
    frozen = FrozenTapes(tapes)
    recent = recent_rows(
        frozen, request.rows, lambda share: progress("running the pipeline over the tapes", share)
    )
    from_ns, to_ns = recent.time_range_ns
    found = Recalibration(
        False,
        (),
        "",
        "",
        "",
        parent.bundle.manifest.model_hash,
        rows=len(recent),
        rows_on_tape=recent.seen,
        event_time_from_ns=from_ns,
        event_time_to_ns=to_ns,
    )
    staged = out.with_name(f"{out.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with one_thread():
            return _made(
                parent, frozen, recent, older, tapes, out, staged, request, found, progress
            )
    except _Refused as error:
        return msgspec.structs.replace(found, refused=error.reasons)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class _Refused(Exception):  # noqa: N818 - it says what happened
    def __init__(self, *reasons: str) -> None:
        super().__init__(*reasons)
        self.reasons = reasons


def _made(
    parent: Parent,
    tapes: FrozenTapes,
    recent: RecentRows,
    older: CalibrationSet,
    paths: Sequence[Path],
    out: Path,
    staged: Path,
    request: Request,
    found: Recalibration,
    progress: Progress,
) -> Recalibration:
    blocks, cut_ns = _calibration_blocks(recent, older, request)
    held = held_out(recent, cut_ns)
    source = ", ".join(sorted(path.name for path in paths))
    data = calibration_dataset(blocks, held, recent.names, parent.facts, source)
    labelled = len(data.rows_of(TEST))
    if labelled < MIN_ROWS:
        raise _Refused(
            f"too few recent rows: {labelled} of those held out have a label, with a horizon of"
            f" {parent.facts.horizon} signals; at least {MIN_ROWS} are needed"
        )
    name = _STAMP.sub("", parent.bundle.name) + _stamp(found.event_time_to_ns)
    run = Run(staged, _record(parent), dict(parent.source.fp32), data)
    try:
        made = make_bundle(
            run, parent.options, staged, name=name, with_report=False, progress=progress
        )
    except InputError as error:
        raise _Refused(f"cannot be quantised: {error}") from None
    candidate = load_bundle(staged)
    verification = verify(
        candidate,
        live_rows(data),
        system=lambda checks: system_level(candidate, tapes, checks),
        on_stage=lambda stage: progress(stage, 0.0),
    )
    failed = [
        f"not verified: {check.level}, {check.name}: {check.value:.6g}, limit {check.limit:.6g}"
        for check in verification.checks
        if not check.ok
    ]
    progress("comparing with the serving bundle", 0.0)
    comparison = compare_with_serving(parent.bundle, candidate, data, held.vector)
    found = msgspec.structs.replace(
        found,
        name=name,
        model_hash=candidate.manifest.model_hash,
        unchanged=candidate.model_hash == parent.bundle.model_hash,
        calibration_blocks=len(blocks),
        calibration_rows=made.calibration_rows,
        checks=verification.checks,
        system=verification.system,
        comparison=comparison,
    )
    refused = (*failed, *worse(comparison, request.limits))
    if refused:
        return msgspec.structs.replace(found, refused=refused)
    facts = _facts(parent, blocks, paths, request, found)
    _sign(staged, parent.training["options"], facts)
    try:
        os.rename(staged, out)
    except OSError as error:
        raise InputError(
            "the candidate cannot be put in its place",
            where=str(out),
            found=error.strerror or str(error),
        ) from None
    return msgspec.structs.replace(found, ok=True, bundle=str(out))


def _calibration_blocks(
    recent: RecentRows, older: CalibrationSet, request: Request
) -> tuple[CalibrationSet, int]:
    """What to calibrate from, and the time at which the held-out rows begin."""
    if not len(recent):
        raise _Refused("too few recent rows: no tradable signal on the tapes")
    cut_ns = recent.time_of_last(request.held_out_share)
    newer = recent.blocks(cut_ns)
    if len(newer) < MIN_BLOCKS:
        raise _Refused(
            f"too few recent rows: {len(newer)} unbroken blocks of {BLOCK_ROWS} before the"
            f" held-out part, at least {MIN_BLOCKS} are needed"
        )
    try:
        check_rows(newer.vector.reshape(-1, newer.vector.shape[2]), "recent rows")
    except InputError as error:
        raise _Refused(str(error)) from None
    blocks = mixed(
        older,
        newer,
        capacity=request.capacity,
        half_life_ns=request.half_life_ns,
        seed=request.seed,
    )
    if request.calibration_set is not None:
        save_calibration_set(request.calibration_set, blocks)
    # Another run may have kept what is held out in this one.
    usable = blocks.before(cut_ns)
    if not len(usable):
        raise _Refused("the calibration set holds only blocks later than the tapes")
    return usable, cut_ns


def _record(parent: Parent) -> RunRecord:
    """The run that trained the weights, as far as the bundle tells of it."""
    training = parent.training
    return RunRecord(
        spec=parent.source.spec,
        epochs=int(training.get("epochs", 0)),
        seed=int(training.get("seed", 0)),
        rows_a_batch=0,
        learning_rate=0.0,
        data=dict(training.get("data", {})),
        metrics={},
        optimum_accuracy=None,
        baselines={},
        seconds=0.0,
        versions={package: version(package) for package in PACKAGES},
    )


def _stamp(time_ns: int) -> str:
    return f"-{datetime.fromtimestamp(time_ns // 1_000_000_000, UTC):%Y%m%dT%H%M%SZ}"


def _facts(
    parent: Parent,
    blocks: CalibrationSet,
    paths: Sequence[Path],
    request: Request,
    found: Recalibration,
) -> dict[str, Any]:
    """What the manifest says of the recalibration; nothing that another run would measure anew."""
    comparison = found.comparison
    assert comparison is not None
    before = parent.training.get(FACTS_KEY, {})
    return {
        "parent_model_hash": found.parent_hash,
        "parent_name": parent.bundle.name,
        "generation": int(before.get("generation", 0)) + 1,
        "tapes": sorted(path.name for path in paths),
        "rows": found.rows,
        "event_time_from_ns": found.event_time_from_ns,
        "event_time_to_ns": found.event_time_to_ns,
        "calibration_set": {
            "blocks": len(blocks),
            "rows": len(blocks) * BLOCK_ROWS,
            "event_time_from_ns": int(blocks.first_ns.min()),
            "event_time_to_ns": int(blocks.last_ns.max()),
            "capacity_blocks": request.capacity,
            "half_life_ns": request.half_life_ns,
            "seed": request.seed,
        },
        "held_out": {
            "rows": comparison.rows,
            "event_time_from_ns": comparison.event_time_from_ns,
            "event_time_to_ns": comparison.event_time_to_ns,
        },
        "serving": _lasting(comparison.serving),
        "candidate": _lasting(comparison.candidate),
    }


def _lasting(standing: Standing) -> dict[str, Any]:
    measured = ("p50_us", "p99_us")
    return {k: v for k, v in msgspec.to_builtins(standing).items() if k not in measured}


def _sign(folder: Path, options: Any, facts: dict[str, Any]) -> None:
    """Write down how the bundle came about; the model hash does not depend on it."""
    manifest = read_manifest(folder / MANIFEST_NAME)
    training = manifest.training | {"options": options, FACTS_KEY: facts}
    write_manifest(folder, msgspec.structs.replace(manifest, training=training))
