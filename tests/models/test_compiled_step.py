"""The step through ``torch.compile``: the same scores, one state, and a reset that forgets."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models extra is not installed")

from feeds.errors import InputError  # noqa: E402
from models.compiled_step import CompiledStep, inference_settings  # noqa: E402
from models.execute import scores_of  # noqa: E402
from models.operations import Spec  # noqa: E402
from models.shapes import fold_norms, initial_parameters  # noqa: E402

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SPEC = Spec("gru", 6, 3, widths={"gru0": 5})
STEPS = 6


def arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((1, SPEC.n_features), np.float32), np.zeros((1, SPEC.n_classes), np.float32)


@needs_compiler
def test_it_steps_as_pytorch_does_and_forgets_at_a_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = fold_norms(SPEC, initial_parameters(SPEC, 1))
    rows = np.random.default_rng(2).normal(size=(STEPS, SPEC.n_features)).astype(np.float32)
    expected = scores_of(SPEC, parameters, rows)
    threads, graded = torch.get_num_threads(), torch.is_grad_enabled()
    with inference_settings():
        x, out = arrays()
        step = CompiledStep(SPEC, parameters, x, out)
        for _ in range(2):
            found = []
            for row in rows:
                x[0] = row
                step()
                found.append(out[0].copy())
            np.testing.assert_allclose(found, expected, atol=1e-5)
            step.reset()
        monkeypatch.setattr("models.compiled_step.TOLERANCE", -1.0)
        with pytest.raises(InputError, match="other scores"):
            CompiledStep(SPEC, parameters, x, out)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, graded)
    assert np.ptp(expected, axis=0).min() > 0, "steps differ, or the state would not show"


def test_without_a_compiler_it_says_so() -> None:
    from torch._inductor import config

    parameters = fold_norms(SPEC, initial_parameters(SPEC, 1))
    nowhere = config.patch({"cpp.cxx": (None, "a-compiler-that-is-not-there")})
    with nowhere, inference_settings(), pytest.raises(InputError, match=r"no C\+\+ compiler"):
        CompiledStep(SPEC, parameters, *arrays())
