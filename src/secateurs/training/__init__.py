"""The training loop, the hooks that keep masks, and what iterates over trainings."""
