"""Arithmetic of Cut Cross-Entropy on tensors, independent of the matcher.

- `names`, `output`: the names of values in a program, and what a program ends in
- `statistics`: the reductions of each row, one file for each statistic
- `program`: the text that says what is computed from each logit
- `all_statistics`: the statistics of one program, which use the numbers of each other
- `head`: the arguments of the kernels, and which gradients are asked for
- `reference`: the specification, which stores the logits
- `blockwise`: the statistics and their gradients in blocks, on any device
- `triton`: the same as Triton templates, which Inductor compiles

Words:

- *row*: a token's logits; *column*: an entry of the vocabulary
- *statistic*: a reduction of each row over the vocabulary, a logsumexp for example
- *tile*: a range of the vocabulary that is computed at once; *block*: some rows of a tile
- *numbers*: what a statistic keeps of a tile; *part*: the same in float64, ready to be combined
- *kept*: a row that is computed, because its class index is not ignored
- *step*: one pointwise operator that a program applies to each logit
- *root*: a value of the program that a statistic reads
- *operand*: what a step reads beside the logits: one or several tensors, see `names.OperandKind`
- *cotangent*: the gradient with respect to a value, through all statistics that read it
"""
