"""From an ablation file to its runs, and from what they wrote to a table over seeds."""
