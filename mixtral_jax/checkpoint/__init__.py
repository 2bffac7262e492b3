"""State on disk: the checkpoints of a run, and weights in other programs' layouts."""
