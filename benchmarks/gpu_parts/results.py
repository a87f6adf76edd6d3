"""What a part says: lines of JSON on its standard output, one as soon as there is a number.

    {"plan": [names]}                what it is going to measure
    {"name": ..., "ms": ..., ...}    numbers; of a name that was there already, more or newer ones
    {"name": ..., "reason": ...}     why there are none

Field names that the table knows: ``ms``, ``ratio`` to what ``against`` names, and ``mib``. With
``detail`` true a result is in the JSON only.
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
"""A part stops this long before it would be stopped, to say what it has left out."""

NO_TIME = "no time was left in this part"
NEEDS_CUDA = "needs a CUDA device"


class Results:
    """Writes the lines. What libraries print goes to standard error from here on.

    Args:
        until: when the part will be stopped, as `time.time` counts.
    """

    def __init__(self, until: float) -> None:
        self._until = until
        self._stream = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stdout.flush()
        os.dup2(2, 1)

    def left(self) -> float:
        """Seconds in which something may still begin."""
        return self._until - time.time() - RESERVE_SECONDS

    def end(self) -> NoReturn:
        """The part is over, without the seconds in which the compiler's processes would end."""
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
        """Writes what `measure` returns, or why it has failed; whether it has not."""
        if self.left() <= 0:
            self.reason(name, NO_TIME)
            return False
        try:
            fields = measure()
        except Exception as error:
            self.reason(name, described(error))
            return False
        finally:
            # The error held the tensors of the frames that it came through.
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
    """An error's kind and the beginning of what it says."""
    return f"{type(error).__name__}: {error}".strip()[:600]


def arguments(cases: tuple[str, ...] = ()) -> tuple[torch.device, Results, str]:
    """The device, the results and the case that a part's command line asks for."""
    parser = argparse.ArgumentParser()
    if cases:
        parser.add_argument("case", choices=cases)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--until", type=float, default=math.inf, help="as time.time() counts")
    found = parser.parse_args()
    return torch.device(found.device), Results(found.until), getattr(found, "case", "")
