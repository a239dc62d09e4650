"""The model bundle: what stands in its folder, and the checks before anything of it is served.

A bundle is a folder of three files that serve, and whatever else its manifest lists:

``manifest.json``
    `Manifest`: numerics, feature schema, normalisation, classes, state, SHA-256 of both models,
    value check, and the hash over all of it that stands in every signal.
``model.int8.onnx``, ``model.fp32.onnx``
    The quantised model and its float twin: float32 (1, features) in, float32 (1, classes) out,
    and behind them one input and one output for each `StateTensor`, in the manifest's order, and
    last the output of the value check, where the manifest has one.
    Both carry the feature schema in their ``metadata_props`` under `METADATA_KEY`.

Only ONNX Runtime is needed to read one. `models` writes them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from engine import features
from engine.manifest import (
    FP32_NAME,
    INT8_NAME,
    MANIFEST_NAME,
    METADATA_KEY,
    REBUILD,
    CheckSection,
    Manifest,
    Numerics,
    StateTensor,
    model_hash,
    read_file,
    read_manifest,
)
from feeds.errors import InputError

MAX_MODEL_BYTES: Final = 1 << 30
ONNX_DTYPES: Final = {
    "uint8": "tensor(uint8)",
    "float32": "tensor(float)",
    "int32": "tensor(int32)",
}


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

    @property
    def checks(self) -> CheckSection | None:
        """The value check of both graphs; None where they have none."""
        return self.manifest.checks

    @property
    def input_bound(self) -> np.ndarray:
        """Greatest true ``|x|`` before the clip, float64 of shape (features,); inf unchecked."""
        if self.checks is None:
            return np.full(self.n_features, np.inf)
        return np.array(self.checks.input_bound, dtype=np.float64)

    @property
    def max_constant(self) -> np.ndarray:
        """Rows that an input may stay the same, int64 of shape (features,); 0 is not checked."""
        if self.checks is None:
            return np.zeros(self.n_features, dtype=np.int64)
        return np.array(self.checks.max_constant, dtype=np.int64)

    def state(self, precision: str) -> tuple[StateTensor, ...]:
        """What the model of a precision ("int8" or "fp32") remembers; empty for most models.

        Raises
        ------
        InputError
            If there is no such precision.
        """
        if precision == "int8":
            return self.manifest.state.int8
        if precision == "fp32":
            return self.manifest.state.fp32
        raise _no_precision(precision)

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
        raise _no_precision(precision)


def _no_precision(precision: str) -> InputError:
    return InputError(
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
    manifest = read_manifest(folder / MANIFEST_NAME)
    for name, digest, key, state in (
        (INT8_NAME, manifest.int8_sha256, "int8_sha256", manifest.state.int8),
        (FP32_NAME, manifest.fp32_sha256, "fp32_sha256", manifest.state.fp32),
    ):
        _check_model(folder / name, _read_model(folder / name, digest, key), manifest, state)
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


def check_files(bundle: Bundle) -> None:
    """Hold every further file that the manifest lists against its SHA-256.

    Serving needs none of them, so `load_bundle` does not read them.

    Raises
    ------
    InputError
        For the first file, by name, that is missing or differs.
    """
    for name, digest in sorted(bundle.manifest.files.items()):
        _read_digested(bundle.path / name, digest, "file", f"files.{name}")


def _read_model(path: Path, sha256: str, key: str) -> bytes:
    return _read_digested(path, sha256, "model", key)


def _read_digested(path: Path, sha256: str, what: str, key: str) -> bytes:
    data = read_file(path, MAX_MODEL_BYTES)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise InputError(
            f"the {what} differs from the one its manifest names under {key}",
            where=str(path),
            expected=f"SHA-256 {sha256}",
            found=f"{found} over {len(data)} bytes",
            fix="copy the bundle again, or rebuild it",
        )
    return data


def _check_model(
    path: Path, data: bytes, manifest: Manifest, state: tuple[StateTensor, ...]
) -> None:
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
    n, classes = features.N_FEATURES, len(manifest.output.classes)
    _check_ends(
        path,
        "input",
        session.get_inputs(),
        [(manifest.input.name, "float32", (1, n)), *((t.input, t.dtype, t.shape) for t in state)],
    )
    outputs: list[tuple[str, str, tuple[int, ...]]] = [
        (manifest.output.name, "float32", (1, classes)),
        *((t.output, t.dtype, t.shape) for t in state),
    ]
    if manifest.checks is not None:
        outputs.append((manifest.checks.output, "int32", (1,)))
    _check_ends(path, "output", session.get_outputs(), outputs)


def _role(dtype: str) -> str:
    """What an end behind the first is: a state is never int32, and the value check always."""
    return "value check" if dtype == "int32" else "state"


def _check_ends(
    path: Path, kind: str, found: list[Any], expected: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    """The graph's inputs or outputs are those of the manifest, in its order."""
    ends = [f"{node.name}: {node.type} {node.shape}" for node in found]
    for i, (name, dtype, shape) in enumerate(expected):
        wanted = f"{name}: {ONNX_DTYPES[dtype]} {list(shape)}"
        if ends[i : i + 1] != [wanted]:
            raise InputError(
                f"wrong model {kind}",
                where=f"{path}: {kind} of the graph" + (f", {_role(dtype)} {name}" if i else ""),
                expected=wanted,
                found=ends[i] if i < len(ends) else "none",
                fix=REBUILD,
            )
    if len(ends) > len(expected):
        raise InputError(
            f"a model {kind} that the manifest does not name",
            where=f"{path}: {kind} of the graph",
            expected=f"{len(expected)}",
            found=", ".join(ends[len(expected) :]),
            fix=REBUILD,
        )
