"""From files to batches: sources -> tokenizer -> token stores -> packed rows -> batches on the
mesh.

Everything here is a pure function of the files, the config and the seed, so a run resumes from its
step number alone. This room knows nothing of models or training.
"""
