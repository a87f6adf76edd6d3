"""DeferredLogits: a tensor that is computed when somebody looks, and never if nobody does.

Three layers decide what happens to one:

- before autograd, ``__torch_function__`` catches what reduces each row, a loss say, and gives it
  to `fused`, which needs neither the logits nor their gradient;
- autograd, which knows nothing of this, so that hooks, views and changes in place mean what they
  always mean; a gradient that passes here is as large as the logits;
- below it, ``__torch_dispatch__``: what `lazy` knows makes another deferred tensor; everything
  else gets the numbers, which are then kept.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from cce_inductor.deferred import eager, lazy
from cce_inductor.deferred.memory import Memory
from cce_inductor.recipe.operation import Operation, product, strided
from cce_inductor.recipe.stale import Guarded, StaleLogitsError
from cce_inductor.reporting.location import calling_frame, in_compiler, in_torch
from cce_inductor.surprise import surprised
from cce_inductor.torch_internals.tensors import forbid_memory

aten = torch.ops.aten
_DISABLED_IN = torch._dynamo.eval_frame.__file__


class DeferredLogits(Tensor):
    """Logits that a compiled function returned without having computed them.

    A tensor like any other: shape, dtype, device, strides and ``requires_grad`` are what the
    function would have returned. Views, casts and pointwise functions of it are deferred too.
    Reductions over the vocabulary (a loss, ``argmax``, ``logsumexp``, ...) are computed block by
    block, with gradients. Anything else computes the numbers, once, and keeps them.

    Raises:
        StaleLogitsError: they are looked at after what they are computed from was changed.
    """

    _operation: Operation
    _memory: Memory
    _of_rows: dict[bool, Tensor | None]  # `as_argument`, by whether it is trained

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        operation: Operation,
        device: torch.device,
        storage_offset: int = 0,
        parent: Memory | None = None,
        of_parent: Callable[[Tensor], Tensor] = lambda parent: parent,
    ) -> DeferredLogits:
        self: DeferredLogits = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=storage_offset,
            dtype=like.dtype,
            device=device,
        )
        forbid_memory(self)
        self._operation = operation
        without_gradient = operation.without_gradient
        self._memory = Memory(like, without_gradient, self.is_inference(), parent, of_parent)
        self._of_rows = {}
        operation.belongs_to(self._memory)
        return self

    @property
    def is_deferred(self) -> bool:
        """Whether the numbers have not been computed yet."""
        return self._memory.is_deferred

    def numbers(self) -> Tensor:
        """A plain tensor without gradient."""
        return self._memory.numbers()

    def settle(self) -> Tensor:
        """The numbers, which from now on are what it is, in memory that its views share."""
        return self._memory.settle()

    def plain(self, *, shared: bool = True) -> Tensor:
        """A plain tensor with the same gradient.

        Args:
            shared: whether it must have the same memory. A few rows do without: those of others
                are then not computed.
        """
        made: Tensor = _Plain.apply(self, shared)
        return made

    def known(self, *, is_training: bool) -> Operation | None:
        """How it is computed, for a reduction that skips it; None if it must not be skipped.

        Args:
            is_training: whether the reduction has a gradient if the logits have one.
        """
        if not self.is_deferred or not self._operation.is_real:
            return None
        if not self.requires_grad or not is_training:
            return self._operation.without_gradient
        operation = self.differentiated()
        watched = any(each.is_watched for each in operation.history())
        return None if watched else operation

    def differentiated(self) -> Operation:
        """How it is computed, which is watched if autograd thinks otherwise: somebody's own
        autograd function has made it, or it is a leaf, as a view taken under no_grad is."""
        operation, node = self._operation, _node_of(self)
        if operation.function in _OWN_NODES:
            own = type(node) is _OWN_NODES[operation.function]._backward_cls
        else:
            own = re.fullmatch(r"\w+Backward\d+", node.name() if node else "") is not None
        if own and operation.nodes:
            before = [function for function, _ in node.next_functions]
            own = all(any(each is function for function in before) for each in operation.nodes)
        operation.is_watched = operation.is_watched or not own
        return operation

    def watch(self) -> None:
        """From now on gradients pass here.

        Raises:
            RuntimeError: one already has not.
        """
        if self._operation.is_skipped and self._version == 0:
            raise RuntimeError(
                "cce_inductor: the gradient of these logits is asked for, but a loss was taken of "
                "them that has none: they were never computed. Ask for it (retain_grad, "
                'register_hook) before the loss, or pass defer_logits="never".'
            )
        self._operation.is_watched = True

    def as_argument(self) -> Operation | None:
        """`known` for a compiled function: of other tensors, so that no size is part of it and it
        is the same for every length; None if it cannot be had so.

        Raises:
            StaleLogitsError: what it is computed from has changed.
        """
        # A compiled function may switch gradients on and off: what it is given, it is always given.
        operation = self.known(is_training=True)
        if operation is None or not any(map(lazy.depends_on_sizes, operation.history())):
            return operation
        if operation.trained not in self._of_rows:
            self._of_rows[operation.trained] = eager.of_rows(
                operation, lambda input, *others: defer(input.contiguous(), *others)
            )
        made = self._of_rows[operation.trained]
        return made._operation if isinstance(made, DeferredLogits) else None

    def __tensor_flatten__(self) -> tuple[list[str], tuple[eager.Call, ...] | None]:
        """For torch.compile: the tensors that it is computed from, and how; `boundary` puts that
        into the compiled graph."""
        try:
            operation = self.as_argument()
            if operation is None:
                self.__dict__["_tensor0"] = self.settle()
                return ["_tensor0"], None
        except StaleLogitsError:  # which whoever asks for the shape only need not know
            operation = self._operation
        writing = eager.Writing(lambda guarded: guarded.tensor)
        writing.argument(operation)
        names = [f"_tensor{number}" for number in range(len(writing.tensors))]
        self.__dict__.update(zip(names, writing.tensors, strict=True))
        return names, tuple(writing.calls)

    def __getattr__(self, name: str) -> Any:
        """What `__tensor_flatten__` names, of a tensor that it has not been called for."""
        if name.startswith("_tensor"):
            self.__tensor_flatten__()
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor],
        calls: tuple[eager.Call, ...] | None,
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> Tensor:
        tensors = [tensor.detach() for tensor in inner.values()]
        made: Tensor = tensors[0] if calls is None else eager.replay(calls, tensors)
        if made.stride() != tuple(outer_stride) and made.shape == outer_size:
            made = made.new_empty_strided(outer_size, outer_stride)
        return made

    @classmethod
    @torch._dynamo.disable  # called between two graphs, it is not to become a third
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SPECIAL:
            return _SPECIAL[func](func, args, kwargs)
        target = eager.spelling(func)
        if target is not None:
            result = _reduced(target, args, kwargs)
            if result is not NotImplemented:
                return result
        return _as_any_tensor(func, args, kwargs)

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = _derived(func, args, kwargs)
        if result is NotImplemented and isinstance(func, torch._ops.OpOverload):
            result = _decomposed(func, args, kwargs)
        return _computed(func, args, kwargs) if result is NotImplemented else result


def defer(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`operation.product` that is not computed."""
    made: Tensor = _Product.apply(input, linear_weight, linear_bias, dtype)
    return made


def with_strides(logits: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same logits with other strides."""
    made: Tensor = logits if logits.stride() == strides else _Strided.apply(logits, strides)
    return made


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(input, linear_weight)
        ctx.dtype = dtype
        ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype
        bias = None if linear_bias is None else Guarded(linear_bias, "the bias")
        kept = Guarded(input, "the hidden state"), Guarded(linear_weight, "the weight"), bias
        shape = (*input.shape[:-1], linear_weight.shape[0])
        like = torch.empty(shape, dtype=dtype, device="meta")
        return DeferredLogits(
            like, Operation(product, (*kept, dtype), size=like.numel()), input.device
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, linear_weight = ctx.saved_tensors
        need_input, need_weight, need_bias, _ = ctx.needs_input_grad
        count = math.prod(grad.shape[:-1])
        rows = grad.reshape(count, grad.shape[-1])
        d_input = d_weight = d_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if need_input:
                d_input = (rows @ linear_weight.to(ctx.dtype)).view(input.shape).to(input.dtype)
            if need_weight:
                flat = input.reshape(count, input.shape[-1]).to(ctx.dtype)
                d_weight = (rows.t() @ flat).to(linear_weight.dtype)
            if need_bias:
                d_bias = rows.sum(0).to(ctx.bias_dtype)
        return d_input, d_weight, d_bias, None


class _Strided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, strides: tuple[int, ...]) -> Tensor:
        like = torch.empty_strided(logits.shape, strides, dtype=logits.dtype, device="meta")
        argument = _argument(logits, differentiable=True)
        operation = Operation(strided, (argument, strides), nodes=_nodes(logits))
        return DeferredLogits(like, operation, logits.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


_OWN_NODES: dict[Any, Any] = {product: _Product, strided: _Strided}


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, shared: bool) -> Tensor:
        if logits._memory.is_part and not shared:
            return logits.numbers().clone()
        return logits.settle().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _reduced(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A reduction of deferred logits, NotImplemented if it needs the numbers."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return NotImplemented  # a torch.func transform may want to see inside
    with torch.set_grad_enabled(torch.is_grad_enabled() and target not in _WITHOUT_GRADIENT):
        is_training = torch.is_grad_enabled()
        known = {
            id(logits): logits.known(is_training=is_training) for logits in _among((args, kwargs))
        }
        if not known or None in known.values():
            return NotImplemented
        return eager.reduce(
            target, *tree_map_only(DeferredLogits, lambda each: known[id(each)], (args, kwargs))
        )


_WITHOUT_GRADIENT = (torch.argmax, "argmax", torch.argmin, "argmin")
"""Reductions that concern nobody who wants the gradient of the logits."""


def _among(arguments: Any) -> list[DeferredLogits]:
    return [each for each in tree_leaves(arguments) if isinstance(each, DeferredLogits)]


def _derived(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result as deferred logits, NotImplemented if it cannot be."""
    if not isinstance(func, torch._ops.OpOverload) or not lazy.can_wait(func, args, kwargs):
        return NotImplemented
    given = _among((args, kwargs))
    if not all(logits.is_deferred and logits._operation.is_real for logits in given):
        return NotImplemented
    first = args[0]
    if func in _INDICES:
        if not _are_rows(func, *args, **kwargs):
            return NotImplemented
        if func is aten.index.Tensor:
            args = (first, _numbered(args[1]))
    like_args, like_kwargs = tree_map_only(Tensor, _meta, (args, kwargs))
    try:
        like = func(*like_args, **like_kwargs)
    except eager.PYTORCH_ERRORS:
        return NotImplemented  # an error, which may read otherwise than that of numbers
    except Exception:
        surprised("deferred logits are computed")
        return NotImplemented
    if func not in lazy.VIEWS and func not in lazy.COPIES:
        if not _is_small_beside(given, like, (args, kwargs)):
            return NotImplemented
        one_args, one_kwargs = tree_map_only(Tensor, _one, (args, kwargs))
        func(*one_args, **one_kwargs)  # raises what it has to say about dtypes
        if all(logits.is_floating_point() and logits.dim() for logits in given):
            func, args, kwargs = lazy.numbers_as_tensors(func, args, kwargs)
    elif first is not given[0] or len(given) > 1:
        return NotImplemented
    differentiable = torch.is_grad_enabled() and func is not aten.detach.default
    written_args, written_kwargs = tree_map_only(
        Tensor, functools.partial(_argument, differentiable=differentiable), (args, kwargs)
    )
    operation = Operation(
        func, written_args, written_kwargs, _nodes(*given) if differentiable else ()
    )
    if func not in lazy.VIEWS:
        return DeferredLogits(like, operation, given[0].device)
    others = args[1:]  # what takes a view of the numbers does not keep the tensor alive
    if isinstance(like, Tensor):
        return _view(first, like, operation, lambda parent: func(parent, *others, **kwargs))

    def part_of(parent: Tensor, number: int) -> Any:
        return func(parent, *others, **kwargs)[number]

    return [
        _view(
            first,
            part,
            Operation(operator.getitem, (operation, number), nodes=operation.nodes),
            functools.partial(part_of, number=number),
        )
        for number, part in enumerate(like)
    ]


_INDICES = (aten.index.Tensor, aten.index_select.default)


def _are_rows(func: Any, logits: DeferredLogits, *indices: Any) -> bool:
    """Whether indices leave the last dimension as it is, after what is to be said of their range:
    it cannot wait."""
    of_masks = func is aten.index.Tensor
    last = len(_numbered(indices[0])) if of_masks else indices[0] % logits.dim() + 1
    if last >= logits.dim():
        return False
    shape = (*logits.shape[:last], *[1] * (logits.dim() - last))
    func(torch.empty(shape, dtype=torch.bool, device=logits.device), *indices)
    return True


_MOST_PRODUCTS = 8
"""Each keeps its hidden state, and is multiplied again for every reduction."""


def _is_small_beside(given: list[DeferredLogits], like: Tensor, arguments: Any) -> bool:
    """Whether a pointwise function of logits makes as many numbers, and reads few others."""
    made_of = {id(each) for logits in given for each in logits._operation.products()}
    if len(made_of) > _MOST_PRODUCTS:
        return False
    others = [a for a in tree_leaves(arguments) if isinstance(a, Tensor)]
    largest = max((a.numel() for a in others if not isinstance(a, DeferredLogits)), default=0)
    return all(like.shape == each.shape for each in given) and 2 * largest <= like.numel()


def _decomposed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of the operators that an operator is made of, which come one by one unless
    autograd is out of the way, in inference mode; NotImplemented if it is made of none."""
    composite = "CompositeImplicitAutograd"
    if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), composite
    ):
        return func.decompose(*args, **kwargs)
    return NotImplemented


def _view(
    parent: DeferredLogits,
    like: Tensor,
    operation: Operation,
    of_parent: Callable[[Tensor], Tensor],
) -> DeferredLogits:
    offset = parent.storage_offset() + like.storage_offset()
    with torch.inference_mode(parent.is_inference()):
        return DeferredLogits(like, operation, parent.device, offset, parent._memory, of_parent)


def _meta(tensor: Tensor) -> Tensor:
    return _any_elements(tensor, "meta")


def _one(tensor: Tensor) -> Tensor:
    return torch.ones((1,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as the indices of what they select."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _argument(tensor: Tensor, differentiable: bool) -> Operation | Guarded:
    """A tensor as an argument of an operation that waits."""
    if isinstance(tensor, DeferredLogits):
        wanted = differentiable and tensor.requires_grad
        return tensor.differentiated() if wanted else tensor._operation.without_gradient
    # Nobody knows when it is read, so what has no gradient is copied: it is small.
    return Guarded(tensor if tensor.requires_grad else tensor.clone(), "an operand")


def _nodes(*given: DeferredLogits) -> tuple[Any, ...]:
    return tuple(_node_of(logits) for logits in given if logits.requires_grad)


def _node_of(logits: DeferredLogits) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return logits.grad_fn


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result from the numbers, which are kept."""
    shared, changed = _aliases(func, args, kwargs)

    def plain(logits: DeferredLogits) -> Tensor:
        if func in _NEW:
            return _NEW[func](logits)
        return logits.settle() if id(logits) in shared else logits.numbers()

    reshapes = changed and torch.Tag.inplace_view in func.tags
    if reshapes:  # not what others are views of
        (logits,) = changed.values()
        memory = logits._memory
        memory.viewed = memory.settle() if memory.viewed is None else memory.viewed
        memory.stored = memory.settle().detach()
    plain_args, plain_kwargs = tree_map_only(DeferredLogits, plain, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if not changed:
        given = {id(a) for a in tree_leaves((plain_args, plain_kwargs)) if isinstance(a, Tensor)}
        # Autograd writes into what it gets, which must not be what is kept here.
        return tree_map_only(Tensor, lambda t: t.detach() if id(t) in given else t, result)
    if reshapes:
        with no_dispatch():  # gives the tensor, that has no numbers, its new shape
            func(*args, **kwargs)
    returns = func._schema.returns
    if not returns:
        return result
    results = [result] if len(returns) == 1 else list(result)
    results = [
        changed.get(next(iter(r.alias_info.before_set)), each) if r.alias_info else each
        for r, each in zip(returns, results, strict=True)
    ]
    return results[0] if len(returns) == 1 else tuple(results)


def _aliases(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[set[int], dict[str, DeferredLogits]]:
    """The identities of the tensors whose memory the results of an operator have, and those that it
    changes, by what its schema calls their memory."""
    shared: set[int] = set()
    changed: dict[str, DeferredLogits] = {}
    if isinstance(func, torch._ops.OpOverload):
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for each in _among(value):
                shared.add(id(each))
                if argument.alias_info.is_write:
                    changed[next(iter(argument.alias_info.before_set))] = each
    return shared, changed


def _no_elements(logits: DeferredLogits) -> Tensor:
    return torch.empty(0, dtype=logits.dtype, device=logits.device)


def _any_elements(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device
    )


_NEW: dict[Any, Callable[[DeferredLogits], Tensor]] = {
    **dict.fromkeys(
        (
            aten.new_empty.default,
            aten.new_empty_strided.default,
            aten.new_full.default,
            aten.new_ones.default,
            aten.new_zeros.default,
        ),
        _no_elements,
    ),
    **dict.fromkeys(
        (
            aten.empty_like.default,
            aten.full_like.default,
            aten.ones_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.zeros_like.default,
        ),
        _any_elements,
    ),
}
"""What makes another tensor and reads no numbers, and what it is given in their place."""


def _as_any_tensor(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if not any(sign in str(error) for sign in _NO_MEMORY):
            raise
    return _as_plain(func, args, kwargs)


_NO_MEMORY = (
    "its data is not allocated yet",
    "Cannot copy out of meta tensor",
    "Cannot access data pointer",
    "Attempted to access the data pointer on an invalid python storage",
)
"""What functions say that read memory themselves, of a tensor that has none."""


def _as_plain(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For what reads or changes memory itself."""
    args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.plain, (args, kwargs))
    return func(*args, **kwargs)


def _as_copy(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For what brings numbers somewhere else, of a few rows or of all."""
    logits, *others = args
    return func(logits.plain(shared=False), *others, **kwargs)


def _as_numbers(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For what reads memory and makes no tensor."""
    return func(args[0].settle().detach(), *args[1:], **kwargs)


def _as_list(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0].numbers().detach(), *args[1:], **kwargs)


def _data(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamo evaluates it, to see what it is, and may find nothing changed afterwards."""
    caller = _caller()
    if in_compiler(caller) or caller == "<string>":
        return args[0].detach()
    return _as_plain(func, args, kwargs)


def _set_data(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    logits, value = args
    like = (logits.shape, logits.stride(), logits.dtype, logits.device)
    if (value.shape, value.stride(), value.dtype, value.device) != like:
        raise RuntimeError(
            "cce_inductor: .data of deferred logits must keep shape, strides and dtype"
        )
    memory = logits._memory
    if memory.viewed is None:
        memory.viewed = memory.settle()
    memory.stored = value.plain().detach() if isinstance(value, DeferredLogits) else value.detach()


def _in_memory(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For what changes memory itself."""
    _as_plain(func, args, kwargs)
    return args[0]


def _caller() -> str:
    """The file of the code that has called a function of PyTorch."""
    return calling_frame(lambda file: file in (__file__, _DISABLED_IN)).f_code.co_filename


def _storage(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For PyTorch itself, which asks which tensors share memory, the storage of this tensor, that
    has no memory; for others one that has."""
    return (_as_any_tensor if in_torch(_caller()) else _as_numbers)(func, args, kwargs)


def _node(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Who reads it may hang a hook on it; a compiler only looks."""
    if not in_compiler(_caller()):
        args[0]._operation.is_watched = True
    return _as_any_tensor(func, args, kwargs)


def _is_view(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A compiler takes each for itself: it would want to make it of its base."""
    return False if in_compiler(_caller()) else _as_any_tensor(func, args, kwargs)


def _watched(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For what wants the gradient of the logits; of `torch.autograd.grad` that is the inputs."""
    wanted = kwargs.get("inputs", args[1:2]) if func is torch.autograd.grad else (args, kwargs)
    for each in _among(wanted):
        each.watch()
    return _as_any_tensor(func, args, kwargs)


def _shown(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    logits = args[0]
    if not logits.is_deferred:
        return str(func(logits.plain(shared=False), *args[1:], **kwargs))
    if func is Tensor.__format__:
        return object.__format__(logits, *args[1:], **kwargs)  # the same text, with no width
    grad = ", requires_grad=True" if logits.requires_grad else ""
    return (
        f"DeferredLogits(shape={tuple(logits.shape)}, dtype={logits.dtype}, "
        f"device='{logits.device}'{grad}, not computed)"
    )


_SPECIAL: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    **dict.fromkeys((Tensor.__repr__, Tensor.__format__), _shown),
    **dict.fromkeys((Tensor.apply_, Tensor.map_, Tensor.map2_, Tensor.share_memory_), _in_memory),
    **dict.fromkeys(
        (
            Tensor.data_ptr,
            *([Tensor.const_data_ptr] if hasattr(Tensor, "const_data_ptr") else []),
            Tensor.storage,
        ),
        _as_numbers,
    ),
    Tensor.untyped_storage: _storage,
    Tensor._is_view: _is_view,
    Tensor.grad_fn.__get__: _node,
    Tensor.data.__get__: _data,
    Tensor.data.__set__: _set_data,
    **dict.fromkeys(
        (
            Tensor.numpy,
            Tensor.__array__,
            Tensor.cpu,
            Tensor.__deepcopy__,
            Tensor.__reduce_ex__,
            Tensor.__dlpack__,
            Tensor.pin_memory,
        ),
        _as_copy,
    ),
    Tensor.tolist: _as_list,
    **dict.fromkeys(
        (
            Tensor.register_hook,
            Tensor.retain_grad,
            Tensor.register_post_accumulate_grad_hook,
            Tensor.requires_grad_,
            Tensor.requires_grad.__set__,
            torch.autograd.grad,
        ),
        _watched,
    ),
}
"""What is neither a reduction nor an operation on numbers."""
