"""What depends on private parts of PyTorch, and differs by version or affects the user's process.

- `versions`: what differs between the supported versions
- `patches`: what this package changes in the user's PyTorch
- `callers`: which code makes a call
- `capture`: Dynamo's caches and fake tensors
- `temporary`: functions that are compiled temporarily
- `inputs`: the inputs of captured graphs
- `onednn`: matrix products by one of PyTorch's libraries
- `tensors`, `symbols`: private functions of tensors and of symbolic sizes
"""
