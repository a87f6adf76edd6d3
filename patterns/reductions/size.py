"""``logits.size(0)``, which Dynamo also asks for by itself where only data tells it."""

from __future__ import annotations

from typing import Any

import torch

from ..algebra import size_of
from ..logits import Row
from ..rules import Site, dimension, reduction, tensor_example


@reduction(torch.ops.aten.sym_size.int, "size")
def size(site: Site, input: Any, dim: Any = None) -> Row:
    logits = site.logits(input)
    if dim is None:
        site.unsupported("it asks for all of their sizes")
    dim = dimension(dim, tensor_example(input).dim())
    if dim == logits.vocabulary_dim:
        site.unsupported("it asks for the size of their vocabulary")
    return size_of(logits, dim)
