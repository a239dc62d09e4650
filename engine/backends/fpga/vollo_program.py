"""The program that a VOLLO card runs: where it is, whose it is, how far off it may be.

It is compiled from the bundle's FP32 model without its value check, by the vendor's compiler, under
the model name ``octick_<model hash>`` (``vollo-onnx --model-name``, or the name given to
``ProgramBuilder.add_nnir``), with one input and one output.

A model with state needs the streaming transform and ``generate_state_reset``. The accelerator then
keeps one state for each model of the program, so a program of ``n`` models of the same name serves
``n`` streams. Programs that take or give the state as further inputs and outputs are refused.

Source: VOLLO SDK 29 documentation, "Vollo Runtime", "ONNX Support", "vollo_rt".
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np

from engine.bundle import Bundle
from feeds.errors import InputError

PROGRAM_NAME: Final = "model.vollo"
PROGRAM_VARIABLE: Final = "OCTICK_VOLLO_PROGRAM"
GOLDEN_NAME: Final = "golden.npz"
DRAWN_ROWS: Final = 256  # where the bundle has no golden inputs
BFLOAT16_ROUNDOFF: Final = 2.0**-8  # of 8 significant bits, rounding to nearest
ROUNDINGS: Final = 8  # one a layer, of a model as deep as these cards serve


def tolerance(bundle: Bundle, reference: np.ndarray) -> float:
    """Greatest absolute difference of a score from the FP32 reference that is let pass.

    Parameters
    ----------
    bundle : Bundle
    reference : ndarray of float32, shape (n, classes)
        What the FP32 model says.

    Returns
    -------
    float
        ``bound + ROUNDINGS * BFLOAT16_ROUNDOFF * max |reference|``, with the manifest's bound:
        what frameworks were seen to differ by, and one rounding to bfloat16 a layer, at the scale
        of the greatest score. The vendor's examples allow 1e-2 relative plus 1e-2 absolute.
    """
    greatest = float(np.abs(reference).max(initial=0.0))
    return bundle.manifest.bound + ROUNDINGS * BFLOAT16_ROUNDOFF * greatest


def find_program(bundle: Bundle) -> Path:
    """The program to load: `PROGRAM_NAME` in the bundle, or what `PROGRAM_VARIABLE` names.

    Raises
    ------
    InputError
        If there is no such file.
    """
    named = os.environ.get(PROGRAM_VARIABLE, "")
    path = Path(named) if named else bundle.path / PROGRAM_NAME
    if not path.is_file():
        raise InputError(
            "no program for the card",
            where=f"{PROGRAM_VARIABLE}={named}" if named else str(path),
            expected="a program compiled from this bundle's FP32 model by the VOLLO compiler",
            found="no such file",
            fix=f"put it there, or name it in {PROGRAM_VARIABLE}",
        )
    return path


def import_runtime() -> tuple[Any, str]:
    """The vendor's module, and its name with the version where its package says one.

    Raises
    ------
    InputError
        If the runtime is not installed, or not for this Python.
    """
    try:
        runtime = import_module("vollo_rt")
    except ImportError as error:
        raise InputError(
            "the VOLLO runtime is not here",
            where="model.device",
            expected="the Python module vollo_rt, for this Python",
            found=str(error),
            fix="install it from Myrtle.ai's VOLLO SDK and source its setup.sh, or use another"
            " device",
        ) from None
    try:
        return runtime, f"vollo_rt {version('vollo-rt')}"
    except PackageNotFoundError:
        return runtime, "vollo_rt"


def open_context(held: ExitStack, runtime: Any, index: int, path: Path) -> tuple[Any, str]:
    """A context of the runtime with the program loaded, and what the card is.

    Parameters
    ----------
    held : ExitStack
        Leaves the context when it is closed.
    runtime : module
        ``vollo_rt``.
    index : int
        Of the card, in the order of the PCI addresses.
    path : Path
        The program.

    Raises
    ------
    InputError
        If the runtime opens no such card, or refuses the program.
    """
    try:
        context = held.enter_context(runtime.VolloRTContext())
        context.add_accelerator(index)
        cores = context.accelerator_num_cores(index)
        card = f"{cores} cores of block size {context.accelerator_block_size(index)}"
    except Exception as error:  # the runtime documents no type
        raise InputError(
            "the VOLLO runtime opens no such card",
            where=f"model.device vollo:{index}",
            expected="a programmed card with its driver and its licence",
            found=str(error)[:300],
            fix="see what vollo-tool says of the card",
        ) from None
    try:
        context.load_program(str(path))
    except Exception as error:  # likewise
        raise InputError(
            "the VOLLO runtime cannot load the program",
            where=f"{path} on vollo:{index}",
            expected=f"a program for {card}",
            found=str(error)[:300],
            fix="compile the model for this card's configuration",
        ) from None
    return context, card


def check_program(context: Any, bundle: Bundle, path: Path) -> tuple[int, ...]:
    """Whether the loaded program is this bundle's, and can do what it is needed for.

    Parameters
    ----------
    context : vollo_rt.VolloRTContext
        With the program loaded.
    bundle : Bundle
    path : Path

    Returns
    -------
    tuple of int
        The shape of an input: of as many elements as there are features.

    Raises
    ------
    InputError
        If a model of it has another name, other ends, or, for a bundle with state, none or none
        that can be reset.
    """
    expected = f"octick_{bundle.model_hash:016x}"
    stateful = bool(bundle.state("fp32"))
    for i in range(context.num_models() if stateful else 1):
        where = f"{path}: model {i}"
        name = context.model_name(i)
        if name != expected:
            raise InputError(
                "the program is not of this model",
                where=where,
                expected=f"the name {expected}",
                found=str(name),
                fix="compile this bundle's FP32 model under this name",
            )
        ends = (context.model_num_inputs(i), context.model_num_outputs(i))
        sizes: tuple[int, ...] = ()
        if ends == (1, 1):
            shapes = (context.model_input_shape(i), context.model_output_shape(i))
            sizes = tuple(math.prod(shape) for shape in shapes)
        if sizes != (bundle.n_features, bundle.n_outputs):
            raise InputError(
                "the program has other inputs and outputs than this model",
                where=where,
                expected=f"one input of {bundle.n_features} and one output of {bundle.n_outputs}",
                found=f"{ends[0]} and {ends[1]}"
                + (f" of {sizes[0]} and {sizes[1]}" if sizes else ""),
                fix="compile it without the value check, and with the state in the accelerator",
            )
        if stateful:
            _check_state(context, i, where)
    return tuple(context.model_input_shape(0))


def _check_state(context: Any, model: int, where: str) -> None:
    if context.model_input_streaming_dim(model) is None:
        raise InputError(
            "the bundle's model has state, and this program keeps none",
            where=where,
            expected="a program compiled with the streaming transform",
            found="no streaming dimension",
            fix="compile it with the streaming transform and generate_state_reset",
        )
    # Runtimes before SDK 28 do not say whether a reset would work.
    resettable = getattr(context, "model_is_resettable", None)
    if resettable is None or not resettable(model):
        raise InputError(
            "the state in the accelerator cannot be reset",
            where=where,
            expected="a program compiled with generate_state_reset, and VOLLO SDK 28 or newer",
            found="no model_is_resettable" if resettable is None else "a program without it",
            fix="compile it with generate_state_reset=True",
        )


def trial_inputs(bundle: Bundle) -> np.ndarray:
    """Inputs to measure a card with: the bundle's golden ones, or drawn within the clip.

    Returns
    -------
    ndarray of float32, shape (n, features)

    Raises
    ------
    InputError
        If the bundle's golden vectors are missing, changed, or of another shape.
    """
    digest = bundle.manifest.files.get(GOLDEN_NAME)
    if digest is None:
        drawn = np.random.default_rng(0).standard_normal((DRAWN_ROWS, bundle.n_features))
        return np.clip(drawn, -bundle.clip, bundle.clip).astype(np.float32)
    path = bundle.path / GOLDEN_NAME
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise InputError(
            "the golden vectors are not those that the manifest names",
            where=str(path),
            expected=f"SHA-256 {digest}",
            fix="copy the bundle again, or rebuild it",
        )
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        x: np.ndarray = arrays["x"] if "x" in arrays else np.zeros(0)
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != bundle.n_features or not len(x):
        raise InputError(
            "golden vectors of another shape",
            where=f"{path}: x",
            expected=f"float32 of shape (n, {bundle.n_features})",
            found=f"{x.dtype} of shape {x.shape}",
            fix="rebuild the bundle",
        )
    return np.ascontiguousarray(x)
