"""Putting another model in the place of the serving one, off the hot path until the last step.

A process of its own judges the candidate (`engine.candidate`); a thread opens it here; the swap
itself is one event between two ticks. A candidate that is refused leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from engine.backends.registry import open_backend
from engine.bundle import Bundle, load_bundle
from engine.candidate import Verdict
from engine.child import run_child
from engine.config import Config
from engine.pipeline import Pipeline
from engine.serving import Loaded
from engine.trust import MODE_FP32
from feeds.errors import InputError

JUDGE_TIMEOUT_S: Final = 600.0
MIN_JUDGED_ROWS: Final = 512  # inferences before agreement says anything


class Swapper:
    """Judges and opens candidates for a pipeline.

    Parameters
    ----------
    config : Config
    pipeline : Pipeline
    """

    def __init__(self, config: Config, pipeline: Pipeline) -> None:
        self._config = config
        self._pipeline = pipeline
        self._judged: set[tuple[int, str]] = set()  # (serving, candidate) that were found good

    async def judge(self, candidate: str) -> Verdict:
        """Hold a candidate against the serving model on the recent inferences.

        Raises
        ------
        InputError
            If the judge itself failed.
        """
        loaded = self._pipeline.trust.loaded
        assert loaded is not None
        model = self._config.model
        with tempfile.TemporaryDirectory(prefix="octick-candidate-") as folder:
            arguments = [
                *("-m", "engine.candidate", str(loaded.bundle.path), candidate),
                *("--backend", model.backend, "--device", model.device),
                *("--threads", str(model.threads), "--precision", model.precision),
                *("--max-agreement-loss", str(self._config.recalibration.max_agreement_loss)),
            ]
            vectors, slots = self._pipeline.trust.recent.kept()
            if len(vectors) >= MIN_JUDGED_ROWS:
                path = Path(folder) / "recent.npz"
                await asyncio.to_thread(np.savez, path, vector=vectors, stream=slots)
                arguments += ["--inputs", str(path)]
            code, out, err = await run_child(*arguments, timeout_s=JUDGE_TIMEOUT_S)
        try:
            return msgspec.json.decode(out, type=Verdict)
        except msgspec.DecodeError:
            raise InputError(
                "the candidate could not be judged",
                where=candidate,
                found=f"exit code {code}: {err.decode(errors='replace').strip()[-300:]}",
            ) from None

    async def open(self, candidate: str) -> Loaded:
        """Judge a candidate and open it, warm, in both precisions.

        A pair of models that was found good once in this session is not judged again: their
        hashes name their bits.

        Raises
        ------
        InputError
            If it is refused, with every reason, or cannot be opened.
        """
        loaded = self._pipeline.trust.loaded
        assert loaded is not None
        bundle = await asyncio.to_thread(load_bundle, candidate)
        pair = (loaded.bundle.model_hash, f"{bundle.model_hash:016x}")
        if pair[1] == f"{pair[0]:016x}":
            raise InputError(
                "the candidate is the model that serves", where=candidate, found=pair[1]
            )
        if pair not in self._judged:
            verdict = await self.judge(candidate)
            if not verdict.ok:
                raise InputError(
                    "the candidate is refused", where=candidate, found="; ".join(verdict.reasons)
                )
            if verdict.model_hash != pair[1]:
                raise InputError(
                    "the candidate changed while it was judged",
                    where=candidate,
                    expected=verdict.model_hash,
                    found=pair[1],
                )
            self._judged.add(pair)
        return await asyncio.to_thread(warm, self._config, bundle)


def open_model(config: Config, folder: str, model_hash: int) -> Loaded:
    """The bundle of a folder as the config serves it, warm in both precisions.

    Raises
    ------
    InputError
        If it cannot be opened, or is another model than ``model_hash``.
    """
    bundle = load_bundle(folder)
    if bundle.model_hash != model_hash:
        raise InputError(
            "another model than the event names",
            where=folder,
            expected=f"model {model_hash:016x}",
            found=f"{bundle.model_hash:016x}",
            fix="put the bundle that served back in its place, or name it with --model",
        )
    return warm(config, bundle)


def warm(config: Config, bundle: Bundle) -> Loaded:
    """Open a bundle as the config serves it, in both precisions."""
    model = config.model
    backend = open_backend(
        model.backend, bundle, model.device, threads=model.threads, precision=model.precision
    )
    loaded = Loaded(bundle, backend)
    loaded.backend(MODE_FP32)
    return loaded
