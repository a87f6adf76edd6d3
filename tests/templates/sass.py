"""The machine code of a kernel: its loops, and how many instructions are where."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
_PRODUCT = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|FFMA2?)\b")


@dataclasses.dataclass(frozen=True)
class Loop:
    """From the address `first` to `last`, that of the branch back."""

    first: int
    last: int

    def __contains__(self, other: Loop) -> bool:
        return self.first < other.first and other.last < self.last


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """What the threads of a kernel execute: instructions by address."""

    lines: dict[int, str]

    @classmethod
    def read(cls, cubin: bytes) -> MachineCode:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [tool, "-sass", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = (_LINE.match(line) for line in text.splitlines())
        return cls({int(match[1], 16): match[2].strip() for match in found if match})

    def _branches(self) -> Iterator[tuple[int, int]]:
        """From where to where."""
        for address, line in self.lines.items():
            if match := _BRANCH.search(line):
                yield address, int(match[1], 16)

    def between(self, first: int, last: int) -> list[str]:
        return [line for address, line in self.lines.items() if first <= address <= last]

    @functools.cached_property
    def product_loop(self) -> Loop:
        """The innermost loop over the hidden size."""
        loops = (Loop(to, at) for at, to in self._branches() if to < at)
        products = (
            loop for loop in loops if any(map(_PRODUCT.search, self.between(loop.first, loop.last)))
        )
        return min(products, key=lambda loop: loop.last - loop.first)

    @property
    def in_product_loop(self) -> list[str]:
        return self.between(self.product_loop.first, self.product_loop.last)

    @property
    def after_product(self) -> tuple[int, int]:
        """How many instructions a warp issues for a tile between one product and the next: at
        least and at most. Some are for tiles that have a row's target only."""
        product = self.product_loop
        loops = (Loop(to, at) for at, to in self._branches() if to < at)
        end = min(loop.last for loop in loops if product in loop)
        to = dict(self._branches())
        least, most = {end: 1}, {end: 1}
        addresses = [address for address in self.lines if product.last < address <= end]
        for address, following in reversed(list(itertools.pairwise(addresses))):
            ways = [following]
            if address < to.get(address, 0) <= end:
                is_conditional = self.lines[address].startswith("@")
                ways = [*(ways if is_conditional else []), to[address]]
            least[address] = 1 + min(least[way] for way in ways)
            most[address] = 1 + max(most[way] for way in ways)
        return least[addresses[0]], most[addresses[0]]
