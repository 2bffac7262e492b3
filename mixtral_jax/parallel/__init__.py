"""The device mesh: its axes, which dimension is sharded over which, and the batch laid out on it."""
