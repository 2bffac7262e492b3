"""Mixtral in JAX: a sparse mixture of experts, trained with its experts sharded over a mesh of devices."""

__version__ = "0.1.0"
