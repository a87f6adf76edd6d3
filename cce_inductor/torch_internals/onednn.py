"""Matrix products by oneDNN, one of the two libraries that PyTorch has for them on the CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

ROWS = (1024, 512, 256, 128, 64)
"""The numbers of rows of products that oneDNN computes. It keeps about 1 MiB for each combination
of sizes, of up to a thousand. So there are few sizes here, and `torch.mm` multiplies the rest."""

TERMS = 128
"""The terms of a dot product that oneDNN adds one after another. MKL adds up to 192. Left to
itself, oneDNN adds three times as many, which rounds more than `torch.mm` does."""

ZEN_5 = 26
"""The family of the processors with this architecture, as CPUID and Linux number it."""

ELEMENTS = 2**19
"""The most elements of a product that `add_product` has in memory, if it has more than the least
number of rows."""


def applies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `multiply` and `add_product` take tensors of a dtype on a device.

    On x86, `torch.mm` uses MKL for float32, and oneDNN for narrower dtypes. Measured on two
    processors of AMD: on one of Zen 4, MKL is up to a third faster; on the other, whose
    architecture was not recorded, oneDNN is twice as fast. That one is taken to be of Zen 5, the
    first with units for the vectors of 512 bits that oneDNN uses on all processors that know them.
    """
    is_ours = dtype == torch.float32 and device.type == "cpu" and _is_faster()
    return is_ours and bool(torch._C._get_mkldnn_enabled())


def _is_faster() -> bool:
    has_512_bits = torch.backends.cpu.get_cpu_capability() == "AVX512"
    has_linear = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_512_bits and has_linear and _amd_family() >= ZEN_5


@functools.cache
def _amd_family() -> int:
    """Return the family of an AMD processor; 0 if it is not known, and for other processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return 0
    fields = {name.strip(): value.strip() for name, _, value in (n.partition(":") for n in lines)}
    is_amd = fields.get("vendor_id") == "AuthenticAMD"
    return int(fields.get("cpu family", 0)) if is_amd else 0


def multiply(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``input @ weight.t() + bias`` in new memory.

    Args:
        input: [m, k].
        weight: [n, k], of any strides. It is copied unless its transpose is contiguous.
        bias: [n].
    """
    pieces = _pieces(weight)
    if pieces and len(input) in ROWS:
        return _sum(input, weight, pieces, bias)
    product = input.new_zeros(len(input), len(weight))
    add_product(product, input, weight)
    return product if bias is None else product.add_(bias)


def add_product(onto: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> None:
    """Add ``input @ weight.t()`` to `onto` [m, n]; see `multiply`."""
    pieces = _pieces(weight)
    sizes = [size for size in ROWS if size * len(weight) <= ELEMENTS or size == ROWS[-1]]
    start = 0
    for size in sizes if pieces else ():
        while len(input) - start >= size:
            rows = slice(start, start + size)
            onto[rows].add_(_sum(input[rows], weight, pieces))
            start += size
    if start < len(input):
        onto[start:].addmm_(input[start:], weight.t())


def _sum(
    input: torch.Tensor,
    weight: torch.Tensor,
    pieces: list[torch.Tensor],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``input @ weight.t() + bias`` as a sum over the pieces and what they leave out."""
    first, *others = zip(input.split(TERMS, 1), pieces, strict=False)
    total = _linear(*first, bias)
    for a, b in others:
        total.add_(_linear(a, b))
    done = len(pieces) * TERMS
    if done < input.shape[1]:
        total.addmm_(input[:, done:], weight[:, done:].t())
    return total


def _pieces(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the weight [n, k] in pieces of `TERMS`, without what is left of k.

    For a weight that is neither contiguous nor the transpose of a contiguous one, oneDNN may take
    600 times as long.
    """
    count = weight.shape[1] // TERMS
    pieces = weight[:, : count * TERMS].split(TERMS, 1) if count else ()
    return [each if each.t().is_contiguous() else each.contiguous() for each in pieces]


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN ignores its strides.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product
