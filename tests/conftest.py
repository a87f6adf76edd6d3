import sys
from pathlib import Path

import pytest
import torch

from cce_inductor import surprise
from cce_inductor.deferred.gradient import FusedBackward
from cce_inductor.options import Options

sys.path.insert(0, str(Path(__file__).parent))

# With small tensors, threads would mostly wait for each other.
torch.set_num_threads(1)

# An unexpected exception in the package fails the test: `on_error` defaults to "raise", with and
# without options.
Options.__init__.__defaults__ = tuple(
    "raise" if name == "on_error" else default
    for name, default in zip(Options.names(), Options.__init__.__defaults__, strict=True)
)
surprise.set_default("raise")


@pytest.fixture
def computed(monkeypatch):
    """The gradients of deferred logits whose values are computed, a list that a test reads."""
    found = []
    original = FusedBackward.values
    monkeypatch.setattr(FusedBackward, "values", lambda self: found.append(self) or original(self))
    return found
