"""The hot loops, each behind one signature for all back ends.

`choose` decides once which implementation a run uses. No other room asks which back end this is,
with one exception: `model.dispatch.ragged_all_to_all` has a stand-in for the collective that
XLA:CPU lacks, because collectives appear in `model.dispatch` only.
"""
