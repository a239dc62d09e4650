"""The source of a bundle's graphs: spec, float weights and scheme, in ``source.npz``.

With it PyTorch can compute what the graphs should, and a new calibration can start from the bundle
alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from feeds.errors import InputError
from models.export import npz_bytes
from models.operations import Spec
from models.scheme import Kept, Point, Rule, Scheme

SOURCE_NAME: Final = "source.npz"


class _SchemeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rule: Rule
    points: dict[str, tuple[float, int]]
    kept: dict[str, Kept]


@dataclass(frozen=True)
class Source:
    """What both graphs were written from.

    Attributes
    ----------
    spec : Spec
    fp32 : mapping of str to ndarray of float32
        Weights of the float twin, BatchNorm folded.
    int8 : mapping of str to ndarray of float32
        Weights that the scheme rounds: the same, unless they were trained quantised.
    scheme : Scheme or None
        None where ONNX Runtime's own tools quantised.
    """

    spec: Spec
    fp32: Mapping[str, np.ndarray]
    int8: Mapping[str, np.ndarray]
    scheme: Scheme | None

    def to_bytes(self) -> bytes:
        """An npz file."""
        arrays: dict[str, np.ndarray] = {"spec": np.array(msgspec.json.encode(self.spec).decode())}
        arrays |= {f"fp32.{name}": value for name, value in self.fp32.items()}
        if self.int8 is not self.fp32:
            arrays |= {f"int8.{name}": value for name, value in self.int8.items()}
        if self.scheme is not None:
            record = _SchemeRecord(
                self.scheme.rule,
                {name: (at.scale, at.zero_point) for name, at in self.scheme.points.items()},
                dict(self.scheme.kept),
            )
            arrays["scheme"] = np.array(msgspec.json.encode(record).decode())
            arrays |= {f"scale.{name}": v for name, v in self.scheme.weight_scales.items()}
        return npz_bytes(arrays)


def load_source(path: Path) -> Source:
    """Read ``source.npz``.

    Raises
    ------
    InputError
        If it is missing or damaged.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        spec = msgspec.json.decode(str(arrays["spec"]), type=Spec)
        scheme = None
        if "scheme" in arrays:
            record = msgspec.json.decode(str(arrays["scheme"]), type=_SchemeRecord)
            points = {name: Point(scale, zero) for name, (scale, zero) in record.points.items()}
            scheme = Scheme(record.rule, points, _named(arrays, "scale."), record.kept)
    except (OSError, ValueError, KeyError, msgspec.MsgspecError) as error:
        raise InputError(
            "cannot read the source of the bundle's graphs",
            where=str(path),
            found=str(error),
            fix="copy the whole bundle again, or quantise the training run again",
        ) from None
    fp32 = _named(arrays, "fp32.")
    return Source(spec, fp32, _named(arrays, "int8.") or fp32, scheme)


def _named(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
