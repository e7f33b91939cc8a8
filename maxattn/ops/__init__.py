"""The operator: its meaning, its backends and the choice among them."""
