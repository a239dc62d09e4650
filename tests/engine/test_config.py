"""The config: every shipped file loads, every mistake is one line that names its key."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import config as configs
from engine.config import (
    Config,
    InstrumentConfig,
    config_hash,
    default_config,
    from_semantic,
    load_config,
    parse_config,
    require_live,
    semantic,
)
from engine.hashes import code_hash, hash_sources, json_hash
from feeds.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
INSTRUMENT = '[[instrument]]\nvenue = "sim"\nsymbol = "ALPHA"\n'
FEED = '[[feed]]\nendpoint = "tcp://127.0.0.1:5555"\n'


def parse(text: str) -> Config:
    return parse_config(tomllib.loads(INSTRUMENT + text), where="x.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_config_can_run(path: Path) -> None:
    config = load_config(path, live=True)
    assert Path(config.model.bundle) == ROOT / "models" / "reference"
    assert semantic(from_semantic(semantic(config))) == semantic(config)


def test_the_simulator_config_names_every_default() -> None:
    shipped = load_config(ROOT / "configs" / "simulator.toml")
    plain = Config()
    for section in ("trigger", "book", "trust", "limits", "overload", "loop", "tape"):
        assert getattr(shipped, section) == getattr(plain, section)
    raw = tomllib.loads((ROOT / "configs" / "simulator.toml").read_text())
    assert set(raw["limits"]) == set(configs.LimitsConfig.__struct_fields__)


def test_what_is_not_said_has_its_default() -> None:
    assert parse("") == default_config([("sim", "ALPHA")])


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "x.toml"
    file.parent.mkdir()
    text = INSTRUMENT + '[model]\nbundle = "../bundle"\n[tape]\npath = "day.tape"\n'
    file.write_text(text)
    config = load_config(file)
    assert config.model.bundle == str(tmp_path / "bundle")
    assert config.tape.path == str(tmp_path / "deep" / "day.tape")
    file.write_text(INSTRUMENT + '[model]\nbundle = "/elsewhere"\n')
    config = load_config(file)
    assert (config.model.bundle, config.tape.path) == ("/elsewhere", "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[limits]\nmax_drain_mesages = 3",
            ["'limits.max_drain_mesages'", "'limits.max_drain_messages'"],
        ),
        ("[trigers]\nkind = 'time'", ["'trigers'", "'trigger'"]),
        (FEED + "snapshots = ''", ["'feed[0].snapshots'", "'feed[0].snapshot_endpoint'"]),
        ("[trigger]\nkind = 'event'", ["'trigger.kind'", "'event'", '"events"']),
        ("[limits]\ntimer_ns = '5'", ["'limits.timer_ns'", "int", "'5'"]),
        ("[limits]\ntimer_ns = 5.0", ["'limits.timer_ns'", "int", "5.0"]),
        ("[limits]\ntimer_ns = true", ["'limits.timer_ns'", "int", "True"]),
        ("[limits]\ntimer_ns = 5", ["'limits.timer_ns'", "1000000", "found 5"]),
        ("[limits]\nsend_hwm = 0", ["'limits.send_hwm'", ">= 1", "found 0"]),
        ("[limits]\nmax_drain_ns = -1", ["'limits.max_drain_ns'", "found -1"]),
        ("[limits]\nmax_drain_ns = 99999999999999999999", ["'limits.max_drain_ns'", "9999"]),
        ("[book]\nmax_levels = 15", ["'book.max_levels'", ">= 16", "found 15"]),
        ("[book]\nmax_levels = 65535", ["'book.max_levels'", "<= 65534", "found 65535"]),
        ("[model]\nthreads = 0", ["'model.threads'", "found 0"]),
        ("[model]\nprecision = 'int4'", ["'model.precision'", '"int8"', "'int4'"]),
        ("[model]\nbackend = ''", ["'model.backend'"]),
        ("[loop]\ncpu_dma_latency_us = -2", ["'loop.cpu_dma_latency_us'", ">= -1", "found -2"]),
        ("[loop]\ncpu_dma_latency_us = 1000001", ["'loop.cpu_dma_latency_us'", "<= 1000000"]),
        ("[loop]\nbusy_poll = 1", ["'loop.busy_poll'", "bool", "found 1"]),
        ("[[feed]]\nsnapshot_endpoint = 'tcp://a:1'", ["'feed[0].endpoint'", "missing"]),
        ("[feed]\nendpoint = 'tcp://a:1'", ["'feed'", "array of tables"]),
        ("[[instrument]]\nvenue = 'sim'", ["'instrument[1].symbol'", "missing"]),
        ("[[instrument]]\nvenue = 'sim'\nsymbol = 'ALPHA'", ["'instrument[1]'", "instrument[0]"]),
        ("[[instrument]]\nvenue = 'a.b'\nsymbol = 'X'", ["'instrument[1].venue'", "dots"]),
        ("[[instrument]]\nvenue = 'a b'\nsymbol = 'X'", ["'instrument[1].venue'", "spaces"]),
        ("[[instrument]]\nvenue = 'a'\nsymbol = ''", ["'instrument[1].symbol'"]),
        (f"[[instrument]]\nvenue = '{'v' * 17}'\nsymbol = 'X'", ["'instrument[1].venue'", "16"]),
        ("[[instrument]]\nvenue = 'é'\nsymbol = 'X'", ["'instrument[1].venue'", "ASCII"]),
        ("[publish]\nendpoint = '127.0.0.1:1'", ["'publish.endpoint'", "tcp://host:port"]),
        ("[publish]\nendpoint = 'tcp://127.0.0.1'", ["'publish.endpoint'", "tcp://host:port"]),
        ("[publish]\nendpoint = 'tcp://a:65536'", ["'publish.endpoint'", "65535"]),
        ("[publish]\nendpoint = 'pgm://a:1'", ["'publish.endpoint'", "ipc://"]),
        (f"[publish]\nendpoint = 'ipc:///{'x' * 107}'", ["'publish.endpoint'", "107"]),
        ("[[feed]]\nendpoint = 'tcp://*:5555'", ["'feed[0].endpoint'", "'*'"]),
        (FEED + "[publish]\nendpoint = 'tcp://127.0.0.1:5555'", ["'publish.endpoint'", "'feed[0]"]),
    ],
)
def test_a_mistake_is_one_line_that_names_its_key(text: str, says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith("x.toml: ")
    assert "\n" not in message
    for part in says:
        assert part in message


def test_no_instrument_is_refused() -> None:
    with pytest.raises(InputError, match="no instrument"):
        parse_config({}, where="x.toml")
    with pytest.raises(InputError, match="no instrument"):
        default_config([])


@pytest.mark.parametrize(
    "good",
    [
        "tcp://*:5557",
        "tcp://127.0.0.1:*",
        "tcp://[::1]:5557",
        "ipc:///run/o",
        "ipc://@o",
        "inproc://o",
    ],
)
def test_endpoints_to_bind(good: str) -> None:
    assert parse(f"[publish]\nendpoint = '{good}'").publish.endpoint == good


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "'feed'"),
        (FEED, "'model.bundle'"),
        (FEED + "[model]\nbundle = 'b'", "'publish.endpoint'"),
    ],
)
def test_a_daemon_needs_more(text: str, key: str) -> None:
    with pytest.raises(InputError, match=key):
        require_live(parse(text), where="x.toml")


@pytest.mark.parametrize(
    ("data", "says"), [(b"[model", "no TOML"), (b"\xff\xfe", "no TOML"), (None, "cannot be read")]
)
def test_a_file_that_is_no_config(data: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(InputError, match=says) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.text(max_size=3) | st.sampled_from(
            [*(f.encode_name for f in msgspec.structs.fields(Config)), "endpoint", "venue", "kind"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=20,
))  # fmt: skip
def test_no_document_raises_anything_else(raw: Any) -> None:
    document = raw if isinstance(raw, dict) else {"model": raw}
    try:
        parse_config(document, where="x.toml")
    except InputError as error:
        found = str(error)
    else:
        found = ""
    assert "\n" not in found


# What goes into the hash.


def test_what_cannot_change_a_signal_is_not_hashed() -> None:
    plain = parse("")
    other = parse(
        FEED + "[model]\nbundle='b'\nbackend='compiled'\ndevice='x'\nthreads=4\n"
        "[publish]\nendpoint='tcp://a:1'\n[tape]\npath='t'\nseal=true\n[loop]\nbusy_poll=true\n"
        "core=1\nio_core=1\ncpu_dma_latency_us=0\n"
        "[limits]\nsend_hwm=5\ntimer_ns=7000000\n[trigger]\nevery_events=9\nevery_ns=9\n"
    )
    assert config_hash(plain) == config_hash(other)


@pytest.mark.parametrize(
    "text",
    [
        "[trigger]\nkind='events'",
        "[trigger]\nkind='events'\nevery_events=2",
        "[trigger]\nkind='time'",
        "[trigger]\nkind='time'\nevery_ns=5",
        "[book]\nmax_levels=16",
        "[trust]\nstale_after_ns=1",
        "[limits]\nmax_pending_bytes=1",
        "[model]\nprecision='fp32'",
        "[[instrument]]\nvenue='sim'\nsymbol='BETA'",
    ],
)
def test_what_can_change_a_signal_is_hashed_and_recorded(text: str) -> None:
    config = parse(text)
    assert config_hash(config) != config_hash(parse(""))
    recorded = msgspec.json.decode(msgspec.json.encode(semantic(config)))
    assert semantic(from_semantic(recorded)) == semantic(config)
    assert config_hash(from_semantic(recorded)) == config_hash(config)


def test_the_order_of_instruments_does_not_matter() -> None:
    names = [("sim", "B"), ("sim", "A"), ("other", "Z")]
    assert config_hash(default_config(names)) == config_hash(default_config(names[::-1]))
    given_order = Config(instruments=tuple(InstrumentConfig(v, s) for v, s in names))
    assert config_hash(given_order) == config_hash(default_config(names))


def test_a_recorded_config_with_an_unknown_key_is_refused() -> None:
    recorded = semantic(parse("")) | {"magic": {}}
    with pytest.raises(InputError, match="'magic'"):
        from_semantic(recorded, where="day.tape")


def test_hashes_are_the_same_in_another_process() -> None:
    code = (
        "from engine.config import *; from engine.hashes import *;"
        "print(config_hash(default_config([('sim','A'),('sim','B')])), code_hash())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    expected = config_hash(default_config([("sim", "B"), ("sim", "A")]))
    assert len(found) == 1
    assert found.pop().startswith(f"{expected} ")


def test_a_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        parse("").limits.timer_ns = 1  # type: ignore[misc]


def test_json_hash_is_the_start_of_a_sha256_of_canonical_json() -> None:
    text = b'{"a":[1,"x"],"b":null}'
    assert f"{json_hash({'b': None, 'a': [1, 'x']}):016x}" == hashlib.sha256(text).hexdigest()[:16]


def test_the_code_hash_follows_every_source_file(tmp_path: Path) -> None:
    for name in ("engine/a.py", "engine/deep/b.py", "feeds/c.py", "feeds/schema.xml"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    before = hash_sources(tmp_path)
    (tmp_path / "engine" / "notes.txt").write_text("not source")
    assert hash_sources(tmp_path) == before
    seen = {before}
    for name in ("engine/deep/b.py", "feeds/schema.xml"):
        (tmp_path / name).write_text("changed")
        seen.add(hash_sources(tmp_path))
    (tmp_path / "feeds" / "c.py").rename(tmp_path / "feeds" / "d.py")
    seen.add(hash_sources(tmp_path))
    assert len(seen) == 4
    assert 0 < code_hash() < 1 << 64
