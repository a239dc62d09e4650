"""``manifest.json``: what a model bundle says of itself, and the checks of every value in it.

`engine.bundle` says what else stands in the folder.
"""

from __future__ import annotations

import difflib
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import msgspec
import numpy as np

from engine import features
from engine.hashes import json_hash
from feeds.errors import InputError

MANIFEST_NAME: Final = "manifest.json"
INT8_NAME: Final = "model.int8.onnx"
FP32_NAME: Final = "model.fp32.onnx"
METADATA_KEY: Final = "octick.feature_schema"
FORMAT_VERSION: Final = 2
MAX_MANIFEST_BYTES: Final = 1 << 20
MAX_CLASSES: Final = 254  # a signal keeps 255 for "no class"
MAX_STATE_TENSORS: Final = 1024
MAX_STATE_BYTES: Final = 1 << 24  # of one stream, all tensors together
MAX_CONSTANT_ROWS: Final = 1 << 31
VIOLATIONS: Final = "violations"  # the graph output of the value check
CHECK_PREFIX: Final = "check/"  # of every node and tensor that only checks
FLOAT32_MAX: Final = float(np.finfo(np.float32).max)

Numerics = Literal["exact-int8", "tolerance"]
StateDtype = Literal["uint8", "float32"]
REBUILD: Final = "rebuild the bundle with this version, or run the version that made it"


class InputSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model input: ``x = clip((feature - mean) * inv_scale, -clip, clip)`` as float32."""

    name: str
    mean: tuple[float, ...]
    inv_scale: tuple[float, ...]
    clip: float


class OutputSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model output: one score a class, in this order; the greatest is the prediction."""

    name: str
    classes: tuple[str, ...]


class StateTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of what a model remembers from one inference of a stream to the next.

    Attributes
    ----------
    input, output : str
        The graph input that is read and the graph output that is read next time.
    dtype : str
        "uint8" (activations as they are quantised) or "float32".
    shape : tuple of int
        The same on both sides, every dimension fixed.
    initial : float
        Each element of a fresh stream: a zero point, or 0.
    """

    input: str
    output: str
    dtype: StateDtype
    shape: tuple[int, ...]
    initial: float

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def fresh(self) -> np.ndarray:
        """A new stream's array."""
        return np.full(self.shape, self.initial, dtype=self.dtype)


class StateSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each of the two models remembers, in the order of its graph's inputs and outputs."""

    int8: tuple[StateTensor, ...] = ()
    fp32: tuple[StateTensor, ...] = ()


class CheckSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the value check of both graphs says, and what the engine is to look for itself.

    Attributes
    ----------
    output : str
        The last output of both graphs, int32 of shape (1,): a bitmask, 0 where nothing is wrong.
        Bit 0 is an input that is no finite number within the clip, bit 1 a score that is none,
        bits 2 to 7 are the engine's, bit ``8 + i`` is quantised layer ``i``.
    int8 : tuple of str
        The layers of the INT8 graph, in that order; those from the 24th on share bit 31.
    input_bound : tuple of float
        Of each feature, the greatest ``|(feature - mean) * inv_scale|`` that can be true, before
        the clip.
    max_constant : tuple of int
        Of each feature, how many consecutive rows of one stream may have the same input before it
        counts as stuck; 0 is not checked.
    """

    output: str
    int8: tuple[str, ...]
    input_bound: tuple[float, ...]
    max_constant: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``manifest.json``.

    ``bound`` is, for numerics "tolerance", the greatest absolute difference of an output that
    another optimisation level, thread count or framework was seen to make; "exact-int8" has 0.
    ``checks`` is left out where the graphs have no value check.
    ``files`` lists the SHA-256 of further files in the folder (see `engine.bundle.check_files`).
    ``training`` says how the model was made. Bound, files and training take no part in the hash.
    """

    format: int
    name: str
    numerics: Numerics
    bound: float = 0.0
    feature_schema: str
    input: InputSection
    output: OutputSection
    state: StateSection = StateSection()
    checks: CheckSection | None = None
    int8_sha256: str
    fp32_sha256: str
    model_hash: str
    files: dict[str, str] = {}
    training: dict[str, Any] = {}


def model_hash(manifest: Manifest) -> int:
    """The number that names a model: everything that can change one of its outputs.

    Returns
    -------
    int
        First 64 bits of the SHA-256 over canonical JSON (sorted keys, shortest round-trip
        floats) of numerics, feature schema, normalisation, outputs, state, value check and the
        digests of both ONNX files. Name, bound, further files, training notes and the manifest's
        own layout are left out.
    """
    # As it will be read: a whole number that was given for a float then has the float's hash.
    manifest = msgspec.convert(msgspec.to_builtins(manifest), Manifest)
    semantic: dict[str, Any] = {
        "format": manifest.format,
        "numerics": manifest.numerics,
        "feature_schema": manifest.feature_schema,
        "input": manifest.input,
        "output": manifest.output,
        "state": manifest.state,
        "int8_sha256": manifest.int8_sha256,
        "fp32_sha256": manifest.fp32_sha256,
    }
    if manifest.checks is not None:  # a bundle without them keeps the hash it always had
        semantic["checks"] = manifest.checks
    return json_hash(semantic)


def read_manifest(path: Path) -> Manifest:
    """Read and check ``manifest.json``; see `engine.bundle.load_bundle`."""
    manifest = _decode(read_file(path, MAX_MANIFEST_BYTES), path)
    _check_manifest(path, manifest)
    return manifest


def read_file(path: Path, limit: int) -> bytes:
    """A file of the bundle, at most ``limit`` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(
                "file too large for a bundle",
                where=str(path),
                expected=f"at most {limit} bytes",
                found=str(size),
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            "cannot read a file of the bundle",
            where=str(path),
            expected="the file, as its manifest lists it",
            found=error.strerror or type(error).__name__,
            fix="copy the whole bundle again",
        ) from None


_UNKNOWN_KEY: Final = re.compile(r"unknown field `(?P<key>.*?)`(?: - at `\$\.?(?P<at>.*)`)?$")
_INDEX: Final = re.compile(r"\[\d+\]")
_SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    "": Manifest,
    "input": InputSection,
    "output": OutputSection,
    "state": StateSection,
    "state.int8": StateTensor,
    "state.fp32": StateTensor,
    "checks": CheckSection,
}
_FILE_NAME: Final = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)*[A-Za-z0-9][\w.-]*", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class _Format(msgspec.Struct, frozen=True):
    """What every format of manifest begins with."""

    format: int = FORMAT_VERSION


def _decode(data: bytes, path: Path) -> Manifest:
    try:
        # The format first: another one has other keys, which would be called unknown.
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT_VERSION:
            _refuse(path, "format", "unknown format of bundle", str(FORMAT_VERSION), found)
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        unknown = _UNKNOWN_KEY.search(str(error))
        if unknown is None:
            raise InputError("bad manifest", where=str(path), found=str(error)) from None
        section, key = unknown["at"] or "", unknown["key"]
        known = _SECTIONS[_INDEX.sub("", section)].__struct_fields__
        nearest = difflib.get_close_matches(key, known, n=1)
        raise InputError(
            "unknown key",
            where=f"{path}: {section + '.' if section else ''}{key}",
            expected="one of " + ", ".join(known),
            fix=f"did you mean {nearest[0]}?" if nearest else "remove it",
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            "not a manifest",
            where=str(path),
            expected="JSON",
            found=str(error),
            fix="copy the whole bundle again",
        ) from None


def _refuse(
    path: Path, key: str, what: str, expected: str, found: object, fix: str = REBUILD
) -> NoReturn:
    raise InputError(what, where=f"{path}: {key}", expected=expected, found=str(found), fix=fix)


def _check_manifest(path: Path, manifest: Manifest) -> None:
    refuse = partial(_refuse, path)
    if manifest.feature_schema != features.SCHEMA_HEX:
        refuse(
            "feature_schema",
            "the model was made for other features",
            features.SCHEMA_HEX,
            manifest.feature_schema,
        )
    n = features.N_FEATURES
    for key, values in (
        ("input.mean", manifest.input.mean),
        ("input.inv_scale", manifest.input.inv_scale),
    ):
        if len(values) != n:
            refuse(key, "wrong length", f"{n} numbers, one a feature", len(values))
        for i, value in enumerate(values):
            if not math.isfinite(value) or (key == "input.inv_scale" and value <= 0.0):
                expected = "a finite number" + (" above 0" if key == "input.inv_scale" else "")
                refuse(f"{key}[{i}]", "a number that cannot normalise", expected, value)
    if not math.isfinite(manifest.input.clip) or manifest.input.clip <= 0.0:
        refuse("input.clip", "not a clip", "a finite number above 0", manifest.input.clip)
    classes = manifest.output.classes
    if not 1 <= len(classes) <= MAX_CLASSES or len(set(classes)) != len(classes):
        refuse("output.classes", "bad classes", f"1 to {MAX_CLASSES} different names", classes)
    bound = manifest.bound
    if not math.isfinite(bound) or bound < 0.0:
        refuse("bound", "not a bound", "a finite number, 0 or above", bound)
    if bound > 0.0 and manifest.numerics == "exact-int8":
        refuse("bound", "an exact model with a tolerance", "0 for exact-int8", bound)
    for precision, state in (("int8", manifest.state.int8), ("fp32", manifest.state.fp32)):
        _check_state(path, f"state.{precision}", state, manifest)
    if manifest.checks is not None:
        _check_checks(path, manifest.checks, manifest)
    for name, digest in manifest.files.items():
        if not _FILE_NAME.fullmatch(name) or name in (MANIFEST_NAME, INT8_NAME, FP32_NAME):
            refuse("files", "bad name of a further file", "a path inside the folder", repr(name))
        if not _SHA256.fullmatch(digest):
            refuse(f"files.{name}", "not a SHA-256", "64 lower-case hex digits", repr(digest))
    found = f"{model_hash(manifest):016x}"
    if manifest.model_hash != found:
        refuse(
            "model_hash",
            "the manifest does not match its own hash: it was changed by hand or damaged",
            manifest.model_hash,
            found,
            "copy the bundle again, or rebuild it",
        )


def _check_state(
    path: Path, section: str, state: tuple[StateTensor, ...], manifest: Manifest
) -> None:
    if len(state) > MAX_STATE_TENSORS:
        _refuse(path, section, "too much state", f"at most {MAX_STATE_TENSORS}", len(state))
    taken = {"input": {manifest.input.name}, "output": {manifest.output.name}}
    for i, tensor in enumerate(state):
        refuse = partial(_refuse, path)
        for side, name in (("input", tensor.input), ("output", tensor.output)):
            if not name or name in taken[side]:
                key = f"{section}[{i}].{side}"
                refuse(key, f"bad name of a state {side}", "a name that nothing else has", name)
            taken[side].add(name)
        if any(size < 1 for size in tensor.shape):
            refuse(f"{section}[{i}].shape", "bad shape", "sizes above 0", tensor.shape)
        key, initial = f"{section}[{i}].initial", tensor.initial
        if tensor.dtype == "uint8" and initial not in range(256):
            refuse(key, "not a uint8", "a whole number from 0 to 255", initial)
        if not abs(initial) <= FLOAT32_MAX or float(np.float32(initial)) != initial:
            refuse(key, "not a float32", "a finite number that float32 holds", initial)
    total = sum(tensor.nbytes for tensor in state)
    if total > MAX_STATE_BYTES:
        _refuse(path, section, "too much state", f"at most {MAX_STATE_BYTES} bytes", total)


def _check_checks(path: Path, checks: CheckSection, manifest: Manifest) -> None:
    refuse = partial(_refuse, path)
    state = (*manifest.state.int8, *manifest.state.fp32)
    if checks.output != VIOLATIONS:
        refuse("checks.output", "bad name of the value check", VIOLATIONS, repr(checks.output))
    if VIOLATIONS in (manifest.output.name, *(tensor.output for tensor in state)):
        expected, found = "a name that no other output has", repr(VIOLATIONS)
        refuse("checks.output", "the name of the value check is taken", expected, found)
    for i, name in enumerate(checks.int8):
        if not name or name in checks.int8[:i]:
            key, expected = f"checks.int8[{i}]", "a name that no other layer has"
            refuse(key, "bad name of a checked layer", expected, repr(name))
    n = features.N_FEATURES
    for key, values in (
        ("checks.input_bound", checks.input_bound),
        ("checks.max_constant", checks.max_constant),
    ):
        if len(values) != n:
            refuse(key, "wrong length", f"{n} numbers, one a feature", len(values))
    for i, bound in enumerate(checks.input_bound):
        if not math.isfinite(bound) or bound <= 0.0:
            key = f"checks.input_bound[{i}]"
            refuse(key, "not a bound", "a finite number above 0", bound)
    for i, rows in enumerate(checks.max_constant):
        if not 0 <= rows < MAX_CONSTANT_ROWS:
            key, expected = f"checks.max_constant[{i}]", f"0 or more, below {MAX_CONSTANT_ROWS}"
            refuse(key, "not a number of rows", expected, rows)
