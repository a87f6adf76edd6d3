"""Tests that need a CUDA device; without one, none is collected."""

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
