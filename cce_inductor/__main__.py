"""``python -m cce_inductor patterns``: a list of all rules with their spellings."""

from __future__ import annotations

import argparse
import inspect
import operator
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch

from cce_inductor.patterns.language.tables import TABLES
from cce_inductor.patterns.losses.unfused import UNFUSED_LOSSES

_NAMESPACES = {
    "torch.nn.functional": torch.nn.functional,
    "torch.special": torch.special,
    "torch.linalg": torch.linalg,
    "torch": torch,
    "operator": operator,
    "torch.ops.aten": torch.ops.aten,
}
_HEADINGS = {
    "projection": "Projections, which make logits:",
    "transform": "Transforms, whose result is again logits. A pointwise function needs no rule.",
    "reduction": "Reductions, which make one value of each row of logits:",
    "loss": "Losses:",
    "block": "Blocks, which are as large as the logits and are not stored when combined with them:",
}


def spelled(spelling: Any) -> str:
    """Return a function or method as a user writes it."""
    if isinstance(spelling, str):
        return f".{spelling}()"
    name = getattr(spelling, "__name__", str(spelling))
    for namespace, module in _NAMESPACES.items():
        short = name.removeprefix("special_").removeprefix("linalg_")
        if getattr(module, short, None) is spelling:
            return f"{namespace}.{short}"
    return name


def listing() -> Iterator[str]:
    """Yield the lines that ``python -m cce_inductor patterns`` prints."""
    for table in TABLES:
        yield _HEADINGS[table.name]
        by_file: dict[Any, list[str]] = {}
        for spelling, rule in table.items():
            by_file.setdefault(inspect.getmodule(rule), []).append(spelled(spelling))
        for module, spellings in by_file.items():
            folder, file = module.__name__.split(".")[-2:]
            summary = " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())
            yield f"  {folder}/{file}.py: {summary}"
            yield from _wrapped(spellings)
        yield ""
    yield "Losses without a rule, which reports name:"
    yield from _wrapped(sorted(map(spelled, UNFUSED_LOSSES)))


def _wrapped(spellings: list[str]) -> list[str]:
    return textwrap.wrap(
        ", ".join(spellings), 96, initial_indent=" " * 6, subsequent_indent=" " * 6
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cce_inductor")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("patterns", help="list every rule of the matcher with its spellings")
    parser.parse_args(arguments)
    sys.stdout.write("\n".join(listing()))


if __name__ == "__main__":
    main()
