"""The groups of devices that a collective joins, and the mesh axes along which they differ.

XLA writes groups in four forms. One program may use all of them:

    replica_groups={{0,1},{2,3}}
        a list of groups; an empty list is one group of all devices
    replica_groups=[2,4]<=[4,2]T(1,0)
        an iota, reshaped and transposed
    replica_groups=mesh['a'=8,'b'=8], device_ids=([8,8]T(1,0)) {'b'}
        axes of a mesh whose names XLA chooses
    source_target_pairs={{0,1},{1,0}}
        the pairs of a collective-permute

The numbers are indices in the flattened order of the mesh, not hardware ids.
"""

import math
import re

import numpy as np

from mixtral_jax.plan.hlo import Instruction

_LIST = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
    r"replica_groups=@?\w*mesh\w*\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def read_groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    """The groups of a collective, [groups, members]. A pair of a permutation is a group of two."""
    rest = instruction.rest
    if pairs := _PAIRS.search(rest):
        return np.array(_rows(pairs.group(1))).reshape(-1, 2)
    if listed := _LIST.search(rest):
        groups = _rows(listed.group(1))
        return np.array(groups or [range(num_devices)])
    if iota := _IOTA.search(rest):
        shape, _, tile = iota.group(1).partition("<=")
        return _iota(tile).reshape(_integers(shape))
    if mesh := _MESH.search(rest):
        return _mesh_groups(mesh.group(1), mesh.group(2), mesh.group(3), num_devices)
    raise ValueError(f"cannot read the replica groups of {instruction.name}: {rest[:300]}")


def name_axes(groups: np.ndarray, mesh_shape: dict[str, int]) -> str | None:
    """The names of the mesh axes that a group spans, joined by commas.

    Args:
        mesh_shape: sizes by axis name, in the order of the mesh's dimensions.

    Returns:
        None if the group is only a part of the mesh along those axes.
    """
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())), axis=-1)
    differs = np.any(coordinates != coordinates[:, :1], axis=(0, 1))
    axes = [axis for axis, moves in zip(mesh_shape, differs, strict=True) if moves]
    is_whole = math.prod(mesh_shape[axis] for axis in axes) == groups.shape[1]
    return ",".join(axes) if is_whole else None


def name_permuted_axes(pairs: np.ndarray, mesh_shape: dict[str, int]) -> str | None:
    """The names of the mesh axes along which a permutation moves data. None if it moves nothing."""
    source, target = (
        np.stack(np.unravel_index(side, tuple(mesh_shape.values()))) for side in pairs.T
    )
    moves = np.any(source != target, axis=1)
    return ",".join(axis for axis, moved in zip(mesh_shape, moves, strict=True) if moved) or None


def _mesh_groups(axes: str, device_ids: str | None, grouped: str, num_devices: int) -> np.ndarray:
    """Groups along the axes that `grouped` names.

    An entry `'a':(before)size` names a part of an axis. One axis may have several parts.
    """
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = _iota(device_ids) if device_ids else np.arange(num_devices)
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in shape}
    for name, before, size in _MESH_AXIS.findall(grouped):
        parts[name].append((int(before), int(size)) if size else (1, shape[name]))
    dimensions: list[int] = []
    chosen: list[int] = []
    for name, size in shape.items():
        done = 1
        for before, part in sorted(parts[name]):
            chosen.append(len(dimensions) + 1)
            dimensions += [before // done, part]
            done = before * part
        dimensions.append(size // done)
    grid = np.moveaxis(ids.reshape(dimensions), chosen, range(-len(chosen), 0))
    return grid.reshape(-1, math.prod(dimensions[axis] for axis in chosen))


def _iota(text: str) -> np.ndarray:
    """Reads `[4,2]T(1,0)`, the numbers 0 to 7 as [4, 2], transposed and flattened, or a list."""
    tile, _, order = text.partition("T")
    sizes = _integers(tile)
    if "[" not in tile:
        return np.array(sizes)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_integers(order)).reshape(-1) if order else ids.reshape(-1)


def _rows(text: str) -> list[list[int]]:
    return [_integers(row) for row in re.findall(r"\{([\d,]*)\}", text)]


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
