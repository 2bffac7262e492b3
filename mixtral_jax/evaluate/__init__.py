"""Evaluation on held-out text: a model's loss and scores, and those of n-gram baselines."""
