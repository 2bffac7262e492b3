"""The section `mesh` of a config: the sizes of the mesh axes."""

import dataclasses

from mixtral_jax.config.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1: it then takes all remaining devices.

    `expert=None`: gcd(num_experts, remaining devices). `data=None`: all devices that then remain.
    `cpu_devices`: the number of virtual devices of each process on a CPU.
    """

    data: int | None = None
    fsdp: int = 1
    expert: int | None = None
    context: int = 1
    tensor: int = 1
    cpu_devices: int = 1

    def __post_init__(self):
        sizes = {
            name: getattr(self, name) for name in ("data", "fsdp", "expert", "context", "tensor")
        }
        for name, size in sizes.items():
            require(
                size is None or size == -1 or size >= 1,
                f"mesh.{name}={size} must be at least 1, or -1 (all remaining devices)",
            )
        rest = [name for name, size in sizes.items() if size == -1]
        require(
            len(rest) <= 1,
            f"only one mesh axis may be -1 (all remaining devices), not {' and '.join(rest)}",
        )
        require(
            self.context == 1,
            f"mesh.context={self.context}: sharding the sequence is not built yet; set it to 1",
        )
        require(self.cpu_devices >= 1, f"mesh.cpu_devices={self.cpu_devices} must be at least 1")
