"""Matrix products that are wider than their operands."""

import math

import pytest
import torch

from cce_inductor.kernels.blockwise.product import WideProduct, operand_dtype
from cce_inductor.kernels.head import accumulation_dtype

CPU = torch.device("cpu")
PRECISION = 2**-16


def operands(dtype, m=33, k=64, n=50):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator).to(dtype) for shape in ((m, k), (k, n)))


@pytest.mark.parametrize(
    ("dtype", "operand", "wide"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes(dtype, operand, wide):
    assert operand_dtype(dtype) == operand
    assert accumulation_dtype(dtype) == wide


@pytest.mark.parametrize("beta", [0, 1])
def test_bfloat16_loses_nothing_of_its_own_size(beta):
    a, b = operands(torch.bfloat16)
    exact = a.double() @ b.double()
    out = torch.full(exact.shape, 3.0)
    WideProduct(torch.bfloat16, out.numel(), CPU)(out, a, b, beta=beta)
    error = (out - 3.0 * beta - exact).norm() / exact.norm()
    assert error < PRECISION
    assert (exact.bfloat16() - exact).norm() / exact.norm() > 50 * error


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_operands_are_multiplied_once(dtype, beta):
    a, b = operands(dtype)
    out = torch.full((33, 50), 3.0, dtype=dtype)
    product = WideProduct(dtype, out.numel(), CPU)
    assert product.exact
    assert WideProduct.scratch_itemsize(dtype) == 0
    want = torch.addmm(out, a, b) if beta else a @ b
    product(out, a, b, beta=beta)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_beta_0_does_not_read_the_result(dtype):
    a, b = operands(dtype)
    out = torch.full((33, 50), math.nan)
    WideProduct(dtype, out.numel(), CPU)(out, a, b, beta=0)
    assert out.isfinite().all()


def test_scratch_is_shared_by_smaller_results():
    a, b = operands(torch.bfloat16)
    product = WideProduct(torch.bfloat16, 33 * 50, CPU)
    out = torch.empty(7, 20)
    product(torch.empty(33, 50), a, b, beta=0)
    product(out, a[:7], b[:, :20], beta=0)
    exact = a[:7].double() @ b[:, :20].double()
    assert (out - exact).norm() / exact.norm() < PRECISION


@pytest.mark.parametrize("beta", [0, 1])
def test_infinite_and_nan_products_stay_what_they_are(beta):
    """And the others keep what rounding took from them."""
    a, b = operands(torch.bfloat16)
    a[0], a[1], b[:, 2] = math.inf, math.nan, torch.where(b[:, 2] > 0, math.inf, 1.0)
    exact = a.double() @ b.double()
    out = torch.full(exact.shape, 3.0)
    WideProduct(torch.bfloat16, out.numel(), CPU)(out, a, b, beta=beta)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    finite = exact.isfinite()
    assert finite.any()
    error = (out - 3.0 * beta - exact)[finite].norm() / exact[finite].norm()
    assert error < PRECISION
