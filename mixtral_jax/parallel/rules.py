"""The layout rules: which logical axis of an array is sharded over which mesh axes.

This is the only place that decides the layout.
"""

import dataclasses
import math

import jax
from jax import P

from mixtral_jax.parallel.mesh import MESH_AXES

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


def specs_to_whole_matrices(spec: P, num_stacked: int) -> list[P]:
    """The layouts from that of a stack of matrices to one where each is whole on one device.

    Layers, the first dimension, end up dealt over all mesh axes but those of the experts, so no two
    devices have the same matrix. From one layout to the next, a single dimension gives its axes to
    the layers: then XLA exchanges shards. For several at once, it would copy the whole stack to
    every device.

    Args:
        spec: of every dimension of the stack; layers are not sharded.
        num_stacked: how many dimensions count matrices.
    """
    over: list[MeshAxes] = list(spec)
    layers: tuple[str, ...] = ()
    specs = [spec]
    for dimension in range(num_stacked, len(over)):
        layers += tuple(jax.tree.leaves(over[dimension]))
        over[dimension] = None
        specs.append(P(layers, *over[1:]))
    used = {*layers, *jax.tree.leaves(over[1:])}
    unused = tuple(axis for axis in MESH_AXES if axis not in used)
    return [*specs, P(layers + unused, *over[1:])]
