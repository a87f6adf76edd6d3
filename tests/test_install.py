"""install() and uninstall() leave everything else in the compiler as it was."""

import copy
import threading

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch._inductor.custom_graph_pass import CustomGraphPass

import cce_inductor
from cce_inductor.reporting import reasons
from cce_inductor.torch_internals.versions import pass_list

INPUT = torch.randn(6, 8)
WEIGHT = torch.randn(50, 8)
TARGET = torch.randint(50, (6,))


def loss(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)


@pytest.fixture(autouse=True)
def _uninstalled():
    assert not cce_inductor.is_installed()
    cce_inductor.clear_reports()
    torch._dynamo.reset()
    yield
    cce_inductor.uninstall()


def settings():
    return (
        inductor_config.pre_grad_custom_pass,
        getattr(inductor_config, "pre_grad_pass_timing", None),
        torch.compiler.config.cache_key_tag,
    )


def run_pre_grad_pass(module):
    """What Inductor does with a captured graph before autograd."""
    for custom_pass in pass_list(inductor_config.pre_grad_custom_pass):
        custom_pass(module.graph)


def captured():
    graphs = []
    torch._dynamo.reset()
    torch.compile(loss, backend=lambda module, _: graphs.append(module) or module.forward)(
        INPUT, WEIGHT, TARGET
    )
    return graphs[0]


def is_rewritten(module):
    return any("cce_inductor" in str(node.target) for node in module.graph.nodes)


class UserPass(CustomGraphPass):
    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append([node.name for node in graph.nodes])

    def uuid(self):
        return "user"


def test_uninstall_restores():
    before = settings()
    cce_inductor.install()
    assert cce_inductor.is_installed()
    assert settings() != before
    cce_inductor.uninstall()
    assert not cce_inductor.is_installed()
    assert settings() == before
    cce_inductor.uninstall()
    assert settings() == before


def test_install_twice_replaces_the_options():
    cce_inductor.install(min_logits_bytes=2**40)
    run_pre_grad_pass(small := captured())
    assert not is_rewritten(small)
    first = settings()
    cce_inductor.install(min_logits_bytes=0)
    assert settings()[0] is first[0]
    assert settings()[2] != first[2]
    run_pre_grad_pass(module := captured())
    assert is_rewritten(module)
    assert len(cce_inductor.reports()) == 2


def test_compiled_with_inductor():
    with cce_inductor.installed(min_logits_bytes=0):
        compiled = torch.compile(loss)(INPUT, WEIGHT, TARGET)
    torch.testing.assert_close(compiled, loss(INPUT, WEIGHT, TARGET))
    (report,) = cce_inductor.reports()
    assert report.rewritten
    assert torch._dynamo.utils.counters["cce_inductor"]["rewritten"] >= 1


def test_user_pass_is_chained():
    user_pass = UserPass()
    with inductor_config.patch(pre_grad_custom_pass=user_pass):
        with cce_inductor.installed(min_logits_bytes=0):
            run_pre_grad_pass(module := captured())
            assert "cross_entropy" in user_pass.seen[0]
            assert is_rewritten(module)
            assert "user" in inductor_config.pre_grad_custom_pass.uuid()
        assert inductor_config.pre_grad_custom_pass is user_pass


def test_plain_function_is_chained_and_has_no_uuid():
    seen = []
    with (
        inductor_config.patch(pre_grad_custom_pass=seen.append),
        cce_inductor.installed(min_logits_bytes=0),
    ):
        run_pre_grad_pass(captured())
        assert len(seen) == 1
        assert inductor_config.pre_grad_custom_pass.uuid() is None


def test_cache_key_tag_of_the_user_is_kept():
    with torch.compiler.config.patch(cache_key_tag="mine"):
        with cce_inductor.installed():
            assert torch.compiler.config.cache_key_tag.startswith("mine cce_inductor-")
        assert torch.compiler.config.cache_key_tag == "mine"


def test_installed_nests():
    before = settings()
    with cce_inductor.installed(min_logits_bytes=0):
        outer = settings()
        with cce_inductor.installed(min_logits_bytes=1):
            assert settings() != outer
        assert settings() == outer
    assert settings() == before


def test_installed_is_left_by_an_exception():
    before = settings()
    with pytest.raises(ZeroDivisionError), cce_inductor.installed():
        raise ZeroDivisionError
    assert settings() == before


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_other_threads_see_it():
    before = in_thread(settings)
    cce_inductor.install(min_logits_bytes=0)
    assert in_thread(settings) == settings()

    def rewrite_in_thread():
        run_pre_grad_pass(module := captured())
        return is_rewritten(module)

    assert in_thread(rewrite_in_thread)
    cce_inductor.uninstall()
    assert in_thread(settings) == before


def test_installing_from_many_threads():
    before = settings()
    threads = [
        threading.Thread(target=cce_inductor.install, kwargs={"min_logits_bytes": size})
        for size in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cce_inductor.is_installed()
    cce_inductor.uninstall()
    assert settings() == before


def test_cpp_wrapper_is_refused():
    """It cannot call an operator that is written in Python."""
    expected = loss(INPUT, WEIGHT, TARGET)
    cce_inductor.install(min_logits_bytes=0, on_error="raise")
    found = torch.compile(loss, options={"cpp_wrapper": True})(INPUT, WEIGHT, TARGET)
    (report,) = cce_inductor.reports()
    assert report.reason == reasons.NO_PYTHON_IN_CPP_WRAPPER.sentence
    torch.testing.assert_close(found, expected)


def test_a_pass_that_outlives_uninstall_does_nothing():
    cce_inductor.install(min_logits_bytes=0)
    leftover = inductor_config.pre_grad_custom_pass
    assert copy.deepcopy(leftover) is leftover
    cce_inductor.uninstall()
    leftover((module := captured()).graph)
    assert not is_rewritten(module)


def test_an_error_in_the_pass_leaves_the_graph(monkeypatch, caplog):
    def broken(*args):
        raise KeyError("surprise of this test")

    monkeypatch.setattr("cce_inductor.rewriting.build.Builder.result", broken)
    cce_inductor.install(min_logits_bytes=0, on_error="warn")
    for _ in range(2):
        run_pre_grad_pass(module := captured())
        assert not is_rewritten(module)
        torch.testing.assert_close(
            module(INPUT, WEIGHT, TARGET)[0], loss(INPUT, WEIGHT, TARGET), rtol=0, atol=0
        )
    assert caplog.text.count("please report this") == 1
    first, _ = cce_inductor.reports()
    assert first.reason == "the pass failed with KeyError: 'surprise of this test'"

    cce_inductor.install(min_logits_bytes=0, on_error="raise")
    with pytest.raises(KeyError, match="surprise"):
        run_pre_grad_pass(captured())


def test_an_error_while_building_takes_the_new_nodes_out(monkeypatch):
    from cce_inductor.rewriting.build import Builder

    build = Builder.result

    def build_then_fail(self, found, options):
        build(self, found, options)
        raise KeyError("after building")

    monkeypatch.setattr(Builder, "result", build_then_fail)
    cce_inductor.install(min_logits_bytes=0, on_error="warn")
    before = (module := captured()).code
    run_pre_grad_pass(module)
    module.recompile()
    assert module.code == before
