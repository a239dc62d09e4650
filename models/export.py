"""Writing a bundle: graphs, golden vectors, calibration statistics, manifest.

Nothing is half-written: everything is put into a folder beside the target, which takes its name
when it is whole. The same models and numbers give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine import features
from engine.backends.qdq_graph import without_checks
from engine.manifest import (
    FORMAT_VERSION,
    FP32_NAME,
    INT8_NAME,
    MANIFEST_NAME,
    METADATA_KEY,
    CheckSection,
    InputSection,
    Manifest,
    Numerics,
    OutputSection,
    StateSection,
    StateTensor,
    model_hash,
)
from models.dataset import Normalisation
from models.foreign.passes import Wiring
from models.step_graph import INPUT_NAME, IR_VERSION, OPSET, OUTPUT_NAME, PRODUCER

GOLDEN_NAME: Final = "golden.npz"
CALIBRATION_NAME: Final = "calibration.npz"
REPORT_NAME: Final = "report.html"
RESEARCH_INT8_NAME: Final = "research.int8.onnx"
RESEARCH_FP32_NAME: Final = "research.fp32.onnx"
FEATURES_NAME: Final = "features"
# A fixed date, so that the same arrays give the same file.
_ZIP_DATE: Final = (1980, 1, 1, 0, 0, 0)


def research_graph(
    step: onnx.ModelProto, state: Sequence[StateTensor], normalisation: Normalisation
) -> onnx.ModelProto:
    """A graph from raw features of a whole stretch to its scores, in any number of steps.

    Input ``features`` float64 (steps, features), output ``logits`` float32 (steps, classes). The
    normaliser stands inside, in the float64 operations of `engine.advance`; then a Scan runs the
    very step graph over the rows from a fresh state, so that each score has the bits of the hot
    path. A value check of the step graph is left out.
    """
    step = without_checks(step)
    n = len(normalisation.mean)
    free = Wiring(step).unique  # a graph of others may have any of these names itself
    row, scores = free("row"), free("scores")
    row_shape, scores_shape = free("row.shape"), free("scores.shape")
    body = helper.make_graph(
        [*step.graph.node],
        "step",
        [
            *(value for value in step.graph.input if value.name != INPUT_NAME),
            helper.make_tensor_value_info(row, TensorProto.FLOAT, [n]),
        ],
        [
            *(value for value in step.graph.output if value.name != OUTPUT_NAME),
            helper.make_tensor_value_info(scores, TensorProto.FLOAT, None),
        ],
        [
            *step.graph.initializer,
            numpy_helper.from_array(np.array([1, n], dtype=np.int64), row_shape),
            numpy_helper.from_array(np.array([-1], dtype=np.int64), scores_shape),
        ],
    )
    classes = step.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    body.output[-1].type.tensor_type.shape.dim.add().dim_value = classes
    body.node.insert(
        0, helper.make_node("Reshape", [row, row_shape], [INPUT_NAME], name="row.reshape")
    )
    body.node.append(
        helper.make_node("Reshape", [OUTPUT_NAME, scores_shape], [scores], name="scores.reshape")
    )
    fresh = [numpy_helper.from_array(item.fresh(), free(f"{item.input}.initial")) for item in state]
    numbers = {
        "mean": normalisation.mean,
        "inv_scale": normalisation.inv_scale,
        "low": np.float64(-normalisation.clip),
        "high": np.float64(normalisation.clip),
    }
    constants = [
        numpy_helper.from_array(np.asarray(value, dtype=np.float64), f"normalise.{name}")
        for name, value in numbers.items()
    ]
    centred, scaled, clipped, rows = (free(x) for x in ("centred", "scaled", "clipped", "rows"))
    nodes = [
        helper.make_node("Sub", [FEATURES_NAME, "normalise.mean"], [centred], name="centre"),
        helper.make_node("Mul", [centred, "normalise.inv_scale"], [scaled], name="scale"),
        helper.make_node(
            "Clip", [scaled, "normalise.low", "normalise.high"], [clipped], name="clip"
        ),
        helper.make_node("Cast", [clipped], [rows], name="cast", to=TensorProto.FLOAT),
        helper.make_node(
            "Scan",
            [*(item.name for item in fresh), rows],
            [*(free(f"{item.output}.last") for item in state), OUTPUT_NAME],
            name="steps",
            body=body,
            num_scan_inputs=1,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "research",
        [helper.make_tensor_value_info(FEATURES_NAME, TensorProto.DOUBLE, ["steps", n])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["steps", classes])],
        [*constants, *fresh],
    )
    model = helper.make_model(
        graph,
        opset_imports=list(step.opset_import) or [helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
    )
    model.metadata_props.extend(step.metadata_props)
    onnx.checker.check_model(model, full_check=True)
    return model


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An npz file of arrays, the same bytes for the same arrays; no pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(arrays[name]), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _ZIP_DATE), member.getvalue())
    return out.getvalue()


def write_bundle(
    folder: Path,
    name: str,
    int8: onnx.ModelProto,
    fp32: onnx.ModelProto,
    *,
    numerics: Numerics,
    normalisation: Normalisation,
    classes: tuple[str, ...],
    state: StateSection = StateSection(),  # noqa: B008 - frozen
    checks: CheckSection | None = None,
    bound: float = 0.0,
    training: dict[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    schema_hex: str = features.SCHEMA_HEX,
) -> Manifest:
    """Write a whole bundle; what stood there before is replaced when the new one is complete.

    Parameters
    ----------
    folder : Path
    int8, fp32 : ModelProto
        Step graphs; ``metadata_props`` get the feature schema.
    state : StateSection
        What each of them remembers.
    checks : CheckSection, optional
        Of their value check, where they have one.
    bound : float
        See `engine.manifest.Manifest`.
    training : dict, optional
        How the model was made and measured; takes no part in the model hash.
    files : mapping of str to bytes, optional
        Further files, listed with their hashes.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        digests = []
        for file_name, model in ((INT8_NAME, int8), (FP32_NAME, fp32)):
            _stamp(model, {METADATA_KEY: schema_hex})
            data = model.SerializeToString(deterministic=True)
            (partial / file_name).write_bytes(data)
            digests.append(hashlib.sha256(data).hexdigest())
        hashes = {}
        for file_name, data in (files or {}).items():
            (partial / file_name).write_bytes(data)
            hashes[file_name] = hashlib.sha256(data).hexdigest()
        manifest = write_manifest(
            partial,
            Manifest(
                format=FORMAT_VERSION,
                name=name,
                numerics=numerics,
                bound=bound,
                feature_schema=schema_hex,
                input=InputSection(
                    name=INPUT_NAME,
                    mean=tuple(float(value) for value in normalisation.mean),
                    inv_scale=tuple(float(value) for value in normalisation.inv_scale),
                    clip=normalisation.clip,
                ),
                output=OutputSection(name=OUTPUT_NAME, classes=classes),
                state=state,
                checks=checks,
                int8_sha256=digests[0],
                fp32_sha256=digests[1],
                model_hash="",
                files=hashes,
                training=training or {},
            ),
        )
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _stamp(model: onnx.ModelProto, values: Mapping[str, str]) -> None:
    """Set metadata, in order of name."""
    kept = {item.key: item.value for item in model.metadata_props} | dict(values)
    del model.metadata_props[:]
    helper.set_model_props(model, dict(sorted(kept.items())))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write ``manifest.json`` with its hash filled in; returns the manifest as written."""
    manifest = msgspec.structs.replace(manifest, model_hash=f"{model_hash(manifest):016x}")
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / MANIFEST_NAME).write_bytes(data + b"\n")
    return manifest
