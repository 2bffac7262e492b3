"""What a run is, from a config to its end: scripts, verbs, notebooks and servers stand on it.

Composes the rooms below; knows no flags, which `cli` turns into arguments of what is here.
"""
