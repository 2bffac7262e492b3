"""Bytes on disk: arrays of which any block can be read or written, in the kinds of file that hold
weights.
"""
