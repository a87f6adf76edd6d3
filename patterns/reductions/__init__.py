"""Operations that make one value of each row of logits."""
