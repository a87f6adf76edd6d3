"""How logits that were not computed can be computed later: the data that deferred logits hold.

The pass creates recipes, `deferred` follows them. This package imports neither.

- `operation`: the computation as a chain of ATen operators.
- `formula`: the same for the logits of one rewritten graph, as it returns them.
- `stale`: tensors that are read later, and the error if they have changed by then.
- `sharded`: parameters that FSDP frees early.

Glossary:

- *Plain tensor*: an ordinary `torch.Tensor` or `torch.nn.Parameter`, with memory of its own. A fake
  tensor and a tensor of any other class that changes what functions do are not plain.
- *Guarded tensor*: a tensor that will be read later, with enough evidence to notice a change.
- *Stale*: changed, moved or freed since.
- *History*: all operations that an operation depends on, in order of execution, itself included.
"""
