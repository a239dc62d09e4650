"""The arrays that an inference reads and writes: taken whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from engine.backends.ends import Ends
from engine.backends.interface import BackendInfo
from engine.backends.onnx import OnnxBackend
from engine.backends.onnx_streams import BoundEnds
from engine.bundle import Bundle, load_bundle
from tests.engine.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("bundle")
    make_bundle(folder, seed=1)
    return load_bundle(folder)


@pytest.fixture(scope="module")
def info(bundle: Bundle) -> BackendInfo:
    return OnnxBackend.open(bundle).info()


def arrays(info: BackendInfo) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(info.input_shape, np.float32), np.zeros(info.output_shape, np.float32)


def read_only(out: np.ndarray) -> np.ndarray:
    out.flags.writeable = False
    return out


def test_what_does_not_fit_leaves_what_was_taken(info: BackendInfo) -> None:
    ends, (x, out) = Ends(info), arrays(info)
    ends.take(x, out)
    wide = np.zeros((1, 2 * x.shape[1]), np.float32)
    for bad_x, bad_out in (
        (x[:, :-1], out),
        (x.astype(np.float64), out),
        (wide[:, ::2], out),
        (x.copy(), out[:-1]),
        (x.copy(), read_only(out.copy())),
    ):
        with pytest.raises(AssertionError):
            ends.take(bad_x, bad_out)
        assert ends.x is x
        assert ends.out is out
        assert (ends.x_at, ends.out_at) == (x.ctypes.data, out.ctypes.data)


class Refusing:
    """A binding that does not take an output."""

    def bind_input(self, *what: object) -> None: ...

    def bind_output(self, *what: object) -> None:
        raise RuntimeError("no memory")


def test_arrays_that_were_not_bound_are_not_taken(bundle: Bundle, info: BackendInfo) -> None:
    refusing: ort.IOBinding = Refusing()
    ends, (x, out) = BoundEnds(info, bundle, [refusing]), arrays(info)
    with pytest.raises(RuntimeError, match="no memory"):
        ends.take(x, out)
    assert ends.x is None  # so the next inference asks again
