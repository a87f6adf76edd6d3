"""What a graph node changes in place, and whether it is random: observed on fake tensors.

The graph before autograd is not functional: ``add_``, ``+=``, ``x[i] = v``, ``out=`` and the
running statistics of a batch norm change tensors that other nodes hold. A read must not move past
such a node. No list of names says which nodes these are. Instead, each kind of call runs once on
fake tensors, and the schemas of the ATen operators that it runs say what they write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from cce_inductor.patterns.language.examples import example
from cce_inductor.torch_internals.capture import ThreadFakeTensorMode, in_this_thread

UNKNOWN = object()
"""Stands for a storage that may be any other."""


def storage_of(node: Node) -> object:
    """Return an identity that a tensor shares with its views, `UNKNOWN` if it has none."""
    return storage_key(example(node))


def storages_of(node: Node) -> set[object]:
    """Return the storages of all tensors that a node returns."""
    return {storage_key(leaf) for leaf in _tensors(example(node))}


def storage_key(value: object) -> object:
    """Return the identity of an example's storage, as `storage_of` does."""
    if not isinstance(value, Tensor):
        return UNKNOWN
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor without storage
        return UNKNOWN


def mutated_storages(node: Node, *, grad_enabled: bool = True) -> frozenset[object]:
    """Return the storages that a node changes in place. Almost every node changes none.

    A call that cannot be run is taken to change every tensor that it is given.

    Args:
        node: the node.
        grad_enabled: whether gradients are enabled at the node.
    """
    if node.op not in _CALLS:
        return frozenset()
    arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), example)
    tensors = _tensors(arguments)
    if not tensors:
        return frozenset()
    if _calls_graphs(node):
        return _mutated_by_subgraphs(node, tensors)
    effects = _effects(node, arguments, grad_enabled)
    return frozenset(storage_key(tensors[at]) for at in effects.written)


def is_random(node: Node) -> bool:
    """Return whether a node draws random numbers. A call that cannot be run is taken to do so."""
    if node.op not in _CALLS:
        return False
    if _calls_graphs(node):
        graphs = called_graphs(node)
        return not graphs or any(
            is_random(inner) for graph in graphs for inner in graph.graph.nodes
        )
    arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), example)
    return _effects(node, arguments, grad_enabled=True).is_random


_CALLS = ("call_function", "call_method", "call_module")


def _calls_graphs(node: Node) -> bool:
    return node.op == "call_module" or isinstance(node.target, HigherOrderOperator)


class _Effects(NamedTuple):
    """What a call does besides returning a result.

    Attributes:
        written: the positions of the tensors that it changes among all its tensors.
        is_random: whether it draws random numbers.
    """

    written: frozenset[int]
    is_random: bool


def _effects(node: Node, arguments: Any, grad_enabled: bool) -> _Effects:
    kind = (_kind(node, arguments), grad_enabled)
    effects = _observed.get(kind)
    if effects is None:
        with torch.set_grad_enabled(grad_enabled):
            effects = _observe(_function(node), arguments)
        if len(_observed) >= _MOST_KINDS:
            _observed.clear()
        _observed[kind] = effects
    return effects


_observed: dict[object, _Effects] = {}
"""The effects of each kind of call."""

_MOST_KINDS = 4096
"""The kinds that are remembered. When there are more, all are forgotten."""


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _kind(node: Node, arguments: Any) -> object:
    """Return what decides which tensors a call writes.

    That is the function, the constants among its arguments, and the properties of its tensors.
    Their sizes count only for functions that are not PyTorch's own (`torch.compiler.allow_in_graph`
    lets such functions into a graph).
    """
    module = getattr(node.target, "__module__", None) or "torch"
    by_sizes = node.op == "call_function" and module.split(".")[0] not in ("torch", "_operator")

    def kind_of(leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            kind = f"{type(leaf).__name__} {leaf.dtype} {leaf.device.type} {leaf.dim()}"
            sizes = f"{leaf.shape} {leaf.stride()} {leaf.requires_grad}"
            return f"{kind} {sizes}" if by_sizes else kind
        return type(leaf).__name__ if isinstance(leaf, _SYMBOLS) else repr(leaf)

    leaves, structure = torch.utils._pytree.tree_flatten(arguments)
    return (node.op, node.target, structure, tuple(map(kind_of, leaves)))


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _function(node: Node) -> Callable[..., Any]:
    if node.op == "call_method":
        name = str(node.target)
        return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def _observe(function: Callable[..., Any], arguments: Any) -> _Effects:
    """Return the effects of a call, found by making it with fake tensors."""
    tensors = _tensors(arguments)
    fake = next((tensor for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    mode = ThreadFakeTensorMode() if fake is None else fake.fake_mode
    operators = _Operators()
    with contextlib.ExitStack() as stack:
        if mode.shape_env is not None:  # the call may make symbols that nothing will use
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        # As Dynamo does: some kernels in C++ cannot run with symbolic sizes (`diag`).
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(mode)
        try:
            # The call may change the shape of a tensor, which must not reach the graph's examples.
            aliases: dict[int, Tensor] = {id(tensor): _alias(tensor) for tensor in tensors}
            args, kwargs = tree_map_only(Tensor, lambda t: aliases[id(t)], arguments)
            with in_this_thread(operators):
                function(*args, **kwargs)
        except Exception:  # of any kind: what the call writes is not known
            return _Effects(frozenset(range(len(tensors))), is_random=True)
    written = (at for at, each in enumerate(tensors) if operators.write(aliases[id(each)]))
    return _Effects(frozenset(written), operators.are_random)


def _alias(tensor: Tensor) -> Tensor:
    """Return a fake tensor with the same storage, or with its own if the tensor is not fake."""
    if isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor):
        return tensor.detach()
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


class _Operators(TorchDispatchMode):
    """Records the effects of operators while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self._changed: list[Tensor] = []
        self.are_random = False

    def write(self, tensor: Tensor) -> bool:
        """Return whether the tensor, or one that may share its memory, was changed."""
        storage = _plain_storage(tensor)
        for changed in self._changed:
            changed_storage = _plain_storage(changed)
            if changed is tensor or UNKNOWN in (storage, changed_storage):
                return True
            if changed_storage == storage:
                return True
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._changed += _written_arguments(func, args, kwargs)
        self.are_random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs)


def _plain_storage(tensor: Tensor) -> object:
    """Return the storage of a tensor, `UNKNOWN` for a wrapper around other tensors."""
    return UNKNOWN if is_traceable_wrapper_subclass(tensor) else storage_key(tensor)


def _written_arguments(func: OpOverload, args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    """Return the arguments that an operator writes according to its schema."""
    schema = func._schema
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
    named.update(kwargs)
    written = [
        named.get(argument.name)
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if not schema.is_mutable and named.get("training", named.get("train", False)):
        # The schemas of the older batch norms do not say that they write these in training.
        written += [named.get("running_mean"), named.get("running_var")]
    return _tensors(written)


def called_graphs(node: Node) -> list[GraphModule]:
    """Return the graphs that a node calls: its target if it is a module, else its arguments."""
    names = [node] if node.op == "call_module" else node.all_input_nodes
    attributes = [name for name in names if name.op in ("get_attr", "call_module")]
    module = node.graph.owning_module
    values = [getattr(module, str(name.target), None) for name in attributes]
    return [value for value in values if isinstance(value, GraphModule)]


def _mutated_by_subgraphs(node: Node, tensors: list[Tensor]) -> frozenset[object]:
    """Return the storages that a call of other graphs changes among those of its arguments.

    If the graphs are not available, it is taken to change all of them.
    """
    given = frozenset(map(storage_key, tensors))
    graphs = called_graphs(node)
    if not graphs:
        return given
    changed: set[object] = set()
    for graph in graphs:
        placeholders = {storage_of(n) for n in graph.graph.find_nodes(op="placeholder")}
        for inner in graph.graph.nodes:
            for storage in mutated_storages(inner):
                if storage in given:
                    changed.add(storage)
                elif storage in placeholders or storage is UNKNOWN:
                    return given  # some argument, and it is not known which one
    return frozenset(changed)
