"""The daemon's configuration: TOML in, frozen structs out, nothing silently ignored.

An unknown key is refused with the nearest known one, a wrong type or a value out of range with
its key, and only `semantic` — what can change a signal — goes into the hash that signals carry.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from engine.config_checks import check_config
from engine.controls import ControlsConfig
from engine.drift import DriftConfig
from engine.failover import FailoverConfig
from engine.hashes import json_hash
from feeds.errors import InputError

MAX_DURATION_NS: Final = 86_400_000_000_000  # one day
MAX_BYTES: Final = 1 << 30
MAX_COUNT: Final = 2_147_483_647  # what ZeroMQ takes for a high-water mark
MAX_THREADS: Final = 256
MIN_LEVELS: Final = 16
MAX_LEVELS: Final = 65_534  # what a group of an SBE message can hold
MIN_TIMER_NS: Final = 1_000_000
MAX_CORES: Final = 4_095
MAX_WAKE_US: Final = 1_000_000
MAX_CONFIG_BYTES: Final = 1 << 20

Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Bytes = Annotated[int, Meta(ge=1, le=MAX_BYTES)]
Duration = Annotated[int, Meta(ge=1, le=MAX_DURATION_NS)]


class _Section(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class FeedConfig(_Section, frozen=True):
    """One publisher of market data. An empty ``snapshot_endpoint`` means it serves none."""

    endpoint: str
    snapshot_endpoint: str = ""


class InstrumentConfig(_Section, frozen=True):
    """One instrument to follow, by the names its feed uses."""

    venue: str
    symbol: str


class ModelConfig(_Section, frozen=True):
    """The model bundle and what runs it."""

    bundle: str = ""
    backend: str = "onnx"
    device: str = "cpu"
    threads: Annotated[int, Meta(ge=1, le=MAX_THREADS)] = 1
    precision: Literal["int8", "fp32"] = "int8"


class TriggerConfig(_Section, frozen=True):
    """When a signal is computed: each change of the top of book, every N events, every T ns."""

    kind: Literal["top-of-book", "events", "time"] = "top-of-book"
    every_events: Count = 1
    every_ns: Duration = 100_000_000


class BookConfig(_Section, frozen=True):
    """How many price levels a side of a book can hold."""

    max_levels: Annotated[int, Meta(ge=MIN_LEVELS, le=MAX_LEVELS)] = 16_384


class TrustConfig(_Section, frozen=True):
    """When a book is too old to be believed."""

    stale_after_ns: Duration = 5_000_000_000


class ShadowConfig(_Section, frozen=True):
    """The FP32 twin beside the hot path: on each ``every``-th inference, 0 for none.

    An inference waits ``gather_ns`` at most for others (and a quarter of ``lost_after_ns``), to be
    answered in a row with them: less tells sooner where the models diverge, more disturbs the hot
    path less where cores are short.
    """

    every: Annotated[int, Meta(ge=0, le=MAX_COUNT)] = 0
    gather_ns: Annotated[int, Meta(ge=0, le=10_000_000_000)] = 200_000_000
    poll_ns: Annotated[int, Meta(ge=MIN_TIMER_NS, le=MAX_DURATION_NS)] = 100_000_000
    lost_after_ns: Duration = 1_000_000_000
    restart_after_ns: Duration = 2_000_000_000
    max_waiting: Annotated[int, Meta(ge=8, le=1 << 16)] = 1_024


class ControlConfig(_Section, frozen=True):
    """Where commands are taken, "" for nowhere; loopback and ipc only, else with CURVE.

    ``curve_clients_folder`` holds the public keys of those who may command.
    """

    endpoint: str = ""
    curve_secret_key_file: str = ""
    curve_clients_folder: str = ""


class RecalibrationConfig(_Section, frozen=True):
    """Making a fresh candidate from the session's own tape; ``folder`` "" turns it off.

    Every ``every_ns`` of event time (0: never by itself), where the drift monitor warns, and by
    command. ``rows`` are the most recent ones that it calibrates from.
    """

    folder: str = ""
    every_ns: Annotated[int, Meta(ge=0, le=30 * MAX_DURATION_NS)] = MAX_DURATION_NS
    on_drift: bool = True
    rows: Annotated[int, Meta(ge=1_000, le=1_000_000)] = 100_000
    max_agreement_loss: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.005
    min_pause_ns: Duration = 600_000_000_000


class EvidenceConfig(_Section, frozen=True):
    """Where each transition leaves its evidence, "" for nowhere."""

    folder: str = ""


class MetricsConfig(_Section, frozen=True):
    """``host:port`` on which a Prometheus server may ask, "" for none."""

    address: str = ""


class PublishConfig(_Section, frozen=True):
    """Where signals are published."""

    endpoint: str = ""


class TapeConfig(_Section, frozen=True):
    """Where the session is recorded; an empty ``path`` records nothing."""

    path: str = ""
    seal: bool = False


class LimitsConfig(_Section, frozen=True):
    """Every bound of the daemon, with its unit."""

    max_pending_bytes: Bytes = 4_194_304
    max_drain_messages: Count = 256
    max_drain_ns: Duration = 1_000_000
    max_message_bytes: Bytes = 4_194_304
    timer_ns: Annotated[int, Meta(ge=MIN_TIMER_NS, le=MAX_DURATION_NS)] = 100_000_000
    snapshot_timeout_ns: Duration = 2_000_000_000
    receive_hwm: Count = 100_000
    send_hwm: Count = 100_000


class LoopConfig(_Section, frozen=True):
    """How the event loop waits.

    Where nothing happens the hot path waits for ``wait_ns`` at most, by which the loop's timers
    may be late. ``busy_poll`` looks for messages in place of sleeping, and every ``spin_ns``
    whether anything else has something to do. Every ``warm_every_ns`` it rehearses where it waits,
    so that code and data stay in the caches; 0 is never. ``core`` is the core that the hot path
    keeps to, and that nothing else of the engine uses; -1 leaves it to the system. With it,
    ``io_core`` is the core of ZeroMQ's threads: the same one is soonest where messages are few, -1
    is any other.
    ``cpu_dma_latency_us`` is how long an idle core of the machine may take to wake while the engine
    runs: at 0 idle cores poll in place of halting, -1 leaves them to the system.
    """

    busy_poll: bool = False
    spin_ns: Duration = 200_000
    wait_ns: Annotated[int, Meta(ge=100_000, le=1_000_000_000)] = 25_000_000
    warm_every_ns: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 1_000_000
    core: Annotated[int, Meta(ge=-1, le=MAX_CORES)] = -1
    io_core: Annotated[int, Meta(ge=-1, le=MAX_CORES)] = -1
    cpu_dma_latency_us: Annotated[int, Meta(ge=-1, le=MAX_WAKE_US)] = -1
    uvloop: bool = True


class OverloadConfig(_Section, frozen=True):
    """What becomes of signals when messages come faster than the engine can carry.

    From ``conflate_after_ns`` of lag on (0: never), and until no message waits, an instrument has
    at most one signal in ``conflate_every_ns`` of market time. Every message still goes into book
    and features, in order.
    """

    conflate_after_ns: Annotated[int, Meta(ge=0, le=MAX_DURATION_NS)] = 100_000_000
    conflate_every_ns: Duration = 10_000_000


class Config(_Section, frozen=True):
    """Everything the daemon is told. Relative paths are relative to the config file."""

    feeds: tuple[FeedConfig, ...] = msgspec.field(default=(), name="feed")
    instruments: tuple[InstrumentConfig, ...] = msgspec.field(default=(), name="instrument")
    model: ModelConfig = ModelConfig()
    trigger: TriggerConfig = TriggerConfig()
    book: BookConfig = BookConfig()
    trust: TrustConfig = TrustConfig()
    failover: FailoverConfig = FailoverConfig()
    controls: ControlsConfig = ControlsConfig()
    shadow: ShadowConfig = ShadowConfig()
    control: ControlConfig = ControlConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    recalibration: RecalibrationConfig = RecalibrationConfig()
    drift: DriftConfig = DriftConfig()
    metrics: MetricsConfig = MetricsConfig()
    publish: PublishConfig = PublishConfig()
    tape: TapeConfig = TapeConfig()
    limits: LimitsConfig = LimitsConfig()
    overload: OverloadConfig = OverloadConfig()
    loop: LoopConfig = LoopConfig()


def load_config(path: str | os.PathLike[str], *, live: bool = False) -> Config:
    """Read and check a config file.

    Parameters
    ----------
    path : path-like
        A TOML file.
    live : bool
        Also ask for what only the daemon needs: a feed, a model bundle and an endpoint to
        publish on.

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or says something that is not understood.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            "config cannot be read", where=str(file), found=error.strerror or str(error)
        ) from None
    if len(data) > MAX_CONFIG_BYTES:
        raise InputError(
            "config too large",
            where=str(file),
            expected=f"at most {MAX_CONFIG_BYTES} bytes",
            found=str(len(data)),
        )
    try:
        raw = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("config is no TOML", where=str(file), found=str(error)) from None
    config = parse_config(raw, where=str(file), folder=file.resolve().parent)
    if live:
        require_live(config, where=str(file))
    return config


def parse_config(raw: dict[str, Any], *, where: str, folder: Path | None = None) -> Config:
    """Check what a TOML document holds; ``where`` names it in errors.

    Relative ``model.bundle`` and ``tape.path`` are resolved against ``folder`` where one is given.
    """
    config: Config = _convert(raw, Config, where)
    check_config(config, where)
    if folder is None:
        return config
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, bundle=_resolve(folder, config.model.bundle)),
        tape=msgspec.structs.replace(config.tape, path=_resolve(folder, config.tape.path)),
        controls=msgspec.structs.replace(
            config.controls, halt_file=_resolve(folder, config.controls.halt_file)
        ),
        control=msgspec.structs.replace(
            config.control,
            curve_secret_key_file=_resolve(folder, config.control.curve_secret_key_file),
            curve_clients_folder=_resolve(folder, config.control.curve_clients_folder),
        ),
        recalibration=msgspec.structs.replace(
            config.recalibration, folder=_resolve(folder, config.recalibration.folder)
        ),
        evidence=msgspec.structs.replace(
            config.evidence, folder=_resolve(folder, config.evidence.folder)
        ),
    )


def require_live(config: Config, *, where: str) -> None:
    """Refuse a config that a daemon could not run."""
    for key, value, example in (
        ("feed", config.feeds, '[[feed]] with endpoint = "tcp://127.0.0.1:5555"'),
        ("model.bundle", config.model.bundle, "the folder of a model bundle"),
        ("publish.endpoint", config.publish.endpoint, '"tcp://127.0.0.1:5557"'),
    ):
        if not value:
            raise InputError(
                f"'{key}' is needed to run", where=where, expected=example, found="nothing"
            )


def default_config(instruments: Iterable[tuple[str, str]]) -> Config:
    """The config a replay uses when it is given none, for (venue, symbol) pairs."""
    config = Config(instruments=tuple(InstrumentConfig(v, s) for v, s in sorted(instruments)))
    check_config(config, "default config")
    return config


def semantic(config: Config) -> dict[str, Any]:
    """Only what can change a signal, as plain JSON values in a fixed order.

    Endpoints, paths, backend, device, threads, the loop, the tape and the shadow are not in it: the
    promise is that they change no bit that the tape's events do not explain. Of the trigger only
    the number that its kind reads is.
    """
    trigger: dict[str, Any] = {"kind": config.trigger.kind}
    if config.trigger.kind == "events":
        trigger["every_events"] = config.trigger.every_events
    if config.trigger.kind == "time":
        trigger["every_ns"] = config.trigger.every_ns
    names = sorted((item.venue, item.symbol) for item in config.instruments)
    return {
        "instrument": [{"venue": venue, "symbol": symbol} for venue, symbol in names],
        "trigger": trigger,
        "book": {"max_levels": config.book.max_levels},
        "trust": {"stale_after_ns": config.trust.stale_after_ns},
        "failover": msgspec.to_builtins(config.failover),
        "controls": {
            key: value
            for key, value in msgspec.to_builtins(config.controls).items()
            if key != "halt_file"
        },
        "limits": {"max_pending_bytes": config.limits.max_pending_bytes},
        "model": {"precision": config.model.precision},
    }


def from_semantic(recorded: dict[str, Any], *, where: str = "recorded config") -> Config:
    """Rebuild the config that a tape's header recorded with `semantic`.

    ``semantic(from_semantic(s)) == s`` for every ``s`` that `semantic` made.
    """
    return parse_config(recorded, where=where)


def config_hash(config: Config) -> int:
    """u64 of the SHA-256 of the canonical JSON of `semantic`; independent of instrument order."""
    return json_hash(semantic(config))


# Checks, each naming the key.

_AT: Final = re.compile(r"^(?P<what>.*?) - at `\$(?P<path>.*)`$")
_MISSING: Final = re.compile(r"^Object missing required field `(?P<key>.*)`$")
_EXPECTED: Final = re.compile(r"^Expected `(?P<what>.*?)`(?P<range> [<>]=? .*)?(?:, got `.*`)?$")
_PATH_STEP: Final = re.compile(r"\.(?P<key>[^.\[]+)|\[(?P<index>\d+)\]")
_TOML_NAMES: Final = {"object": "a table", "array": "an array of tables", "str": "a string"}


def _convert(raw: dict[str, Any], kind: Any, where: str) -> Any:
    _refuse_unknown(raw, kind, "", where)
    try:
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error), raw, kind, where) from None


def _refuse_unknown(value: Any, kind: Any, path: str, where: str) -> None:
    if get_origin(kind) is tuple and isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unknown(item, get_args(kind)[0], f"{path}[{index}]", where)
        return
    if not (isinstance(kind, type) and issubclass(kind, Struct) and isinstance(value, dict)):
        return
    hints = get_type_hints(kind)
    fields = {field.encode_name: hints[field.name] for field in msgspec.structs.fields(kind)}
    for key, item in value.items():
        full = f"{path}.{key}" if path else key
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise InputError(
                f"unknown key '{full}'",
                where=where,
                expected=f"one of {', '.join(fields)}",
                found=repr(key),
                fix=f"did you mean '{f'{path}.{near}' if path else near}'?",
            )
        _refuse_unknown(item, fields[key], full, where)


def _explain(message: str, raw: Any, kind: Any, where: str) -> InputError:
    """The validator's message as one that names key, expected and found."""
    at = _AT.match(message)
    what, path = (at["what"], at["path"].lstrip(".")) if at else (message, "")
    missing = _MISSING.match(what)
    if missing:
        full = f"{path}.{missing['key']}" if path else missing["key"]
        return InputError(f"'{full}' is missing", where=where, expected=f"{missing['key']} = ...")
    value, options = _look_up(raw, kind, at["path"] if at else "")
    expected = what[:1].lower() + what[1:]
    match = _EXPECTED.match(what)
    if options:
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.0)[0]
        return InputError(
            f"'{path}' has a value that is not known",
            where=where,
            expected=" or ".join(f'"{option}"' for option in options),
            found=repr(value),
            fix=f'did you mean "{near}"?',
        )
    if match:
        expected = _TOML_NAMES.get(match["what"], match["what"]) + (match["range"] or "")
    wrong = "is out of range" if match and match["range"] else "has the wrong type"
    found = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return InputError(f"'{path}' {wrong}", where=where, expected=expected, found=found)


def _look_up(raw: Any, kind: Any, path: str) -> tuple[Any, tuple[str, ...]]:
    """Value at a validator's path, and the strings allowed there if only some are."""
    value = raw
    for step in _PATH_STEP.finditer(path):
        if step["index"] is not None:
            value, kind = value[int(step["index"])], get_args(kind)[0]
            continue
        value = value[step["key"]]
        names = {field.encode_name: field.name for field in msgspec.structs.fields(kind)}
        kind = get_type_hints(kind)[names[step["key"]]]
    return value, get_args(kind) if get_origin(kind) is Literal else ()


def served_by(
    config: Config, backend: str | None, device: str | None = None, threads: int | None = None
) -> Config:
    """The config with another backend, device or number of threads; None keeps each.

    A backend that is named without a device runs on its own first one.
    """
    from engine.backends.registry import default_device

    model = config.model
    if device is None and backend is not None and backend != model.backend:
        device = default_device(backend)
    model = msgspec.structs.replace(
        model,
        backend=backend or model.backend,
        device=device or model.device,
        threads=threads or model.threads,
    )
    return msgspec.structs.replace(config, model=model)


def _resolve(folder: Path, path: str) -> str:
    return os.path.normpath(folder / path) if path else ""
