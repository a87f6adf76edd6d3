"""What a person can change so that a loss is rewritten, by the reason why it was not."""

from __future__ import annotations

_ADVICE = {
    'defer_logits is "never"': 'pass defer_logits="with_loss", so that nobody has to compute them',
    "returned by the compiled function": (
        "return only the loss from the compiled function, as a training step needs no logits"
    ),
    "the logits are small": "pass min_logits_bytes=0 to rewrite them all the same",
    "come into this graph from outside": (
        "remove the graph break between the projection and the loss, or pass "
        'defer_logits="always", which looks across it'
    ),
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
    "a torch.func transform": "compile the loss outside of the transform",
}


def advice(reason: str | None) -> str | None:
    """One sentence, or None where nothing can be changed."""
    if reason is None:
        return None
    return next((text for part, text in _ADVICE.items() if part in reason), None)
