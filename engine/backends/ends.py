"""The ends of a model: the two arrays that its inferences read from and write to, in place.

A caller brings the same two nearly every time. So they are checked, and looked up in memory, when
others come, and an inference asks no more than whether they are still these. It asks inline, since
a call would cost more than the question::

    if x is not ends.x or out is not ends.out:
        ends.take(x, out)
"""

from __future__ import annotations

import numpy as np

from engine.backends.interface import BackendInfo


def check_arrays(info: BackendInfo, x: np.ndarray, out: np.ndarray) -> None:
    """Whether a model can have these arrays: it reads and writes them without another look."""
    for array, shape in ((x, info.input_shape), (out, info.output_shape)):
        assert array.shape == shape, f"shape {array.shape} instead of {shape}"
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
    assert out.flags.writeable


class Ends:
    """The arrays that were taken last, kept alive; at first none.

    Parameters
    ----------
    info : BackendInfo
        Of the model, for the shapes.

    Attributes
    ----------
    x, out : ndarray of float32, or None
    x_at, out_at : int
        Their addresses.
    """

    __slots__ = ("_info", "out", "out_at", "x", "x_at")

    def __init__(self, info: BackendInfo) -> None:
        self._info = info
        self.x: np.ndarray | None = None
        self.out: np.ndarray | None = None
        self.x_at = self.out_at = 0

    def take(self, x: np.ndarray, out: np.ndarray) -> None:
        """Use these two from now on.

        Parameters
        ----------
        x : ndarray of float32, shape ``info.input_shape``, C order
        out : ndarray of float32, shape ``info.output_shape``, C order, writable

        Raises
        ------
        AssertionError
            If they are anything else; those taken before stay.
        """
        check_arrays(self._info, x, out)
        self.x_at, self.out_at = int(x.ctypes.data), int(out.ctypes.data)
        self.x, self.out = x, out
