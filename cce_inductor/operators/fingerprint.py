"""A digest of this package's sources and options, on which compiled code depends."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from cce_inductor.options import Options

_PACKAGE = Path(__file__).parents[1]
_SUFFIXES = (".py", ".jinja")


@functools.cache
def sources() -> str:
    """Return a digest of every Python file and every template of the package."""
    digest = hashlib.sha256()
    for file in sorted(_files()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _files() -> Iterator[Path]:
    """Yield the source files, including those in linked folders, which a clone has."""
    for folder, _, names in os.walk(_PACKAGE, followlinks=True):
        yield from (Path(folder, name) for name in names if name.endswith(_SUFFIXES))


def fingerprint(options: Options | None) -> str:
    """Return a digest of the sources and `options` that is short enough for a cache key."""
    text = sources()
    if options is not None:
        text += repr(sorted(dataclasses.asdict(options).items()))
    return "cce_inductor-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def tagged(tag: str, options: Options | None = None) -> str:
    """Return the cache key tag `tag` with the fingerprint appended, once."""
    mark = fingerprint(options)
    return tag if mark in tag else f"{tag} {mark}".strip()
