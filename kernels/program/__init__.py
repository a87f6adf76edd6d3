"""Programs: what is computed from each logit and then reduced over each row."""
