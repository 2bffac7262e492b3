"""How good a model is on text it has not seen, and how good far simpler models are."""
