"""Pictures of ablations and of routing, in one style."""
