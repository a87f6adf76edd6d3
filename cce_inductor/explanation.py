"""explain(): what the pass does to a function, without compiling it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from cce_inductor.deferred.boundary import compile_with_deferral, deferral_for
from cce_inductor.options import Options, options_in_force
from cce_inductor.reporting.log import readable
from cce_inductor.reporting.report import LossReport
from cce_inductor.rewriting.overlooked import largest_projection
from cce_inductor.rewriting.rewrite import rewrite
from cce_inductor.surprise import on_error
from cce_inductor.torch_internals.callers import in_torch
from cce_inductor.torch_internals.capture import forget_compiled
from cce_inductor.torch_internals.patches import without_recompile_limit


@dataclasses.dataclass(frozen=True)
class ExplainedGraph:
    """One graph that Dynamo captured.

    Attributes:
        before: its code as captured.
        after: its code after the pass; the same where nothing was rewritten.
        break_reason: why Dynamo ended the graph where it did; None if the function returned.
        break_location: ``file.py:line`` of that place in the user's code, None if unknown.
    """

    before: str
    after: str
    break_reason: str | None
    break_location: str | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it.

    Attributes:
        losses: one record for each loss, in the order of execution.
        graphs: the graphs that Dynamo captured, in that order.
        overlooked: for each graph without a loss that has a projection, the largest and what reads
            it, in two lines.
    """

    losses: list[LossReport]
    graphs: list[ExplainedGraph]
    overlooked: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        rewritten = sum(loss.rewritten for loss in self.losses)
        lines = [
            f"{len(self.losses)} loss(es) in {len(self.graphs)} graph(s), {rewritten} rewritten"
        ]
        lines += [str(loss) for loss in self.losses]
        if not self.losses:
            lines.append("no operation with a loss rule was found in what Dynamo captured")
            lines += self.overlooked
        for number, graph in enumerate(self.graphs[:-1], 1):
            if graph.break_reason:
                where = f" at {graph.break_location}" if graph.break_location else ""
                lines.append(f"graph {number} ends with a graph break{where}:")
                lines += [f"  {line}" for line in graph.break_reason.splitlines()]
        return "\n".join(lines)


class _Recorder:
    """A Dynamo backend that keeps the graphs and runs the rewritten ones as they are."""

    def __init__(self, options: Options):
        self.options = options
        self.losses: list[LossReport] = []
        self.graphs: list[ExplainedGraph] = []
        self.overlooked: list[str] = []
        self._breaks = collections.Counter(torch._dynamo.utils.counters["graph_break"])

    def _break_reason(self) -> str | None:
        """What Dynamo said since the last graph, without the links."""
        breaks = torch._dynamo.utils.counters["graph_break"]
        new = [said for said, count in breaks.items() if count > self._breaks[said]]
        self._breaks = collections.Counter(breaks)
        if not new:
            return None
        lines = (line.strip() for line in new[-1].splitlines())
        return "\n".join(line for line in lines if line and "more details" not in line)

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with on_error(self.options.on_error):
            return compile_with_deferral(self._record, module, example_inputs)

    def _record(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before = readable(module)
        losses = rewrite(module, self.options, deferral=deferral_for(module))
        self.losses += losses
        projection = None if losses else largest_projection(module)
        if projection is not None:
            self.overlooked.append(projection)
        ended = getattr(module, "compile_subgraph_reason", None)
        reason = place = None
        if ended is not None and ended.graph_break:
            reason = self._break_reason() or ended.reason
            frames = [f for f in ended.user_stack if not in_torch(f.filename)]
            place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
        self.graphs.append(ExplainedGraph(before, readable(module), reason, place))
        return module.forward


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Captures ``fn(*args, **kwargs)`` with Dynamo and runs the pass on what it captured.

    Inductor is not used. The function runs once, eagerly with its losses rewritten, so its side
    effects happen, except that the random number generators are put back. Nothing of it stays
    behind: no entry in `reports`, none in Dynamo's caches. The options are those of `install` if
    it is in force.

    Args:
        fn: a function or module, compiled or not.
        *args, **kwargs: its arguments.

    Raises:
        Exception: whatever `fn` raises.
    """
    return explain_with(options_in_force(), fn, *args, **kwargs)


def explain_with(
    options: Options, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Explanation:
    """`explain` with these options, whatever is installed."""
    recorder = _Recorder(options)
    with compiled_for_now(fn, recorder) as compiled:
        compiled(*args, **kwargs)
    return Explanation(recorder.losses, recorder.graphs, recorder.overlooked)


def own_random_numbers() -> contextlib.AbstractContextManager[Any]:
    """At its end the random number generators are put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    context: contextlib.AbstractContextManager[Any] = torch.random.fork_rng(devices=devices)
    return context


@contextlib.contextmanager
def compiled_for_now(
    fn: Callable[..., Any], backend: Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """`fn` compiled by `backend`; at the end Dynamo forgets it, and the random number generators
    are put back."""
    try:
        with own_random_numbers(), without_recompile_limit():
            yield torch.compile(uncompiled(fn), backend=backend)
    finally:
        forget_compiled(backend)


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` was given, if `fn` is its result."""
    original: Callable[..., Any] = getattr(
        fn, "_torchdynamo_orig_callable", getattr(fn, "_orig_mod", fn)
    )
    return original
