"""Deferred logits in several threads at the same time: the threads do not affect each other."""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cce_inductor
from cce_inductor.deferred.tensor import defer

pytestmark = pytest.mark.usefixtures("nothing_compiled")

HIDDEN, VOCABULARY = 8, 50
OPTIONS = {"min_logits_bytes": 0, "on_error": "raise"}
fresh = itertools.count(1)
"""Makes each reduction new, so that it is not in a cache."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = random(VOCABULARY, HIDDEN, seed=1)


def compiled(fn, **arguments):
    return torch.compile(fn, backend="cce_inductor_eager", options=OPTIONS, **arguments)


class Threads:
    """Runs functions in threads, repeatedly, until each has returned once, and keeps errors."""

    def __init__(self, *functions):
        self.errors = []
        self.calls = [0] * len(functions)
        self.is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number, function))
            for number, function in enumerate(functions)
        ]

    def _run(self, number, function):
        try:
            while not self.is_over.is_set():
                function()
                self.calls[number] += 1
        except Exception as error:
            self.errors.append(error)
            raise

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.is_over.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors
        assert all(self.calls)


def at_once(*functions):
    """Return the results of functions that start at the same time, each in its own thread."""
    results, barrier = [None] * len(functions), threading.Barrier(len(functions))

    def run(number):
        barrier.wait()
        try:
            results[number] = functions[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def reduce_something():
    """Compute a reduction that is in no cache."""
    number = next(fresh)
    hidden = random(1 + number % 97, HIDDEN, seed=number)
    logits = defer(hidden, WEIGHT, None, torch.float32)
    found = (logits * (1 + number / 1000)).logsumexp(-1)
    assert logits.is_deferred
    torch.testing.assert_close(
        found, (F.linear(hidden, WEIGHT) * (1 + number / 1000)).logsumexp(-1)
    )


def differentiate_something():
    number = next(fresh)
    hidden = random(1 + number % 89, HIDDEN, seed=number)
    targets = torch.arange(len(hidden)) % VOCABULARY

    def gradient(project):
        leaf = hidden.clone().requires_grad_()
        logits = torch.tanh(project(leaf) / (2 + number / 1000))
        return torch.autograd.grad(F.cross_entropy(logits, targets), leaf)

    found = gradient(lambda leaf: defer(leaf, WEIGHT, None, torch.float32))
    torch.testing.assert_close(found, gradient(lambda leaf: F.linear(leaf, WEIGHT)))


def compile_something():
    number = next(fresh)

    def fn(hidden, targets):
        return F.cross_entropy(F.linear(hidden, WEIGHT) * (1 + number / 1000), targets)

    args = random(6, HIDDEN, seed=number), torch.arange(6)
    torch.testing.assert_close(compiled(fn)(*args), fn(*args))


def trained(head, steps, optimizer=torch.optim.SGD):
    """Return the losses of a training loop, and the norms of its gradients."""
    model = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh())
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number))
    step = optimizer(model.parameters(), lr=0.1)
    found = []
    for number in range(steps):
        hidden = model(random(12, HIDDEN, seed=number % 5))
        loss = head(hidden, torch.arange(12))
        step.zero_grad()
        loss.backward()
        found.append(torch.stack([loss.detach(), model[0].weight.grad.norm()]))
        step.step()
    return torch.stack(found)


def head(hidden, targets):
    return F.cross_entropy(torch.tanh(F.linear(hidden, WEIGHT) / 3) * 3, targets)


BESIDE = {
    "reductions": [reduce_something] * 3,
    "gradients": [differentiate_something] * 3,
    "both": [reduce_something, differentiate_something],
    "compilations": [compile_something, reduce_something],
}


@pytest.mark.parametrize("name", BESIDE)
def test_training_beside_other_threads(name):
    expected = trained(head, 200)
    code = compiled(head, fullgraph=True)
    with Threads(*BESIDE[name]):
        found = trained(code, 200)
    torch.testing.assert_close(found, expected)
    # The threads leave nothing behind.
    torch._dynamo.reset()
    torch.testing.assert_close(trained(compiled(head, fullgraph=True), 5), expected[:5])
    reduce_something()


def test_a_module_that_is_shared():
    """The first backward happens in all threads at the same time."""
    expected = [trained(head, 20)] * 4
    for _ in range(3):
        torch._dynamo.reset()
        code = compiled(head)
        found = at_once(*[lambda code=code: trained(code, 20)] * 4)
        torch.testing.assert_close(found, expected)


SHARED = {
    "reduced": lambda logits: logits.logsumexp(-1),
    "derived and reduced": lambda logits: torch.tanh(logits / 3).logsumexp(-1),
    "greatest": lambda logits: logits.argmax(-1),
    "a loss": lambda logits: F.cross_entropy(logits, torch.arange(12)),
    "looked at": lambda logits: logits + 0,
    "a few rows": lambda logits: logits[3:5] + 0,
    "copied": lambda logits: logits.tolist(),
    "some of each": lambda logits: (logits[2] + 0, logits.argmax(-1), logits.cpu()),
}


@pytest.mark.parametrize("name", SHARED)
def test_logits_that_are_shared(name):
    use = SHARED[name]
    for number in range(10):
        hidden, weight = random(12, HIDDEN, seed=number), random(VOCABULARY, HIDDEN, seed=number)
        logits = defer(hidden, weight, None, torch.float32)
        found = at_once(*[lambda logits=logits: use(logits)] * 4)
        torch.testing.assert_close(found, [use(F.linear(hidden, weight))] * 4)


def test_gradients_of_logits_that_are_shared():
    hidden, scale = random(12, HIDDEN).requires_grad_(), next(fresh) / 1000
    logits = defer(hidden, WEIGHT, None, torch.float32)

    def gradient(logits):
        loss = F.cross_entropy(logits / (2 + scale), torch.arange(12))
        return torch.autograd.grad(loss, hidden, retain_graph=True)

    found = at_once(*[lambda: gradient(logits)] * 4)
    torch.testing.assert_close(found, [gradient(F.linear(hidden, WEIGHT))] * 4)
    assert logits.is_deferred


def test_shared_logits_into_a_compiled_function():
    def fn(logits, targets):
        return F.cross_entropy(logits / 3, targets), logits.argmax(-1)

    code = compiled(fn)
    for number in range(5):
        hidden = random(12, HIDDEN, seed=number).requires_grad_()
        logits = defer(hidden, WEIGHT, None, torch.float32)

        def use(function, logits, hidden=hidden):
            loss, greatest = function(logits, torch.arange(12))
            return torch.autograd.grad(loss, hidden, retain_graph=True), greatest

        found = at_once(*[lambda logits=logits, use=use: use(code, logits)] * 3)
        torch.testing.assert_close(found, [use(fn, F.linear(hidden, WEIGHT))] * 3)
        assert logits.is_deferred


def test_random_numbers_of_another_thread():
    """Deriving a function's gradient does not draw random numbers."""
    torch.manual_seed(0)
    expected = [torch.rand(1).item() for _ in range(20000)]
    torch.manual_seed(0)
    with Threads(*[differentiate_something] * 2):
        found = [torch.rand(1).item() for _ in range(20000)]
    assert found == expected


@pytest.mark.parametrize("use", [reduce_something, differentiate_something])
def test_no_thread_is_told_of_a_mode(use, monkeypatch):
    """``with mode`` sets a flag that all threads share. While it is set, Dynamo compiles nothing."""
    entered = []
    enter = TorchDispatchMode.__enter__
    monkeypatch.setattr(
        TorchDispatchMode, "__enter__", lambda mode: entered.append(mode) or enter(mode)
    )
    use()
    assert not entered


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.save_on_cpu,
    ],
)
def test_what_the_caller_is_in_the_middle_of(context):
    """Contexts of the caller do not affect how a function is derived."""
    number = next(fresh)
    hidden = random(5, HIDDEN)
    logits = defer(hidden, WEIGHT, None, torch.float32)
    with context():
        found = torch.tanh(logits / (1 + number / 1000)).logsumexp(-1)
    assert logits.is_deferred
    expected = torch.tanh(F.linear(hidden, WEIGHT) / (1 + number / 1000)).logsumexp(-1)
    torch.testing.assert_close(found + 0, expected)
    assert not cce_inductor.is_installed()
