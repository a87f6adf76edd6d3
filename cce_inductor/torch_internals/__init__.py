"""Every use of PyTorch that has no public name.

`versions` has what differs between the supported versions, `patches` what this package changes in
the user's PyTorch, `callers` the questions about who is asking, `capture` Dynamo's caches and
fake tensors, `inputs` the inputs of captured graphs, `tensors` and `symbols` private functions of
tensors and symbolic sizes.
"""
