"""State on disk: the checkpoints of a run, and weights in the formats of other programs.

Imports go one way: `files` (bytes on disk) <- `formats` (other programs' names) <- this folder.
`run` saves and restores the checkpoints of a run. `weights` opens a model from any folder; its
parameters then go to devices (`on_devices`), to another program (`export`) or into a checkpoint
(`run_from_chunks`).
"""
