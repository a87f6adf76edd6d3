"""Compile every language model class of transformers and report what became of its loss.

    python tests/models/survey.py --output docs/survey.md
    python tests/models/survey.py 'Gemma*' BertForMaskedLM --variant train --variant bf16
    python tests/models/survey.py --task masked --jobs 2

Each class of the causal, masked and sequence-to-sequence mappings is built tiny and random
(`tiny.py`), and a function that returns only its loss is compiled with "cce_inductor_eager". The
losses that were rewritten are counted, and loss and gradients compared with those of the model as
it is. Each measurement runs in a process of its own, under a time limit.

Variants: ``train`` is float32; ``bf16`` converts the model; ``autocast`` surrounds the call;
``numitems`` passes the ``num_items_in_batch`` of a Trainer; ``mask`` an ``attention_mask`` of ones,
as a data collator does; ``dynamic`` compiles with dynamic shapes; ``whole`` compiles the model as it
is, which returns its logits, with ``defer_logits="always"``, and compares those, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import inspect
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor
from torch.fx import GraphModule, Node

import cce_inductor
from cce_inductor.backends import cce_inductor_eager
from cce_inductor.patterns.language import projection

VARIANTS = ("train", "bf16", "autocast", "numitems", "mask", "dynamic", "whole")

# The head sums 48 rows and 5003 columns in another order than eager, which costs about 1e-6 in
# float32, and two layers and their normalisations may multiply that by ten or a hundred. A wrong
# loss (a row too many, a scale, a bias) is off by 1e-2 at least. In bfloat16, gradients are rounded
# to 2^-9 at each step on both sides.
TOLERANCE = dict.fromkeys(VARIANTS, 1e-4) | {"bf16": 5e-2, "autocast": 5e-2}

# A gradient may be zero but for rounding (a key's bias), or a sum that nearly cancels (the mixing
# coefficients of hyper-connections): its error is measured against this part of the largest one.
NEGLIGIBLE = 1e-2

INSTALLED = f"{Path(transformers.__file__).parents[1]}{os.sep}"
"""The folder of installed packages, which the page does not show."""

PROJECTIONS = {getattr(spelling, "__name__", spelling) for spelling, _ in projection.items()}
LOSSES = {"cross_entropy", "nll_loss", "log_softmax", "logsumexp", "linear_cross_entropy"}


@dataclasses.dataclass
class Result:
    """What one class did in one variant.

    Attributes:
        name: the class.
        variant: one of `VARIANTS`.
        chains: the operations from the projection to each loss over a vocabulary in the captured
            graphs, found without the pass; one that begins with "input" has its projection
            elsewhere.
        found: how many losses the pass saw.
        rewritten: how many it rewrote.
        reasons: why it left the others alone.
        graphs: how many graphs Dynamo captured.
        breaks: why it captured more than one.
        error: the largest relative difference of a gradient, or of the loss, from eager.
        worst: whose difference that is.
        noise: where that is beyond the tolerance, the same between two runs of eager.
        failure: why there is no measurement; the rest is then empty.
        seconds: how long it took.
    """

    name: str
    variant: str = "train"
    chains: list[str] = dataclasses.field(default_factory=list)
    found: int = 0
    rewritten: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)
    graphs: int = 0
    breaks: list[str] = dataclasses.field(default_factory=list)
    error: float = 0.0
    worst: str = ""
    noise: float = 0.0
    failure: str = ""
    seconds: float = 0.0

    @property
    def all_rewritten(self) -> bool:
        return not self.failure and 0 < self.rewritten == self.found == len(self.chains)

    @property
    def equal(self) -> bool:
        """Whether the numbers are those of eager, as far as eager's own are determined."""
        return not self.failure and self.error <= max(TOLERANCE[self.variant], self.noise)

    @property
    def verdict(self) -> str:
        if self.failure:
            return "not measured"
        if not self.equal:
            return "WRONG"
        if self.all_rewritten:
            return "rewritten"
        return "in part" if self.rewritten else "left alone"


class Trial:
    """A model and its inputs, which can take the same step again and again."""

    def __init__(self, name: str, variant: str):
        parameters = inspect.signature(getattr(transformers, name).forward).parameters
        if "labels" not in parameters:
            raise TypeError("its forward takes no labels")
        self.model = tiny.build(name, torch.bfloat16 if variant == "bf16" else torch.float32)
        self.inputs = tiny.inputs(self.model)
        self.autocast = variant == "autocast"
        self.function = self.output if variant == "whole" else self.loss
        if variant == "mask":
            self.inputs["attention_mask"] = torch.ones_like(self.inputs["input_ids"])
        if variant == "numitems":
            if not any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
                raise TypeError("its forward takes no num_items_in_batch")
            self.inputs["num_items_in_batch"] = (self.inputs["labels"] != -100).sum()
        for key, value in self.inputs.items():
            if value.is_floating_point():
                self.inputs[key] = value.to(self.model.dtype)
        self.buffers = {key: buffer.clone() for key, buffer in self.model.named_buffers()}

    def loss(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).loss

    def output(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def step(self, function: Callable[..., Any]) -> dict[str, Tensor]:
        """The loss, the logits if they are returned, and the gradient of each parameter."""
        torch.manual_seed(0)
        self.model.zero_grad()
        with torch.no_grad():
            for key, buffer in self.model.named_buffers():
                if key in self.buffers:
                    buffer.copy_(self.buffers[key])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            result = function(**self.inputs)
        value = result if isinstance(result, Tensor) else result.loss
        value.backward()
        logits = getattr(result, "logits", None)
        found = {"the loss": value.detach()}
        if isinstance(logits, Tensor):
            found["the logits"] = logits.detach() + 0
        gradients = {
            key: parameter.grad.clone() if parameter.grad is not None else torch.zeros(())
            for key, parameter in self.model.named_parameters()
        }
        return {**found, **gradients}


def measure(name: str, variant: str = "train") -> Result:
    """Builds the class, runs it as it is and compiled, and compares."""
    result = Result(name, variant)
    trial = Trial(name, variant)
    eager = trial.step(trial.function)

    def backend(module: GraphModule, example_inputs: list[Any], *, options: dict[str, Any]) -> Any:
        result.graphs += 1
        result.chains += chains(module)
        return cce_inductor_eager(module, example_inputs, options=options)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cce_inductor.clear_reports()
    options = {"min_logits_bytes": 0, "on_error": "raise"}
    if variant == "whole":
        options["defer_logits"] = "always"
    dynamic = True if variant == "dynamic" else None
    compiled = torch.compile(trial.function, backend=backend, options=options, dynamic=dynamic)
    ours = trial.step(compiled)
    result.error, result.worst = difference(ours, eager)
    reports = [r for r in cce_inductor.reports() if not r.loss.endswith("> returned")]
    result.found = len(reports)
    result.rewritten = sum(report.rewritten for report in reports)
    result.reasons = [f"{report.loss}: {report.reason}" for report in reports if report.reason]
    counters = torch._dynamo.utils.counters
    reasons = counters["graph_break"] | counters["unimplemented"]
    result.breaks = list(dict.fromkeys(reason.splitlines()[0] for reason in reasons))
    if not result.equal:
        torch._dynamo.reset()
        compiled = torch.compile(trial.function, backend="eager", dynamic=dynamic)
        dynamo, _ = difference(trial.step(compiled), eager)
        result.noise, _ = difference(trial.step(trial.function), eager)
        result.reasons.append(
            f"{result.worst} is off by {result.error:.1e}; with Dynamo alone by {dynamo:.1e}, in a"
            f" second run of eager by {result.noise:.1e}"
        )
    return result


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference, and where; infinite where either is not finite."""
    norms = {key: value.double().norm().item() for key, value in want.items()}
    largest = max(norm for key, norm in norms.items() if not key.startswith("the "))
    errors = {}
    for key, value in want.items():
        distance = (got[key].double() - value.double()).norm().item()
        exact = key.startswith("the ")
        scale = norms[key] if exact else max(norms[key], NEGLIGIBLE * largest)
        errors[key] = distance / scale if distance else 0.0
    worst = max(errors, key=lambda key: float("inf") if errors[key] != errors[key] else errors[key])
    return errors[worst] if errors[worst] == errors[worst] else float("inf"), worst


def chains(module: GraphModule) -> list[str]:
    """The operations that lead to each loss in a graph, from its projection."""
    found: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        if _short(node) not in LOSSES or not _over_vocabulary(node):
            continue
        path = [node]
        while _short(path[-1]) not in PROJECTIONS and (source := _logits(path[-1])) is not None:
            path.append(source)
        for passed in path[1:]:
            found.pop(passed, None)
        found[node] = path[::-1]
    return [" > ".join(map(_describe, path)) for path in found.values()]


def _short(node: Node) -> str:
    """`linear` for ``torch._C._nn.linear``, "input" for what comes from outside of the graph."""
    if node.op in ("placeholder", "get_attr"):
        return "input"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    return "div" if name == "truediv" else name


def _describe(node: Node) -> str:
    """The operation with its constants, but for the defaults of a loss."""
    if node.op in ("placeholder", "get_attr"):
        return "input"
    name, inputs = _short(node), node.args[1:]
    if name in PROJECTIONS:
        bias = [*inputs[1:], node.kwargs.get("bias")]
        return f"{name}(bias)" if name == "linear" and any(bias) else name
    if name == "cross_entropy":
        inputs = ()
    constants = [_constant(item) for item in inputs if not isinstance(item, Node)]
    defaults = (("ignore_index", -100), ("reduction", "mean"), ("label_smoothing", 0.0))
    for key, value in node.kwargs.items():
        if value is not None and not isinstance(value, Node) and (key, value) not in defaults:
            constants.append(f"{key}={value}")
    return f"{name}({', '.join(constants)})" if constants else name


def _constant(value: Any) -> str:
    """As one writes it in an index: ``..., :-1, :``."""
    if isinstance(value, tuple):
        return ", ".join(map(_constant, value))
    if value is Ellipsis:
        return "..."
    if isinstance(value, slice):
        parts = ["" if part is None else str(part) for part in (value.start, value.stop)]
        return ":".join(parts) + (f":{value.step}" if value.step is not None else "")
    return str(value)


def _logits(node: Node) -> Node | None:
    """The largest tensor among the inputs: not the bias, not the target."""
    inputs = [item for item in node.all_input_nodes if isinstance(_example(item), Tensor)]
    return max(inputs, key=lambda item: _example(item).numel(), default=None)


def _example(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _over_vocabulary(node: Node) -> bool:
    """Whether it is over more classes than a router or an attention has here."""
    source = _logits(node)
    return source is not None and any(int(size) >= 200 for size in _example(source).shape[1:])


def _child(name: str, variant: str, connection: multiprocessing.connection.Connection) -> None:
    """Measures in a new process; only the result comes out of it."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        result = measure(name, variant)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).strip() or "no message").splitlines()[0]
        place = f"{Path(where.filename).name}:{where.lineno}"
        result = Result(name, variant, failure=f"{type(error).__name__}: {first} ({place})")
    result.seconds = time.monotonic() - start
    connection.send(result)


def measure_all(
    work: list[tuple[str, str]], jobs: int = 1, timeout: float = 120.0
) -> Iterator[Result]:
    """Measures each (class, variant) in a process of its own, `jobs` at a time.

    The processes are forks of this one, which has imported everything and computed nothing.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(work))
    running: dict[Any, tuple[Any, str, str, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, variant = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, variant, theirs))
            process.start()
            theirs.close()
            running[ours] = process, name, variant, time.monotonic() + timeout
        for connection in multiprocessing.connection.wait(list(running), timeout=1.0):
            process, name, variant, _ = running.pop(connection)
            try:
                yield connection.recv()
            except EOFError:
                process.join()
                yield Result(name, variant, failure=f"the process ended with {process.exitcode}")
            process.join()
        for connection, (process, name, variant, end) in list(running.items()):
            if time.monotonic() > end:
                del running[connection]
                process.kill()
                process.join()
                yield Result(name, variant, failure=f"took more than {timeout:.0f} s")


def table(results: list[Result]) -> str:
    """The results as Markdown."""
    tasks = tiny.classes()
    variants = "".join(f" --variant {v}" for v in VARIANTS if any(r.variant == v for r in results))
    lines = [
        "# Survey of transformers",
        "",
        "What the pass does to each language model class of transformers. The models are tiny and have",
        "random weights. In the variant `whole` they are compiled as they are and return their logits;",
        "`tests/models/survey.py` describes the other variants.",
        "",
        f"Written by `python tests/models/survey.py{variants}` with torch {torch.__version__}",
        f"and transformers {transformers.__version__} on {torch.get_default_device()}.",
        "",
        "| task | classes | measured | every loss rewritten | same numbers as eager |",
        "|---|---|---|---|---|",
    ]
    for task in tiny.TASKS:
        own = [result for result in results if task in tasks[result.name]]
        measured = [result for result in own if not result.failure]
        rewritten = sum(result.all_rewritten for result in measured)
        equal = sum(result.equal for result in measured)
        lines.append(f"| {task} | {len(own)} | {len(measured)} | {rewritten} | {equal} |")
    lines += [
        "",
        "The error is the largest relative difference from eager: of the gradient of a parameter, of the",
        "loss, or of returned logits.",
        "",
        "| class | task | variant | result | losses | chain of operations, or the reason | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda result: (result.name, VARIANTS.index(result.variant))):
        losses = f"{result.rewritten} of {max(len(result.chains), result.found)}"
        error = "" if result.failure else f"{result.error:.0e}"
        cells = [
            result.name,
            ", ".join(tasks[result.name]),
            result.variant,
            result.verdict,
            losses if not result.failure else "",
            "<br>".join(text.replace("|", "\\|") for text in explained(result)),
            error,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def explained(result: Result) -> list[str]:
    """The chains, and the reasons of what was not rewritten."""
    if result.failure:
        return [result.failure]
    counts = {chain: result.chains.count(chain) for chain in result.chains}
    texts = [f"`{chain}`" + (f" x {count}" if count > 1 else "") for chain, count in counts.items()]
    texts += dict.fromkeys(reason.replace(INSTALLED, "") for reason in result.reasons)
    if not result.all_rewritten:
        texts += [f"graph break: {reason}" for reason in result.breaks]
    return texts or ["no loss in any graph"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classes", nargs="*", default=["*"], help="names, with * and ?")
    parser.add_argument("--task", choices=tiny.TASKS, help="only the classes of this mapping")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="may be repeated")
    parser.add_argument("--output", type=Path, help="where to write the table, as Markdown")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a class")
    arguments = parser.parse_args()
    names = [
        name
        for name, tasks in tiny.classes().items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.classes)
        and arguments.task in (None, *tasks)
    ]
    if not names:
        parser.error("no class has such a name")
    work = [(name, variant) for name in names for variant in arguments.variant or ["train"]]
    results = []
    for result in measure_all(work, arguments.jobs, arguments.timeout):
        results.append(result)
        head = f"{len(results)}/{len(work)} {result.name} {result.variant}: {result.verdict}"
        print(head, f"error {result.error:.1e}", f"{result.seconds:.1f} s", flush=True)
        if result.verdict != "rewritten":
            print(*explained(result), sep="\n  ", flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(table(results))
    rewritten = sum(result.all_rewritten and result.equal for result in results)
    print(f"{rewritten} of {len(results)} rewritten with the numbers of eager")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sys.exit(main())
