"""The pipeline that replays tapes: with which config, model and trust events."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.backends.registry import open_backend
from engine.bundle import Bundle, load_bundle
from engine.config import (
    Config,
    ModelConfig,
    config_hash,
    default_config,
    from_semantic,
    load_config,
    served_by,
)
from engine.pipeline import Pipeline
from engine.serving import Loaded
from engine.swap import open_model
from feeds.errors import InputError
from feeds.tape import TapeMeta


class Setting(NamedTuple):
    """A pipeline before its first event, and what it was made from.

    Attributes
    ----------
    pipeline : Pipeline
    config : Config
    bundle : Bundle or None
        The model that the replay begins with.
    followed : bool
        Whether commands and shadow answers on the tapes are taken; see `follows`.
    """

    pipeline: Pipeline
    config: Config
    bundle: Bundle | None
    followed: bool


@contextmanager
def opened(
    metas: Sequence[TapeMeta],
    *,
    model: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | Config | None = None,
    inference: bool = True,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Iterator[Setting]:
    """The pipeline that replays tapes with these headers; closed at the end.

    Parameters
    ----------
    metas : sequence of TapeMeta
    model, config, inference, backend, device, threads
        As `replay_tapes` takes them.

    Raises
    ------
    InputError
        For a bundle or config that cannot be used.
    """
    chosen = config if isinstance(config, Config) else choose_config(metas, config)
    chosen = served_by(chosen, backend, device, threads)
    bundle = served = None
    if inference:
        bundle = load_bundle(_bundle_path(model, chosen.model))
        served = open_backend(
            chosen.model.backend,
            bundle,
            chosen.model.device,
            threads=chosen.model.threads,
            precision=chosen.model.precision,
        )
    followed = follows(metas, chosen, bundle)
    pipeline = Pipeline(
        chosen,
        bundle,
        served,
        load=None if bundle is None else partial(load_swapped, chosen, bundle.path.parent),
        follow_trust_events=followed,
        engine_epoch=metas[0].engine_epoch,
    )
    try:
        yield Setting(pipeline, chosen, bundle, followed)
    finally:
        pipeline.close()


def choose_config(metas: Sequence[TapeMeta], path: str | os.PathLike[str] | None) -> Config:
    """The config of a replay: the named one, else the recorded one, else the default.

    Raises
    ------
    InputError
        If the tapes recorded different configs, or nothing names an instrument.
    """
    if path is not None:
        return load_config(path)
    recorded = {
        msgspec.json.encode(meta.config, order="sorted") if meta.config is not None else b""
        for meta in metas
    }
    if len(recorded) > 1:
        raise InputError(
            "the tapes were recorded with different configs",
            where="--config",
            fix="name the config to replay all of them with",
        )
    config = metas[0].config
    if config is not None:
        return from_semantic(config)
    names = {(item.venue, item.symbol) for meta in metas for item in meta.instruments}
    if not names:
        raise InputError(
            "the tape names no instrument",
            where="tape header",
            fix="name a config with --config",
        )
    return default_config(names)


def follows(metas: Sequence[TapeMeta], config: Config, bundle: Bundle | None) -> bool:
    """Whether commands and shadow answers on the tapes belong to this replay.

    They speak of the inferences of the session that recorded them: of one tape, with its model and
    its config.
    """
    if len(metas) != 1 or bundle is None:
        return False
    recorded = metas[0].hashes
    return (
        recorded.get("model") == f"{bundle.model_hash:016x}"
        and recorded.get("config") == f"{config_hash(config):016x}"
    )


def load_swapped(config: Config, beside: Path, model_hash: int, folder: str) -> Loaded:
    """The model that a swap on the tape names: where it was, or ``beside`` the first model.

    Raises
    ------
    InputError
        If neither holds it.
    """
    places = [Path(folder), beside / Path(folder).name]
    place = next((path for path in places if path.is_dir()), places[0])
    return open_model(config, str(place), model_hash)


def _bundle_path(model: str | os.PathLike[str] | None, config: ModelConfig) -> Path:
    if model is not None:
        return Path(model)
    if config.bundle:
        return Path(config.bundle)
    raise InputError(
        "no model named",
        where="--model",
        expected="the folder of a model bundle",
        fix="name one; 'octick replay' also runs without, with --no-inference",
    )
