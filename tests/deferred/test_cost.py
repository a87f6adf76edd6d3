"""The warning that deferred logits are computed."""

import warnings

import torch
from deferred_logits import Head

from cce_inductor.deferred import cost
from cce_inductor.deferred.tensor import defer


def warned(fn):
    cost._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fn()
    return [w for w in caught if "deferred logits are computed here" in str(w.message)]


def large():
    hidden, weight = torch.randn(1024, 4), torch.randn(5000, 4)
    return defer(hidden, weight, None, torch.float32)


def test_one_warning_for_each_place():
    def look():
        return large().norm()

    def looks():
        for _ in range(3):
            look()
        large().std()

    first, second = warned(looks)
    assert "1024x5000 float32, 19.53 MiB" in str(first.message)
    assert first.filename == second.filename == __file__
    assert first.lineno == look.__code__.co_firstlineno + 1
    assert second.lineno == looks.__code__.co_firstlineno + 3


def test_no_warning_for_what_is_cheap():
    assert not warned(lambda: large()[:3].norm())
    assert not warned(lambda: large().argmax(-1))
    assert not warned(lambda: Head().deferred().norm())
