"""A PyTorch module out of a user's own file, exported and held against its own answers.

Source: PyTorch documentation, "torch.export-based ONNX Exporter".
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort

from engine.backends.onnx_providers import session_options
from feeds.errors import InputError
from models.foreign.check import NEXT, STATIC_STEP_MODEL, checked, one_line
from models.foreign.passes import LOWEST_OPSET, quiet

EXPORT_TOLERANCE: Final = 1e-4  # of the greatest output: float32 sums in another order


def load_torch(spec: str) -> onnx.ModelProto:
    """Export a PyTorch module that a file of the user's makes.

    Parameters
    ----------
    spec : str
        ``FILE.py:FACTORY``. The file is run. ``FACTORY()`` gives ``(module, example)``, the example
        a tensor, or a tuple of the book state and the state tensors; a module with state returns
        its answer and the next state, in the same order. What weights it has it loads itself, from
        npz or ONNX.

    Returns
    -------
    ModelProto
        As `load_onnx`; inputs ``x``, ``state.0`` … and outputs ``logits``, ``state.0.next`` ….

    Raises
    ------
    InputError
        If the file, the factory or what it gives cannot be used, for control flow that depends on
        data or anything else that cannot be exported, and for a graph that answers otherwise than
        the module.
    """
    import torch

    module, example = _made_by(spec)
    if isinstance(example, torch.Tensor):
        example = (example,)
    tensors = isinstance(example, tuple) and all(isinstance(t, torch.Tensor) for t in example)
    if not isinstance(module, torch.nn.Module) or not tensors or not example:
        raise InputError(
            "the factory gives something else",
            where=spec,
            expected="(torch.nn.Module, example input: a tensor or a tuple of tensors)",
            found=f"({type(module).__name__}, {type(example).__name__})",
            fix="return both",
        )
    model, answers = exported(module, example, spec)
    model = checked(model, spec)
    _check_answers(model, spec, example, answers)
    return model


def exported(
    module: Any, example: tuple[Any, ...], where: str
) -> tuple[onnx.ModelProto, tuple[Any, ...]]:
    """A module's graph at the example's shapes, and what the module answers to the example.

    Parameters
    ----------
    module : torch.nn.Module
        It is put into evaluation mode.
    example : tuple of torch.Tensor
        The book state, then the state tensors.
    where : str
        Named in errors.

    Raises
    ------
    InputError
        See `load_torch`.
    """
    import torch

    before = [f"state.{number}" for number in range(len(example) - 1)]
    try:
        with quiet(), _silent(), torch.no_grad():
            module.eval()
            answer = module(*example)
            answers = tuple(answer) if isinstance(answer, tuple | list) else (answer,)
            if not all(isinstance(each, torch.Tensor) for each in answers):
                raise TypeError("the module gives something other than tensors")
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                opset_version=LOWEST_OPSET,
                input_names=["x", *before],
                output_names=["logits", *(name + NEXT for name in before)],
                verbose=False,
            )
            assert program is not None
            return program.model_proto, answers
    except Exception as error:  # whatever user code and the exporter throw
        raise _not_exported(where, error) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter prints graphs it failed on; the cause is said once, by the caller."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _made_by(spec: str) -> tuple[Any, Any]:
    """What the factory of ``FILE.py:FACTORY`` gives."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier() or not path.is_file():
        raise InputError(
            "no such model factory",
            where=spec,
            expected="FILE.py:FACTORY, a file that is there and the name of a function in it",
            found="no such file" if file and name.isidentifier() else "another form",
            fix="correct the path",
        )
    # Modules beside the file can be imported while it and its factory run.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        factory = getattr(_module_of(path), name, None)
        if not callable(factory):
            raise InputError(
                "no such model factory",
                where=spec,
                expected=f"a function {name} in {path.name}",
                found="none" if factory is None else type(factory).__name__,
                fix="define it, without parameters",
            )
        made = factory()
    except InputError:
        raise
    except Exception as error:  # user code
        raise InputError(
            "the model factory failed",
            where=spec,
            expected="(torch.nn.Module, example input)",
            found=f"{type(error).__name__}: {one_line(error)}",
            fix="repair the file",
        ) from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    return made if isinstance(made, tuple) and len(made) == 2 else (made, None)


def _module_of(path: Path) -> ModuleType:
    name = f"octick_foreign_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InputError("not a Python file", where=str(path), expected="a name that ends in .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        found.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def _not_exported(spec: str, error: BaseException) -> InputError:
    """The cause at the bottom of a chain of exceptions, in one line."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    kind = type(cause).__name__
    dynamic = "DataDependent" in kind or "Dynamic" in kind or "data-dependent" in str(cause)
    return InputError(
        "control flow or sizes that depend on data cannot be exported"
        if dynamic
        else "the module cannot be exported",
        where=spec,
        expected="a module that does the same operations at every step",
        found=f"{kind}: {one_line(cause)}",
        fix=STATIC_STEP_MODEL,
    )


def _check_answers(
    model: onnx.ModelProto, spec: str, example: tuple[Any, ...], answers: tuple[Any, ...]
) -> None:
    """The graph gives what the module gave."""
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    arrays = (tensor.detach().numpy() for tensor in example)
    found = session.run(None, dict(zip(names, arrays, strict=True)))
    for name, array, answer in zip(
        (value.name for value in session.get_outputs()), found, answers, strict=True
    ):
        expected = answer.detach().numpy()
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        worst = float(np.abs(array - expected).max(initial=0.0))
        if not worst <= EXPORT_TOLERANCE * scale:
            raise InputError(
                "the exported graph answers otherwise than the module",
                where=f"{spec}: output {name}",
                expected=f"the module's output within {EXPORT_TOLERANCE * scale:.2g}",
                found=f"a difference of {worst:.2g}",
                fix="take randomness and state of its own out of the module",
            )
