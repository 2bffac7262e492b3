"""The hot loops, each behind one signature for all back ends.

`choose` decides once which implementation a run uses. No other room chooses an implementation by
back end, except `model.dispatch.ragged_all_to_all`, which has a stand-in for the collective that
XLA:CPU lacks, because collectives appear in `model.dispatch` only; `tests/test_architecture.py`
lists who may ask.
"""
