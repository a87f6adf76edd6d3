"""What deferred logits are made of. The pass knows these modules; they know nothing of the pass."""
