"""The machine code of a kernel: its loops, and how many instructions are where."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?(?:`\(\.L_x_\d+\)|0x([0-9a-f]+))")
_PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA", "FFMA")


@dataclasses.dataclass(frozen=True)
class Instructions:
    """What the threads of a kernel execute.

    Attributes:
        lines: by address.
        loops: first and last address of each loop.
    """

    lines: dict[int, str]
    loops: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, cubin: bytes) -> Instructions:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            text = subprocess.run(
                [tool, "-sass", file.name], capture_output=True, text=True, check=True
            ).stdout
        lines = {}
        for line in text.splitlines():
            match = _LINE.match(line)
            if match:
                lines[int(match[1], 16)] = match[2].strip()
        loops = []
        for address, line in lines.items():
            branch = _BRANCH.search(line)
            if branch and branch[1] and int(branch[1], 16) < address:
                loops.append((int(branch[1], 16), address))
        return cls(lines, tuple(loops))

    def within(self, loop: tuple[int, int]) -> list[str]:
        return [line for at, line in self.lines.items() if loop[0] <= at <= loop[1]]
