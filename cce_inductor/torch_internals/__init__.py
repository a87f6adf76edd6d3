"""Every use of PyTorch that has no public name.

`versions` has what differs between the supported versions, `patches` what this package changes in
the user's PyTorch, `callers` the questions about who is asking, `capture` Dynamo and fake tensors,
`tensors` and `symbols` what a tensor and a symbolic size can say.
"""
