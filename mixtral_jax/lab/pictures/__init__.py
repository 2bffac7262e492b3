"""Pictures of an ablation and of a routing analysis, in one style.

`ablation` and `routing` list all pictures of each; the other modules draw them.
"""
