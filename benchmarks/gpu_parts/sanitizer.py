"""Run compute-sanitizer on one small loss: out-of-bounds accesses, races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .results import NEEDS_CUDA, Fields, arguments

TOOLS = ("memcheck", "racecheck")
NAME = "compute-sanitizer"
UNWATCHED = "the loss by itself"
FOUND_ERRORS = 99


def find() -> str | None:
    usual = Path("/usr/local/cuda/bin") / NAME
    return shutil.which(NAME) or (str(usual) if usual.exists() else None)


def run(watcher: Sequence[str], seconds: float) -> Fields:
    """Run the loss under a command, or directly if the command is empty."""
    program = [sys.executable, "-P", "-m", "gpu_parts.one_loss"]
    # Compile in the same process: the tool would also run on worker processes.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    ran = subprocess.run(
        [*watcher, *program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(1.0, seconds),
    )
    last = ran.stdout.strip().splitlines()[-6:]
    if ran.returncode == FOUND_ERRORS:
        raise RuntimeError("; ".join(last))
    if ran.returncode:
        raise RuntimeError(f"status {ran.returncode}: {'; '.join(last)}")
    return {"said": last}


def main() -> None:
    device, results, _ = arguments()
    sanitizer = find()
    if device.type != "cuda" or sanitizer is None:
        for tool in TOOLS:
            why = NEEDS_CUDA if device.type != "cuda" else f"there is no {NAME}"
            results.reason(tool, why)
        return
    results.plan(UNWATCHED, *TOOLS)
    # The first run compiles the kernels, which is slow under a tool.
    results.attempt(UNWATCHED, lambda: run([], results.left()))
    for tool in TOOLS:
        watcher = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
        results.attempt(tool, lambda watcher=watcher: run(watcher, results.left()))


if __name__ == "__main__":
    main()
