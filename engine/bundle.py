"""The model bundle: what stands in its folder, and the checks before anything of it is served.

A bundle is a folder of three files:

``manifest.json``
    `Manifest`: numerics, feature schema, normalisation, classes, SHA-256 of both models, and the
    hash over all of it that stands in every signal.
``model.int8.onnx``, ``model.fp32.onnx``
    The quantised model and its float twin: float32 (1, features) in, float32 (1, classes) out.
    Both carry the feature schema in their ``metadata_props`` under `METADATA_KEY`.

Only ONNX Runtime is needed to read one. `models` writes them.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from engine import features
from engine.hashes import json_hash
from feeds.errors import InputError

MANIFEST_NAME: Final = "manifest.json"
INT8_NAME: Final = "model.int8.onnx"
FP32_NAME: Final = "model.fp32.onnx"
METADATA_KEY: Final = "octick.feature_schema"
FORMAT_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 1 << 20
MAX_MODEL_BYTES: Final = 1 << 30
MAX_CLASSES: Final = 254  # a signal keeps 255 for "no class"

Numerics = Literal["exact-int8", "tolerance"]
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


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``manifest.json``. ``training`` says how it was made and takes no part in the hash."""

    format: int
    name: str
    numerics: Numerics
    feature_schema: str
    input: InputSection
    output: OutputSection
    int8_sha256: str
    fp32_sha256: str
    model_hash: str
    training: dict[str, Any] = {}


def model_hash(manifest: Manifest) -> int:
    """The number that names a model: everything that can change one of its outputs.

    Returns
    -------
    int
        First 64 bits of the SHA-256 over canonical JSON (sorted keys, shortest round-trip
        floats) of numerics, feature schema, normalisation, outputs and the digests of both
        ONNX files. Name, training notes and the manifest's own layout are left out.
    """
    semantic = {
        "format": manifest.format,
        "numerics": manifest.numerics,
        "feature_schema": manifest.feature_schema,
        "input": manifest.input,
        "output": manifest.output,
        "int8_sha256": manifest.int8_sha256,
        "fp32_sha256": manifest.fp32_sha256,
    }
    return json_hash(semantic)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A checked bundle.

    Attributes
    ----------
    path, int8_path, fp32_path : Path
    name : str
    model_hash, feature_hash : int
        Unsigned 64-bit, as they stand in a signal.
    numerics : str
        "exact-int8" or "tolerance".
    mean, inv_scale : ndarray of float64, shape (features,)
    clip : float
    classes : tuple of str
    input_name, output_name : str
    manifest : Manifest
    """

    path: Path
    manifest: Manifest
    name: str
    model_hash: int
    feature_hash: int
    numerics: Numerics
    int8_path: Path
    fp32_path: Path
    mean: np.ndarray = field(repr=False)
    inv_scale: np.ndarray = field(repr=False)
    clip: float
    classes: tuple[str, ...]
    input_name: str
    output_name: str

    @property
    def n_features(self) -> int:
        """Length of the model input."""
        return len(self.mean)

    @property
    def n_outputs(self) -> int:
        """Length of the model output."""
        return len(self.classes)

    def model_bytes(self, precision: str) -> bytes:
        """The ONNX file of a precision ("int8" or "fp32"), checked once more as it is read.

        Raises
        ------
        InputError
            If the file is gone or has changed since the bundle was loaded.
        """
        if precision == "int8":
            return _read_model(self.int8_path, self.manifest.int8_sha256, "int8_sha256")
        if precision == "fp32":
            return _read_model(self.fp32_path, self.manifest.fp32_sha256, "fp32_sha256")
        raise InputError(
            "unknown precision",
            where="model.precision",
            expected="int8 or fp32",
            found=repr(precision),
        )


def load_bundle(path: str | Path) -> Bundle:
    """Read and check a bundle.

    Parameters
    ----------
    path : str or Path
        The bundle's folder.

    Raises
    ------
    InputError
        For a missing, cut or changed file, a manifest with unknown keys or values that cannot be
        served, and features other than this engine's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            "no such model bundle",
            where=str(folder),
            expected=f"a folder with {MANIFEST_NAME}, {INT8_NAME} and {FP32_NAME}",
            found="a file" if folder.exists() else "nothing",
            fix="correct the path (model.bundle in the config, or --model)",
        )
    manifest = _read_manifest(folder / MANIFEST_NAME)
    _check_manifest(folder / MANIFEST_NAME, manifest)
    for name, digest, key in (
        (INT8_NAME, manifest.int8_sha256, "int8_sha256"),
        (FP32_NAME, manifest.fp32_sha256, "fp32_sha256"),
    ):
        _check_model(folder / name, _read_model(folder / name, digest, key), manifest)
    return Bundle(
        path=folder,
        manifest=manifest,
        name=manifest.name,
        model_hash=model_hash(manifest),
        feature_hash=features.SCHEMA_HASH,
        numerics=manifest.numerics,
        int8_path=folder / INT8_NAME,
        fp32_path=folder / FP32_NAME,
        mean=np.array(manifest.input.mean, dtype=np.float64),
        inv_scale=np.array(manifest.input.inv_scale, dtype=np.float64),
        clip=manifest.input.clip,
        classes=manifest.output.classes,
        input_name=manifest.input.name,
        output_name=manifest.output.name,
    )


def _read(path: Path, limit: int) -> bytes:
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
            expected=f"{MANIFEST_NAME}, {INT8_NAME} and {FP32_NAME} in the folder",
            found=error.strerror or type(error).__name__,
            fix="copy the whole bundle again",
        ) from None


_UNKNOWN_KEY: Final = re.compile(r"unknown field `(?P<key>.*?)`(?: - at `\$\.?(?P<at>.*)`)?$")
_SECTIONS: Final = {"": Manifest, "input": InputSection, "output": OutputSection}


def _read_manifest(path: Path) -> Manifest:
    data = _read(path, MAX_MANIFEST_BYTES)
    try:
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        unknown = _UNKNOWN_KEY.search(str(error))
        if unknown is None:
            raise InputError("bad manifest", where=str(path), found=str(error)) from None
        section, key = unknown["at"] or "", unknown["key"]
        known = _SECTIONS[section].__struct_fields__
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


def _check_manifest(path: Path, manifest: Manifest) -> None:
    def refuse(key: str, what: str, expected: str, found: object, fix: str = "") -> None:
        raise InputError(
            what, where=f"{path}: {key}", expected=expected, found=str(found), fix=fix or REBUILD
        )

    if manifest.format != FORMAT_VERSION:
        refuse("format", "unknown format of bundle", str(FORMAT_VERSION), manifest.format)
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
    found = f"{model_hash(manifest):016x}"
    if manifest.model_hash != found:
        refuse(
            "model_hash",
            "the manifest does not match its own hash: it was changed by hand or damaged",
            manifest.model_hash,
            found,
            "copy the bundle again, or rebuild it",
        )


def _read_model(path: Path, sha256: str, key: str) -> bytes:
    data = _read(path, MAX_MODEL_BYTES)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise InputError(
            f"the model differs from the one its manifest names under {key}",
            where=str(path),
            expected=f"SHA-256 {sha256}",
            found=f"{found} over {len(data)} bytes",
            fix="copy the bundle again, or rebuild it",
        )
    return data


def _check_model(path: Path, data: bytes, manifest: Manifest) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong is said once, below
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise InputError(
            "ONNX Runtime cannot load the model",
            where=str(path),
            expected="a whole ONNX file that this ONNX Runtime knows",
            found=str(error)[:300],
            fix=REBUILD,
        ) from None
    schema = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "none")
    if schema != features.SCHEMA_HEX:
        raise InputError(
            "the model was made for other features",
            where=f"{path}: metadata_props {METADATA_KEY}",
            expected=features.SCHEMA_HEX,
            found=schema,
            fix=REBUILD,
        )
    for kind, nodes, name, width in (
        ("input", session.get_inputs(), manifest.input.name, features.N_FEATURES),
        ("output", session.get_outputs(), manifest.output.name, len(manifest.output.classes)),
    ):
        found = ", ".join(f"{node.name}: {node.type} {node.shape}" for node in nodes)
        expected = f"{name}: tensor(float) {[1, width]}"
        if found != expected:
            raise InputError(
                f"wrong model {kind}",
                where=f"{path}: {kind} of the graph",
                expected=expected,
                found=found,
                fix=REBUILD,
            )
