"""Operations on logits whose result is again logits: other rows, shapes, dtypes or values."""
