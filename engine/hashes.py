"""Short hashes that stand in every signal: what code, config, model and features made it."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

PACKAGES: Final = ("engine", "feeds")
SOURCES: Final = ("*.py", "schema.xml")


def u64(digest: bytes) -> int:
    """First 8 bytes of a digest as an unsigned integer; ``f"{u64(d):016x}"`` is its hex prefix."""
    assert len(digest) >= 8
    return int.from_bytes(digest[:8], "big")


def json_hash(value: Any) -> int:
    """u64 of the SHA-256 of ``value`` as canonical JSON: sorted keys, no spaces, UTF-8."""
    return u64(hashlib.sha256(msgspec.json.encode(value, order="sorted")).digest())


def hash_sources(root: Path, packages: tuple[str, ...] = PACKAGES) -> int:
    """u64 of the SHA-256 over the source files of ``packages`` under ``root``.

    Files go in by sorted path, each as path, length and bytes, so that neither a rename nor a
    boundary that moved between two files can go unnoticed.
    """
    digest = hashlib.sha256()
    files = {
        path.relative_to(root).as_posix(): path
        for package in packages
        for pattern in SOURCES
        for path in (root / package).rglob(pattern)
    }
    for name in sorted(files):
        data = files[name].read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return u64(digest.digest())


@cache
def code_hash() -> int:
    """Hash of the running ``engine`` and ``feeds`` packages, see `hash_sources`."""
    return hash_sources(Path(__file__).resolve().parent.parent)
