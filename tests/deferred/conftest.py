import pytest
import torch

import cce_inductor


@pytest.fixture
def nothing_compiled():
    """Start without compiled code and reports, and check that nothing is left installed."""
    torch._dynamo.reset()
    cce_inductor.clear_reports()
    yield
    assert not cce_inductor.is_installed()
