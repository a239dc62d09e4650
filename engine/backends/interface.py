"""What every inference backend offers, so that the pipeline does not know which one answers."""

from __future__ import annotations

from typing import Protocol, Self

import msgspec
import numpy as np

from engine.bundle import Bundle


class BackendInfo(msgspec.Struct, frozen=True):
    """What answers, for signals, logs and reports.

    Attributes
    ----------
    name, device : str
        As in the config: "onnx", "cpu".
    precision : str
        "int8" or "fp32".
    numerics : str
        What this backend keeps: "exact-int8" (the same bits everywhere) or "tolerance".
    input_shape, output_shape : tuple of int
    input_dtype, output_dtype : str
    model_hash : int
    isa : str
        Widest instruction set of this machine that matters to integer inference.
    threads : int
    library : str
        The library that runs the model, with its version.
    """

    name: str
    device: str
    precision: str
    numerics: str
    input_shape: tuple[int, ...]
    input_dtype: str
    output_shape: tuple[int, ...]
    output_dtype: str
    model_hash: int
    isa: str
    threads: int
    library: str


class Backend(Protocol):
    """One opened model. Not thread-safe: one owner, the pipeline.

    ``stream`` is one instrument's model state, from 0; models without state ignore it. A class
    method ``devices()``, where there is one, names the devices that ``octick backend list`` tries.
    """

    @classmethod
    def open(
        cls, bundle: Bundle, device: str, *, threads: int = 1, precision: str = "int8"
    ) -> Self:
        """Load the model, compile it and warm it up.

        Raises
        ------
        InputError
            If the device is unknown or absent, or this machine cannot keep the declared
            numerics.
        """
        ...

    def info(self) -> BackendInfo:
        """What was opened."""
        ...

    def infer(self, stream: int, x: np.ndarray, out: np.ndarray) -> int:
        """Run the model, and return when ``out`` is written.

        Parameters
        ----------
        stream : int
        x : ndarray of float32, shape (1, features), C order
            The normalised input, finite: the caller checks, INT8 would hide it.
        out : ndarray of float32, shape (classes,), C order
            Overwritten. Cheapest when the same two arrays come every time: they are bound once.

        Returns
        -------
        int
            What the value check of the model's graph has against this inference, as the bits of
            `engine.manifest.CheckSection`: 0 where nothing, or where the model has no such check.

        Raises
        ------
        RuntimeError
            If the device failed; ``out`` is then unspecified.
        """
        ...

    def submit(self, stream: int, ticket: int, x: np.ndarray) -> bool:
        """Start an inference whose answer `poll` brings; False where too many are under way."""
        ...

    def poll(self, out: np.ndarray) -> int:
        """The oldest answer not yet taken: writes ``out``, returns its ticket; -1 where none."""
        ...

    def reset(self, stream: int) -> None:
        """Forget a stream's state, at an epoch or a gap."""
        ...

    def close(self) -> None:
        """Give back the device. Nothing else may be called afterwards."""
        ...
