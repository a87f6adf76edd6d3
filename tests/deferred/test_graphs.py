"""The code of graphs that return deferred logits, and of graphs that take them."""

import torch
import torch.nn.functional as F
from checks import code
from expecttest import assert_expected_inline

from cce_inductor.deferred.boundary import compile_with_deferral, deferral_for
from cce_inductor.options import Options
from cce_inductor.rewriting.rewrite import rewrite

INPUT, WEIGHT = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
BIAS, TARGET = torch.randn(50, requires_grad=True), torch.randint(50, (6,))


def graphs(fn, *args, defer_logits="with_loss", **compile_args):
    """Return the code of each graph of ``fn(*args)`` after the pass."""
    options = Options(min_logits_bytes=0, on_error="raise", defer_logits=defer_logits)
    found = []

    def compiler(module, example_inputs):
        rewrite(module, options, deferral=deferral_for(module))
        found.append(code(module))
        return module.forward

    torch._dynamo.reset()
    torch.compile(
        fn, backend=lambda *given: compile_with_deferral(compiler, *given), **compile_args
    )(*args)
    return "\n".join(found)


def test_loss_and_logits():
    def fn(x, w, b, target):
        logits = 30 * torch.tanh(F.linear(x.tanh(), w, b) / 30)
        return F.cross_entropy(logits.float(), target), logits

    assert_expected_inline(
        graphs(fn, INPUT, WEIGHT, BIAS, TARGET),
        """\
tanh = l_x_.tanh()
reduce = torch.ops.cce_inductor.reduce.default(tanh, l_w_, l_b_, [l_target_], 't0 = div.Tensor(z, 30); t1 = tanh(t0); t2 = mul.Tensor(t1, 30); logsumexp(t2); target(t2, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1, tanh)
""",
    )


def test_view_of_logits():
    def fn(x, w, target):
        logits = (x.tanh().view(2, 3, 8) @ w.T)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), target[:4]), logits

    assert_expected_inline(
        graphs(fn, INPUT, WEIGHT, TARGET),
        """\
tanh = l_x_.tanh()
view = tanh.view(2, 3, 8)
getitem_1 = l_target_[slice(None, 4, None)]
getitem_2 = view[(slice(None, None, None), slice(1, None, None), slice(None, None, None))]
reduce = torch.ops.cce_inductor.reduce.default(getitem_2, l_w_, None, [getitem_1], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem_3 = reduce[0]
getitem_4 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem_3, getitem_4, None, getitem_1, None, 50, 'mean', -100, 0.0, torch.float32)
getitem_5 = view[(slice(None, None, None), slice(1, None, None), slice(None, None, None))]
return (cross_entropy_1, getitem_5)
""",
    )


def test_learned_scale():
    def fn(x, w, scale, target):
        logits = F.linear(x, w) * scale.exp()
        return F.cross_entropy(logits, target), logits

    assert_expected_inline(
        graphs(fn, INPUT, WEIGHT, torch.tensor(0.5), TARGET),
        """\
exp = l_scale_.exp()
reduce = torch.ops.cce_inductor.reduce.default(l_x_, l_w_, None, [exp, l_target_], 't0 = mul.Tensor(z, s0); logsumexp(t0); target(t0, r1, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1, exp)
""",
    )


def test_graph_break():
    def fn(x, w, target):
        logits = F.linear(x.tanh(), w)
        torch._dynamo.graph_break()
        return F.cross_entropy(logits.float(), target), logits

    assert_expected_inline(
        graphs(fn, INPUT, WEIGHT, TARGET, defer_logits="always"),
        """\
tanh = l_x_.tanh()
return (tanh,)

reduce = torch.ops.cce_inductor.reduce.default(l_logits__tensor0, l_logits__tensor1, None, [l_target_], 'logsumexp(z); target(z, r0, -100)', skip_ignored = True)
getitem = reduce[0]
getitem_1 = reduce[1]
cross_entropy_1 = torch.ops.cce_inductor.cross_entropy.default(getitem, getitem_1, None, l_target_, None, 50, 'mean', -100, 0.0, torch.float32)
return (cross_entropy_1,)
""",
    )


def test_never():
    def fn(x, w, target):
        logits = F.linear(x, w)
        return F.cross_entropy(logits, target), logits

    assert_expected_inline(
        graphs(fn, INPUT, WEIGHT, TARGET, defer_logits="never"),
        """\
logits = torch._C._nn.linear(l_x_, l_w_)
cross_entropy = torch.nn.functional.cross_entropy(logits, l_target_)
return (cross_entropy, logits)
""",
    )
