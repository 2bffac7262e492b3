"""Tuning an existing model: which of its parameters are trained, and adapters for the others.

Everything here changes a model from outside: `model/` does not know adapters, and `training/` does
not know which parameters are trained.
"""
