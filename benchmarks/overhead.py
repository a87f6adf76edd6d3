"""Measure what the package costs at import and at compile time.

Import: fresh processes alternately run ``import torch`` alone, and ``import torch`` followed by
``import cce_inductor``. The cost is the time of the second import; the totals are for comparison.

Compile: a training step of a small Llama of ``transformers`` with random weights is compiled from
scratch, with all caches disabled. Each call of the pass is timed. Its share is the sum of these
times, divided by the time of the compilation, which is the first step minus a later step. The first
compilation is not measured, because it imports most of the compiler.

    python benchmarks/overhead.py --json overhead.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from measure import environment
from rich.console import Console
from rich.table import Table
from torch._inductor.custom_graph_pass import get_custom_graph_passes

import cce_inductor

OURS = "cce_inductor"
CPU = torch.device("cpu")
TIMED_IMPORTS = """
import importlib, sys, time
for module in sys.argv[1:]:
    start = time.perf_counter()
    importlib.import_module(module)
    print(time.perf_counter() - start)
"""


def import_seconds(*modules: str) -> list[float]:
    """Return the seconds of each import, in this order, in a fresh process."""
    command = [sys.executable, "-c", TIMED_IMPORTS, *modules]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(line) for line in output.split()]


def measure_imports(repeats: int) -> dict[str, list[float]]:
    """Return seconds of ``import torch``, of both imports, and of this package's import alone."""
    seconds: dict[str, list[float]] = {"torch": [], "both": [], "added": []}
    for _ in range(repeats):
        seconds["torch"] += import_seconds("torch")
        torch_seconds, our_seconds = import_seconds("torch", OURS)
        seconds["both"].append(torch_seconds + our_seconds)
        seconds["added"].append(our_seconds)
    return seconds


def llama_step(layers: int, hidden: int, vocab: int, tokens: int) -> Callable[[], None]:
    """Return a training step of a random Llama; its first call compiles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocab,
    )
    model = LlamaForCausalLM(config).train()
    input_ids = torch.randint(vocab, (1, tokens))

    # Without this function, the model would also return its logits.
    @torch.compile
    def loss(input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=input_ids, labels=input_ids).loss

    def step() -> None:
        model.zero_grad()
        loss(input_ids).backward()

    return step


def installed_pass() -> Any:
    """Return the pass that ``cce_inductor.install`` has added to Inductor's."""
    passes = get_custom_graph_passes(torch._inductor.config.pre_grad_custom_pass)
    return next(entry for entry in passes if type(entry).__module__.startswith(OURS))


@contextmanager
def timed_calls(graph_pass: Any) -> Iterator[list[float]]:
    """Yield a list to which the seconds of each call of the pass are appended."""
    seconds: list[float] = []
    call = type(graph_pass).__call__

    def timed_call(self: Any, graph: torch.fx.Graph) -> None:
        start = time.perf_counter()
        call(self, graph)
        seconds.append(time.perf_counter() - start)

    with mock.patch.object(type(graph_pass), "__call__", timed_call):
        yield seconds


def call_seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_compile(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """For every compilation: its seconds, those of the pass, and how often the pass ran."""
    torch._inductor.config.force_disable_caches = True
    cce_inductor.install(min_logits_bytes=0)
    compilations = []
    for _ in range(1 + arguments.compilations):
        torch.compiler.reset()
        cce_inductor.clear_reports()
        step = llama_step(arguments.layers, arguments.hidden, arguments.vocab, arguments.tokens)
        with timed_calls(installed_pass()) as pass_seconds:
            first, later = call_seconds(step), call_seconds(step)
        if not any(report.rewritten for report in cce_inductor.reports()):
            raise SystemExit("\n".join(map(str, cce_inductor.reports())) or "found no loss")
        compilations.append(
            {
                "compile_seconds": first - later,
                "pass_seconds": sum(pass_seconds),
                "pass_calls": len(pass_seconds),
                "share": sum(pass_seconds) / (first - later),
            }
        )
    return compilations[1:]


def table(imports: dict[str, list[float]], compilations: Sequence[dict[str, float]]) -> Table:
    columns = Table(title="what cce_inductor costs")
    columns.add_column("")
    for heading in ("median", "min", "max"):
        columns.add_column(heading, justify="right")
    milliseconds = {name: [1e3 * value for value in values] for name, values in imports.items()}
    pass_milliseconds = [1e3 * entry["pass_seconds"] for entry in compilations]
    shares = [100 * entry["share"] for entry in compilations]
    for label, values, digits in (
        ("import torch, ms", milliseconds["torch"], 0),
        ("import torch, cce_inductor, ms", milliseconds["both"], 0),
        ("import cce_inductor after torch, ms", milliseconds["added"], 1),
        ("compilation, s", [entry["compile_seconds"] for entry in compilations], 1),
        ("the pass, ms", pass_milliseconds, 1),
        ("the pass, % of compilation", shares, 2),
    ):
        summary = (statistics.median(values), min(values), max(values))
        columns.add_row(label, *(f"{value:.{digits}f}" for value in summary))
    return columns


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--imports", type=int, default=9, help="processes of each kind")
    parser.add_argument("--compilations", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    with console.status("importing") as status:
        imports = measure_imports(arguments.imports)
        status.update("compiling")
        compilations = measure_compile(arguments)
    console.print(table(imports, compilations))
    if arguments.json:
        numbers = {
            "arguments": {name: value for name, value in vars(arguments).items() if name != "json"},
            "environment": environment(CPU),
            "import_seconds": imports,
            "compilations": compilations,
        }
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
