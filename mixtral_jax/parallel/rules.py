"""Which logical axis of an array is sharded over which mesh axes: the one place that decides
layout.
"""

import dataclasses
import math

import jax
from jax import P

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Maps each logical axis to the mesh axes that shard it.

    Experts are spread over `expert`; every weight is cut over `fsdp` on its model dimension and
    over `tensor` on its wide one. Dense weights are cut over `expert` as well, where they would be
    copies. Tokens use all of data, fsdp and expert, so that no device repeats the attention of
    another.
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
        """PartitionSpec of an array whose dimensions carry these logical axes (None: replicated).

        Raises:
            ValueError: two dimensions would use the same mesh axis.
        """
        mesh_axes = [axis and getattr(self, axis) for axis in axes]
        used = jax.tree.leaves(mesh_axes)
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {axes} use a mesh axis twice: {mesh_axes}")
        return P(*mesh_axes)

    def count_row_devices(self, mesh: jax.sharding.Mesh) -> int:
        """Among how many devices, or groups of them, rows are dealt: a batch has a multiple of so
        many.
        """
        return math.prod(mesh.shape[axis] for axis in jax.tree.leaves(self.batch))

    def gathered(self, *axes: str | None) -> P:
        """Layout of a weight in use: as `spec`, with the shards of its model dimension gathered."""
        return self.spec(*(None if axis in ("embed", "dense_embed") else axis for axis in axes))
