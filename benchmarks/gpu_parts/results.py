"""The output of a part: lines of JSON on its standard output, written as results arrive.

    {"plan": [names]}                the names that will be measured
    {"name": ..., "ms": ..., ...}    numbers; a later line of the same name adds or replaces some
    {"name": ..., "reason": ...}     why there are no numbers

The table shows the fields ``ms``, ``ratio`` (to the result that ``against`` names) and ``mib``. A
result with ``detail`` set is only in the JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

Fields = dict[str, Any]
RESERVE_SECONDS = 2.0
"""A part ends this long before it would be stopped, to report what it has not measured."""

NO_TIME = "no time was left in this part"
NEEDS_CUDA = "needs a CUDA device"


class Results:
    """Writes results to standard output, and redirects the output of libraries to standard error.

    Args:
        until: when the part will be stopped, in seconds of `time.time`.
    """

    def __init__(self, until: float) -> None:
        self._until = until
        self._stream = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stdout.flush()
        os.dup2(2, 1)

    def left(self) -> float:
        """Return the seconds that are left to start another measurement."""
        return self._until - time.time() - RESERVE_SECONDS

    def end(self) -> NoReturn:
        """Exit at once, without waiting for the compiler's worker processes."""
        self._stream.flush()
        sys.stderr.flush()
        os._exit(0)

    def plan(self, *names: str) -> None:
        self._write({"plan": names})

    def number(self, name: str, **fields: Any) -> None:
        self._write({"name": name, **fields})

    def reason(self, name: str, why: str) -> None:
        self._write({"name": name, "reason": why})

    def attempt(self, name: str, measure: Callable[[], Fields]) -> bool:
        """Write the result of `measure`, or its exception as the reason; return its success."""
        if self.left() <= 0:
            self.reason(name, NO_TIME)
            return False
        try:
            fields = measure()
        except Exception as error:
            self.reason(name, described(error))
            return False
        finally:
            # The traceback of the exception kept tensors alive.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.number(name, **fields)
        return True

    def _write(self, line: Fields) -> None:
        finite = {key: str(v) if _is_strange(v) else v for key, v in line.items()}
        self._stream.write(json.dumps(finite, default=str) + "\n")


def _is_strange(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def described(error: BaseException) -> str:
    """Return the type of an exception and the beginning of its message."""
    return f"{type(error).__name__}: {error}".strip()[:600]


def arguments(cases: tuple[str, ...] = ()) -> tuple[torch.device, Results, str]:
    """Return the device, the results and the case from the command line of a part."""
    parser = argparse.ArgumentParser()
    if cases:
        parser.add_argument("case", choices=cases)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--until", type=float, default=math.inf, help="in seconds of time.time()")
    found = parser.parse_args()
    return torch.device(found.device), Results(found.until), getattr(found, "case", "")
