import pytest
import torch

import cce_inductor


@pytest.fixture
def nothing_compiled():
    """Dynamo has no code, there are no reports, and afterwards nothing is installed."""
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    yield
    assert not cce_inductor.is_installed()
