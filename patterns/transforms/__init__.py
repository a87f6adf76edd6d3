"""Operations after which logits are still logits: of other rows, scaled, capped or cast."""
