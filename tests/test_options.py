"""Options are validated by every function that accepts them."""

import dataclasses

import pytest
import torch

import cce_inductor
from cce_inductor import Options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_logits_bytes": -1}, ValueError, "min_logits_bytes must be at least 0, got -1"),
        ({"min_logits_bytes": 1.5}, TypeError, "min_logits_bytes must be an int"),
        ({"min_logits_bytes": True}, TypeError, "min_logits_bytes must be an int"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be at least 1, got 0"),
        ({"workspace_bytes": "1M"}, TypeError, "workspace_bytes must be an int"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of"),
        ({"min_logit_bytes": 0}, TypeError, "unknown option 'min_logit_bytes'; the options are"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        Options.create(**options)
    with pytest.raises(error, match=message):
        cce_inductor.install(**options)
    assert not cce_inductor.is_installed()


@pytest.mark.parametrize("backend", ["cce_inductor", "cce_inductor_eager"])
def test_wrong_options_of_a_backend(backend):
    compiled = torch.compile(lambda x: x + 1, backend=backend, options={"on_error": "ignore"})
    with pytest.raises(Exception, match="on_error must be one of"):
        compiled(torch.ones(2))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().min_logits_bytes = 3
