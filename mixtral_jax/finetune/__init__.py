"""Tuning a model that is there already: what is trained of it, and adapters beside what is not.

All of it is surgery from outside: `model/` knows nothing of adapters, nor `train/` of what it is
that learns.
"""
