"""Exponentials in base 2, the base in which a device computes them.

exp(x) is 2^(x log2(e)). The kernels multiply differences, not logits, by log2(e): ``x - shift`` is
exact where the exponential is not small (x is near the greatest logit of its row, or near the row's
logsumexp), so that rounding the product matters little. Multiplying first and subtracting in a
fused multiply-add would save an instruction, but the mass of the greatest logit would then be 1
with a rounding error, which is as large as the whole loss of a confident row.
"""

LOG2_E = 1.4426950216293335
"""log2(e) = 1.44269504088896..., rounded to float32."""
