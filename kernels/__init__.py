"""Arithmetic of Cut Cross-Entropy: tensors in, tensors out, nothing of FX or of the matcher.

- `program`: the text that says what is computed from each logit
- `statistics`: what is computed of each row, one file for each statistic
- `reference`: the specification, from stored logits
- `head`: the arguments that all kernels share
- `blockwise`: the statistics and their gradients in blocks, on any device
- `triton`: the same as Triton templates, which Inductor compiles

Words:

- *row*: a token's logits; *column*: an entry of the vocabulary
- *statistic*: a reduction of each row over the vocabulary, a logsumexp for example
- *tile*: a range of the vocabulary, computed at a time; *block*: some rows of a tile
- *step*: one pointwise operator that a program applies to each logit
- *root*: a value of the program that a statistic reads
- *operand*: a tensor that a step reads beside the logits
- *cotangent*: the gradient of everything that is reduced from one value
"""
