"""compute-sanitizer on one small loss: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .results import NEEDS_CUDA, Fields, Results, arguments

TOOLS = ("memcheck", "racecheck")
NAME = "compute-sanitizer"
FOUND_ERRORS = 99


def find() -> str | None:
    usual = Path("/usr/local/cuda/bin") / NAME
    return shutil.which(NAME) or (str(usual) if usual.exists() else None)


def watch(sanitizer: str, tool: str, seconds: float) -> Fields:
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
    program = [sys.executable, "-P", "-m", "gpu_parts.one_loss"]
    # The compiler's own processes are not to be watched.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    ran = subprocess.run(
        [*command, *program],
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
    results.plan(*TOOLS)
    for tool in TOOLS:
        if device.type != "cuda":
            results.reason(tool, NEEDS_CUDA)
        elif sanitizer is None:
            results.reason(tool, f"there is no {NAME}")
        else:
            attempt(results, sanitizer, tool)


def attempt(results: Results, sanitizer: str, tool: str) -> None:
    results.attempt(tool, lambda: watch(sanitizer, tool, results.left()))


if __name__ == "__main__":
    main()
