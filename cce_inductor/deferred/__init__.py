"""Deferred logits: tensors that a compiled function returns without having computed them.

The class `tensor.DeferredLogits` is a `base.DeferredTensor`, which holds the data, with PyTorch's
protocols for tensor subclasses, each in a file of its own:

- `overrides`: before autograd. Reductions go to `eager`, which runs the pass on them.
- `autograd`: the autograd functions that make deferred logits, and what they do with a gradient.
- `dispatch`: after autograd. `lazy` says which ATen operators have deferred results.
- `flatten`: what `torch.compile` is told of deferred logits.

Their gradient is deferred, too. `gradient` has its data, `gradient_dispatch` what ATen operators do
with it. A `connection` sends it from a fused loss to the logits, and `paths` says how it looks when
it reaches the projection without interference.

Below them are `memory` (the values, once computed), `cost` (the warning when they are), and `tape`
(operations as a list of calls). Above them are `boundary` and `arguments`: deferred logits as
results and as arguments of compiled functions, with `type_tables`, for the libraries that keep one,
and `kept`, for logits that outlive the weight.

Glossary (see also `recipe`):

- *Values*: the elements of a tensor. Deferred logits have none until something needs them.
- *Materialized*: with values that are authoritative, because they may have been modified in place.
  Before that, values may be computed again, for example those of a few rows.
- *Partial*: some rows of logits that have not been computed. They are computed without the others.
- *Fused*: computed by the pass block by block, without the logits.
- *Tape*: a list of calls that stands for an operation and its history.
"""
