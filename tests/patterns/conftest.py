"""Random numbers that are the same in every run and whichever tests are selected."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
