"""Run one set-up, and print what was measured as JSON. `run.py` starts this script."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from measure import peak_memory, use_default_heap  # noqa: E402
from setups import SETUPS  # noqa: E402

FIRST_STEPS = 2
"""They compile, and the optimizer allocates its state."""
MEMORY_STEPS = 1
"""The steps after those, whose memory is measured. The later ones are timed."""


def main() -> None:
    name, how = sys.argv[1:]
    each = SETUPS[name]
    torch.manual_seed(0)
    if how == "with":
        import cce_inductor

        cce_inductor.install(**each.install)
    losses: list[float] = []
    peaks: list[int] = []
    seconds: list[float] = []
    began = 0.0
    memory: Any = None

    def on_step(loss: Any) -> None:
        nonlocal began, memory
        now = time.perf_counter()
        losses.append(float(loss))
        if memory is not None:
            peaks.append(memory[1]())
            memory[0].__exit__(None, None, None)
            memory = None
            use_default_heap()
        elif len(losses) > FIRST_STEPS + MEMORY_STEPS + 1:
            seconds.append(now - began)
        if len(losses) == FIRST_STEPS:
            context = peak_memory(torch.device("cpu"))
            memory = context, context.__enter__()
        began = time.perf_counter()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        each.train(on_step)
    computed = [str(w.message) for w in caught if "are computed here" in str(w.message)]
    reports = []
    if how == "with":
        reports = [
            {"rewritten": report.rewritten, "text": str(report)}
            for report in cce_inductor.reports()
        ]
    measured = {
        "losses": losses,
        "peak": max(peaks),
        "seconds": min(seconds) if seconds else None,
        "computed": computed,
        "reports": reports,
    }
    if os.environ.get("RANK", "0") == "0":
        print("MEASURED " + json.dumps(measured))


if __name__ == "__main__":
    main()
