"""Bytes on disk: reads and writes arrays, any block of them, in the file types that hold weights.

Knows no other program's names and no model. `stored` has the array that every reader returns and
every writer takes; `foreign_folder` guards against files that somebody else made.
"""
