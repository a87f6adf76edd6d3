"""What compiled code depends on besides the graph: this package's sources and its options."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

from . import kernels, patterns
from .options import Options


@functools.cache
def sources() -> str:
    """A digest of every Python file of the package."""
    digest = hashlib.sha256()
    roots = [Path(__file__).parent, *map(Path, (*patterns.__path__, *kernels.__path__))]
    for file in sorted({file for root in roots for file in root.rglob("*.py")}):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def fingerprint(options: Options) -> str:
    """A digest of the sources and `options`, short enough to stand in a cache key."""
    text = sources() + repr(sorted(dataclasses.asdict(options).items()))
    return "cce_inductor-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def tagged(tag: str, options: Options) -> str:
    """The cache key tag `tag` with the fingerprint appended, once."""
    mark = fingerprint(options)
    return tag if mark in tag else f"{tag} {mark}".strip()
