"""The layout rules: which logical axis of an array is sharded over which mesh axes.

This is the only place that decides the layout.
"""

import dataclasses
import math

import jax
from jax import P

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Maps each logical axis to the mesh axes that shard it.

    Experts are sharded over `expert`. Every weight is sharded over `fsdp` in its model dimension,
    and over `tensor` in its wide dimension. Dense weights are also sharded over `expert`, where
    they would otherwise be copies. Tokens are sharded over `data`, `fsdp` and `expert`, so that no
    device repeats the attention of another.
    """

    # Activations.
    batch: MeshAxes = ("data", "fsdp", "expert")
    act_heads: MeshAxes = "tensor"
    act_mlp: MeshAxes = "tensor"
    act_vocab: MeshAxes = "tensor"
    # Weights.
    embed: MeshAxes = "fsdp"
    dense_embed: MeshAxes = ("fsdp", "expert")
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    embedding: MeshAxes = ("fsdp", "tensor")
    expert: MeshAxes = "expert"

    def spec(self, *axes: str | None) -> P:
        """PartitionSpec of an array whose dimensions have these logical axes (None: replicated).

        Raises:
            ValueError: two dimensions would use the same mesh axis.
        """
        mesh_axes = [axis and getattr(self, axis) for axis in axes]
        used = jax.tree.leaves(mesh_axes)
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {axes} use a mesh axis twice: {mesh_axes}")
        return P(*mesh_axes)

    def count_row_devices(self, mesh: jax.sharding.Mesh) -> int:
        """The number of shards of the batch dimension. The rows of a batch are a multiple of it."""
        return math.prod(mesh.shape[axis] for axis in jax.tree.leaves(self.batch))

    def gathered(self, *axes: str | None) -> P:
        """PartitionSpec of a weight in use: as `spec`, but with its model dimension gathered."""
        return self.spec(*(None if axis in ("embed", "dense_embed") else axis for axis in axes))
