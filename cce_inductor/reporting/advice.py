"""What a person can change so that a loss is rewritten, by the reason why it was not."""

from __future__ import annotations

from cce_inductor.options import Options

_ADVICE = {
    'defer_logits is "never"': 'pass defer_logits="with_loss", so that nobody has to compute them',
    "returned by the compiled function": (
        "return only the loss from the compiled function, as a training step needs no logits"
    ),
    "the logits are small": "pass min_logits_bytes=0 to rewrite them all the same",
    "it is random": "draw the random numbers before the projection, or evaluate with dropout off",
    "class weights require a gradient": "pass weight.detach()",
    "on another device": "move the targets to the logits' device before the loss",
    "may change what the projection read": (
        "change that tensor before the projection, after the backward, or in a copy of it"
    ),
    "as large as the logits and requires a gradient": (
        "detach it, if the loss need not train what made it"
    ),
    "Inductor's C++ wrapper": "compile with Inductor's option cpp_wrapper=False",
    "is taken for that of a router": (
        "take the loss by its name, with F.cross_entropy or F.nll_loss(F.log_softmax(...))"
    ),
    "inside a torch.func transform": "compile the loss outside of the transform",
    "inside inference mode": "use torch.no_grad() in the place of inference mode",
    "the graph takes derivatives itself": (
        "let the compiled function return the loss, and take its derivatives outside of it"
    ),
}
_TOGETHER = (
    "compute the logits and the loss in one compiled function, without a graph break between them"
)


def advice(reason: str | None, options: Options, size: int | None) -> str | None:
    """One sentence, or None where nothing can be changed.

    Args:
        reason: of `LossReport`.
        options: those that were in force.
        size: of the logits, in bytes; None if it is known only at run time.
    """
    if reason is None:
        return None
    if "come into this graph from outside" in reason:
        return _advice_from_outside(options, size)
    return next((text for part, text in _ADVICE.items() if part in reason), None)


def _advice_from_outside(options: Options, size: int | None) -> str:
    if size is not None and size < options.min_logits_bytes:
        return f"{_TOGETHER}, and lower min_logits_bytes, for they are smaller than that"
    if options.defer_logits == "always":
        return (
            f'{_TOGETHER}: defer_logits="always" is in force, so that either no compiled function '
            "made them, or they could not be deferred, and the report of that function says why"
        )
    return (
        f'{_TOGETHER}; or, if a compiled function returns them, pass defer_logits="always" (not '
        "where FSDP frees the weight of the head after its forward)"
    )
