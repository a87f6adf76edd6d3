"""Logits after a pointwise function of them. Such a function needs no rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from cce_inductor.patterns.language.blocks import read
from cce_inductor.patterns.language.capture import captured
from cce_inductor.patterns.language.examples import example, had_gradient, tensor_example
from cce_inductor.patterns.language.expression import LOGIT, Apply, is_differentiable, where
from cce_inductor.patterns.language.logits import Logits
from cce_inductor.patterns.language.site import Site
from cce_inductor.reporting import reasons


def pointwise(site: Site, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Logits:
    """Return the logits after a pointwise function of them and of tensors that broadcast to them.

    Args:
        site: the node.
        function: any function of tensors.
        args, kwargs: its arguments, with nodes for tensors.

    Raises:
        UnsupportedError: the function is not pointwise, or an operand does not broadcast.
    """
    nodes: list[Node] = []
    torch.fx.map_arg((args, kwargs), nodes.append)
    of_logits = [node for node in dict.fromkeys(nodes) if site.is_logits(node)]
    if not of_logits:
        site.unsupported(reasons.WITHOUT_RULE)
    # Logits that require a gradient cannot be read as a stored tensor.
    main = next((n for n in of_logits if tensor_example(n).requires_grad), of_logits[0])
    logits = site.logits(main)
    shape = tuple(tensor_example(main).shape)
    dtypes: list[torch.dtype | None] = [logits.compute_dtype]

    def meaning(node: Node) -> tuple[Any, torch.dtype]:
        dtypes.append(site.logits(node).compute_dtype if site.is_logits(node) else None)
        return read(site, node, logits, shape), tensor_example(node).dtype

    expression = captured(site, function, args, kwargs, logits, meaning)
    if (
        had_gradient(site.node)
        and not is_differentiable(expression)
        and is_differentiable(logits.expression)
    ):
        # The replaced code has a gradient, whose value is 0.
        always = Apply("ne.Scalar", (Apply("full_like", (LOGIT, 1.0)), 0))
        expression = where(always, expression, logits.expression)
    elif isinstance(expression, (int, float)):  # a function like `zeros_like`
        expression = Apply("full_like", (LOGIT, float(expression)))
        if getattr(example(site.node), "dtype", None) == torch.bool:
            expression = Apply("ne.Scalar", (expression, 0))
    result = example(site.node)  # None for an assignment
    if getattr(result, "dtype", None) == torch.float64 or torch.float64 in dtypes:
        logits = logits.replace(compute_dtype=torch.float64)
    return logits.replace(expression=expression)
