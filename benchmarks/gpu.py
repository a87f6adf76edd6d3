"""Measure and check the package on a GPU in nine minutes.

    python benchmarks/gpu.py --minutes 9 --output results

Needs a clone and an interpreter with torch, triton, pytest, hypothesis and numpy, but no network
and no installed package: it measures the clone that contains this file. With --installed it
measures the package that the interpreter imports, which may come from a wheel; the results name the
imported file. --wheels is a folder with wheels of other packages to compare with (Liger, Cut
Cross-Entropy, QuACK).

The parts run in this order, the most important decisions first, each in its own process:

1. versions    Are the library's matrix products with float32 results correct?
2. products    How fast are copies and matrix products, and how wide do the gradient's blocks have
               to be?
3. assertion   Does an assertion in the loop over tiles slow the statistics kernel down?
4. kernels     Which configurations should be the defaults, and how near are they to the library?
5. blocks      Are the templates faster than a library product followed by one fused pass?
6. head        Time and memory of the whole loss, exact and sampled, beside every other
               implementation
7. tests       Do the tests in tests/cuda pass?
8. autocast    The same head with float32 weights
9. peaked      A head with logits as in a trained model
10. sanitizer  Does a kernel read or write out of bounds, or race?

results/gpu.json is written after each number. results/gpu.md, the table that is also printed at the
end, is written after each part. results/gpu.log has the output of the parts. When the time is over,
the running part is stopped and the rest is dropped. No part takes more than its share of the time,
and a part that crashes or hangs loses only its own numbers. Each missing number has a reason.

--device cpu runs everything that needs no GPU on small shapes, to test this script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent

LEAST_SECONDS = 5.0
"""A part with less time than this is dropped."""

LEAST_SHARE_SECONDS = 30.0
"""Each part may take this long even if its share is smaller: it has to import and compile."""

END_SECONDS = 1.5
"""Time reserved for stopping the last part and for writing the table."""

LAST_LINES = 12
"""How many lines of its output are kept for a part that failed."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A program that measures something.

    Attributes:
        name: its name in the results.
        command: arguments of the interpreter; --device and --until are added.
        share: the largest fraction of the budget that it may take.
    """

    name: str
    command: tuple[str, ...]
    share: float


def _of_this_package(name: str, share: float, module: str, *case: str) -> Part:
    # -P: modules are imported from PYTHONPATH, not from the current folder.
    return Part(name, ("-P", "-m", f"gpu_parts.{module}", *case), share)


PARTS = (
    _of_this_package("versions", 0.05, "versions"),
    _of_this_package("products", 0.06, "products"),
    _of_this_package("assertion", 0.08, "kernels", "assertion"),
    _of_this_package("kernels", 0.16, "kernels", "candidates"),
    _of_this_package("blocks", 0.08, "blocks"),
    _of_this_package("head", 0.25, "heads", "head"),
    _of_this_package("tests", 0.2, "device_tests"),
    _of_this_package("autocast", 0.12, "heads", "autocast"),
    _of_this_package("peaked", 0.12, "heads", "peaked"),
    _of_this_package("sanitizer", 0.08, "sanitizer"),
)


class Record:
    """All results so far, kept in a file that is complete at any time.

    Args:
        output: the folder of the results.
        about: the arguments of the run.
        parts: every part that will run.
    """

    def __init__(self, output: Path, about: dict[str, Any], parts: Sequence[Part]) -> None:
        self.output = output
        self.began = time.monotonic()
        self.parts: dict[str, dict[str, Any]] = {
            part.name: {"part": part.name, "status": "not begun", "results": []} for part in parts
        }
        self.about = about
        self.save()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def take(self, name: str, line: str) -> None:
        """Add a line of output of a part."""
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            return  # incomplete: the part was stopped while writing it
        for planned in found.pop("plan", []):
            self._result(name, planned)
        if "name" in found:
            self._result(name, found["name"]).update(found)
        self.save()

    def _result(self, part: str, name: str) -> dict[str, Any]:
        results: list[dict[str, Any]] = self.parts[part]["results"]
        for result in results:
            if result["name"] == name:
                return result
        results.append({"name": name})
        return results[-1]

    def end(self, name: str, status: str, **fields: Any) -> None:
        """Mark a part as finished; its status becomes the reason of each missing number."""
        part = self.parts[name]
        part |= {"status": status, **fields}
        ended = "ended without it" if status == "ran" else status
        for result in part["results"]:
            if result.keys() == {"name"}:
                result["reason"] = f"the part {ended}"
        self.save()

    def save(self) -> None:
        everything = {**self.about, "seconds": self.seconds(), "parts": list(self.parts.values())}
        self._write("gpu.json", json.dumps(everything, indent=1) + "\n")

    def save_table(self) -> str:
        table = "\n".join([CAPTION, "", *table_lines(self.parts.values()), ""])
        self._write("gpu.md", table)
        return table

    def _write(self, name: str, text: str) -> None:
        new = self.output / f"{name}.new"
        new.write_text(text)
        new.replace(self.output / name)


class Driver:
    """Runs parts, one after the other, within a budget.

    Args:
        output: the folder of the results.
        device: "cuda" or "cpu".
        seconds: the budget.
        environment: environment variables of the parts.
    """

    def __init__(
        self, output: Path, device: str, seconds: float, environment: dict[str, str]
    ) -> None:
        self.output, self.device, self.budget = output, device, seconds
        self.environment = environment

    def run(self, parts: Sequence[Part], about: dict[str, Any]) -> Record:
        record = Record(self.output, about, parts)
        self.log = self.output / "gpu.log"
        self.log.write_bytes(b"")
        record.about["nvidia_smi"] = {"at the start": nvidia_smi()}
        for part in parts:
            left = self.budget - END_SECONDS - record.seconds()
            if left < LEAST_SECONDS:
                record.end(part.name, "was dropped: no time was left")
                continue
            share = max(LEAST_SHARE_SECONDS, part.share * self.budget)
            say(record, f"{part.name}: at most {min(left, share):.0f} s")
            record.parts[part.name]["status"] = "is running"
            record.save()
            self._run(part, min(left, share), record)
            say(record, f"{part.name} {record.parts[part.name]['status']}")
            record.save_table()
        record.about["nvidia_smi"]["at the end"] = nvidia_smi()
        record.save()
        return record

    def _run(self, part: Part, seconds: float, record: Record) -> None:
        began = time.monotonic()
        deadline = began + seconds
        log_start = self.log.stat().st_size
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *part.command,
                    "--device",
                    self.device,
                    "--until",
                    str(time.time() + seconds),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                process_group=0,
            )
        try:
            is_over = self._listen(process, part.name, deadline, record)
        finally:
            end_group(process)
        took = round(time.monotonic() - began, 1)
        if not is_over:
            record.end(part.name, f"was stopped after {took:.0f} s", seconds=took)
        elif process.returncode:
            said = self.log.read_bytes()[log_start:].decode(errors="replace").splitlines()
            record.end(
                part.name,
                f"failed: {how_it_ended(process.returncode)}",
                seconds=took,
                last_lines=said[-LAST_LINES:],
            )
        else:
            record.end(part.name, "ran", seconds=took)

    def _listen(
        self, process: subprocess.Popen[str], name: str, deadline: float, record: Record
    ) -> bool:
        """Record the output of a part; return whether the part ended before the deadline."""
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = lines.get(timeout=min(left, 0.5))
            except queue.Empty:
                if process.poll() is not None:
                    end_group(process)  # a process that it started keeps the pipe open
                continue
            if line is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.1, deadline - time.monotonic()))
                return process.returncode is not None
            record.take(name, line)
        return False


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill a process and every process that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def how_it_ended(status: int) -> str:
    if status > 0:
        return f"exit status {status}"
    return f"ended by {signal.Signals(-status).name}"


def say(record: Record, text: str) -> None:
    print(f"[{record.seconds():4.0f} s] {text}", flush=True)


def nvidia_smi() -> str:
    """Return clocks, power and temperature in one line, or the reason why they are unknown."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "there is no nvidia-smi"
    asked = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used"
    command = [tool, f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (ran.stdout or ran.stderr).strip()


CAPTION = "A ratio is to torch.compile or to a library product, measured in the same rounds."
HEADINGS = ("part", "what", "ms", "ratio", "MiB", "more")
NOTED = (
    *("tflops", "gb_per_s", "forward_ms", "loss", "share_visited"),
    *("registers", "spills", "won", "timed"),
)
"""Fields that the last column shows beside a time, in addition to errors."""


def table_lines(parts: Any) -> list[str]:
    """Return the results as a table in Markdown with aligned columns."""
    rows = [HEADINGS, *(row for part in parts for row in _rows(part))]
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEADINGS))]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    ]
    rule = f"| {' | '.join('-' * width for width in widths)} |"
    return [lines[0], rule, *lines[1:]]


def _rows(part: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    name = part["part"]
    why_not: dict[str, list[str]] = {}
    for result in part["results"]:
        if "reason" in result:
            why_not.setdefault(result["reason"], []).append(result["name"])
        elif not result.get("detail"):
            numbers = (_number(result.get(key)) for key in ("ms", "ratio", "mib"))
            yield (name, result["name"], *numbers, _more(result))
    for why, names in why_not.items():
        what = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        yield (name, _short(what), "", "", "", _short(why))
    if part["status"] != "ran":
        yield (name, "", "", "", "", _short(f"the part {part['status']}"))


def _short(text: str, length: int = 80) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _more(result: dict[str, Any]) -> str:
    texts = []
    for key, value in result.items():
        is_shown = key in NOTED or key.startswith("error") or "ms" not in result
        if key == "name" or value in (None, []) or not is_shown:
            continue
        digits = 6 if key == "loss" else 3
        text = f"{value:.{digits}g}" if isinstance(value, float) else str(value)
        texts.append(f"{key.replace('_', ' ')} {text}")
    return _short(", ".join(texts), 120)


def unpacked(wheels: Path, folder: Path) -> list[str]:
    """Unpack the wheels, because Triton reads source files; return what to add to PYTHONPATH."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        sys.exit(f"gpu.py: there are no wheels in {wheels}")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [str(folder)]


def environment(device: str, paths: Sequence[str], cache: Path) -> dict[str, str]:
    """Return the environment variables of the parts, with an empty compiler cache."""
    inherited = os.environ.get("PYTHONPATH")
    every = [*paths, *([inherited] if inherited else [])]
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(every),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    if device == "cpu":
        # With an empty cache, Inductor's test of vector instructions takes longer than the parts.
        # Threads of small operations would wait for each other on busy cores.
        found |= {"TORCHINDUCTOR_VEC_ISA_OK": "1", "OMP_NUM_THREADS": "1"}
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="the budget of the whole run")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder of other packages' wheels")
    parser.add_argument(
        "--installed", action="store_true", help="measure the installed package, not this clone"
    )
    return parser.parse_args()


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    began = time.monotonic()
    arguments = parse_arguments()
    if arguments.device == "cuda" and not has_cuda():
        sys.exit("gpu.py: there is no CUDA device; --device cpu runs the parts that need none")
    # An exception lets the driver kill the running part.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu.py: terminated"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    about = {
        "device": arguments.device,
        "minutes": arguments.minutes,
        "measured": "the installed package" if arguments.installed else "the clone",
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        paths = [str(FOLDER)] if arguments.installed else [str(FOLDER), str(ROOT)]
        if arguments.wheels:
            paths += unpacked(arguments.wheels, Path(scratch, "wheels"))
        left = arguments.minutes * 60 - (time.monotonic() - began)
        of_parts = environment(arguments.device, paths, Path(scratch, "compiled"))
        driver = Driver(arguments.output, arguments.device, left, of_parts)
        record = driver.run(PARTS, about)
        print(f"\n{record.save_table()}")


if __name__ == "__main__":
    main()
