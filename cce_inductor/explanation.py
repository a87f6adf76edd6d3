"""explain(): what the pass does to a function, without compiling it with Inductor."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
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
from cce_inductor.torch_internals.temporary import temporarily_compiled


@dataclasses.dataclass(frozen=True)
class ExplainedGraph:
    """One graph that Dynamo captured.

    Attributes:
        before: the code of the graph as captured.
        after: its code after the pass, the same if nothing was rewritten.
        break_reason: why Dynamo ended the graph, None if the function returned.
        break_location: ``file.py:line`` in the user's code where the graph ended, None if unknown.
    """

    before: str
    after: str
    break_reason: str | None
    break_location: str | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found. Print it.

    Attributes:
        losses: a report for each loss, in the order of execution.
        graphs: the graphs that Dynamo captured, in that order.
        overlooked: for each graph that has projections and no loss, two lines about the largest
            projection and what reads it.
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
    """A Dynamo backend that records each graph, rewrites it, and runs the result eagerly."""

    def __init__(self, options: Options):
        self.options = options
        self.losses: list[LossReport] = []
        self.graphs: list[ExplainedGraph] = []
        self.overlooked: list[str] = []
        self._breaks = collections.Counter(torch._dynamo.utils.counters["graph_break"])

    def _break_reason(self) -> str | None:
        """Return what Dynamo said of graph breaks since the last graph, without the links."""
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
    """Capture ``fn(*args, **kwargs)`` with Dynamo, and run the pass on the graphs.

    Inductor is not used. The function runs once, eagerly and with its losses rewritten, so its side
    effects happen. The random number generators are restored afterwards, and neither `reports` nor
    Dynamo's caches have a new entry. The options are those of `install` if it is in force.

    Args:
        fn: a function or module, compiled or not.
        *args: its positional arguments.
        **kwargs: its keyword arguments.

    Raises:
        Exception: any exception that `fn` raises.
    """
    return explain_with(options_in_force(), fn, *args, **kwargs)


def explain_with(
    options: Options, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Explanation:
    """Explain a function with these options instead of the installed ones."""
    recorder = _Recorder(options)
    with temporarily_compiled(fn, recorder) as compiled:
        compiled(*args, **kwargs)
    return Explanation(recorder.losses, recorder.graphs, recorder.overlooked)
