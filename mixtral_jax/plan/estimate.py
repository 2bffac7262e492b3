"""The plan of a config on a topology: one compilation, and all figures that come from it."""

import dataclasses
import math
from typing import Any

import numpy as np

from mixtral_jax.config import Config
from mixtral_jax.plan.collectives import Collective, list_collectives
from mixtral_jax.plan.compile import (
    CompiledStep,
    StepMemory,
    compile_step,
    count_routed_rows,
    trace_grouped,
)
from mixtral_jax.plan.flops import count_program_flops, count_traced_flops, model_flops_per_step
from mixtral_jax.plan.overlap import hidden_shares
from mixtral_jax.plan.roofline import Roofline, make_roofline, transfer_seconds
from mixtral_jax.plan.topology import Target
from mixtral_jax.plan.traffic import count_traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step needs, and how fast it could be.

    FLOPs are those of all devices together; bytes and seconds are those of one device.
    `hidden_shares` are the shares of the collectives that computation hides.
    """

    step: CompiledStep
    target: Target
    model_flops: int
    hardware_flops: int
    hbm_traffic: int
    collectives: list[Collective]
    collective_seconds: list[float]
    hidden_shares: list[float]
    roofline: Roofline

    @property
    def hbm_bytes(self) -> int:
        """The memory of one device, as published."""
        return self.target.topology.chip.hbm_bytes

    @property
    def hidden_bytes(self) -> list[int]:
        """Of the bytes that each collective sends, those that computation hides."""
        pairs = zip(self.collectives, self.hidden_shares, strict=True)
        return [round(collective.bytes_per_device * share) for collective, share in pairs]

    @property
    def exposed_bytes(self) -> int:
        """The bytes of all collectives that no computation hides."""
        sent = sum(collective.bytes_per_device for collective in self.collectives)
        return sent - sum(self.hidden_bytes)

    @property
    def fits(self) -> bool:
        """True if the peak memory of a step fits the device."""
        return self.step.memory.peak <= self.hbm_bytes

    @property
    def advice(self) -> list[str]:
        """What to change so that the step fits. Empty if it fits."""
        return advise(
            self.step.config, self.step.memory, self.hbm_bytes, self.target.topology.num_devices
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as numbers and names, for `--json`."""
        step, memory, topology = self.step, self.step.memory, self.target.topology
        return {
            "topology": topology.name,
            "num_devices": topology.num_devices,
            "compiled_for": self.target.platform,
            "is_estimate": self.target.is_estimate,
            "mesh": dict(step.mesh.shape),
            "batch_size": step.config.train.batch_size,
            "gradient_accumulation": step.config.train.gradient_accumulation,
            "sequence_length": step.config.train.sequence_length,
            "remat": step.config.model.remat,
            "parameters": step.parameters.total,
            "active_parameters": step.parameters.active,
            "trained_parameters": step.trained.total,
            "peak_bytes_per_device": memory.peak,
            "hbm_bytes_per_device": self.hbm_bytes,
            "fits": self.fits,
            "memory": {
                "parameter_bytes_per_device": memory.parameters,
                "optimizer_bytes_per_device": memory.optimizer,
                "activation_bytes_per_device": memory.rest,
            },
            "advice": self.advice,
            "model_flops_per_step": self.model_flops,
            "hardware_flops_per_step": self.hardware_flops,
            "hbm_traffic_bytes_per_device": self.hbm_traffic,
            # A program for another chip has another schedule.
            "hidden_bytes_per_device": None if self.target.is_estimate else sum(self.hidden_bytes),
            "exposed_bytes_per_device": None if self.target.is_estimate else self.exposed_bytes,
            "compile_seconds": step.seconds,
            "collectives": [
                {
                    "op": c.op,
                    "axis": c.axis,
                    "pass": c.pass_,
                    "count": c.count,
                    "bytes_per_device": c.bytes_per_device,
                    "hidden_bytes_per_device": None if self.target.is_estimate else hidden,
                    "operand": c.operand,
                    "seconds": seconds,
                }
                for c, seconds, hidden in zip(
                    self.collectives, self.collective_seconds, self.hidden_bytes, strict=True
                )
            ],
            "roofline": dataclasses.asdict(self.roofline),
        }


def make_plan(config: Config, target: Target) -> Plan:
    """Compiles the step and computes all figures of the plan.

    Raises:
        ConfigError: the mesh does not fit the topology.
    """
    step = compile_step(config, target)
    config, topology = step.config, target.topology
    routed_rows = count_routed_rows(config)
    collectives = list_collectives(step.program, dict(step.mesh.shape))
    seconds = [
        transfer_seconds(collective, topology, _coordinates(step, target))
        for collective in collectives
    ]
    model_flops = model_flops_per_step(config, step.parameters, step.trained)
    hardware_flops = _hardware_flops(step, target, routed_rows)
    traffic = count_traffic(step.program, routed_rows)
    roofline = make_roofline(
        topology.chip,
        topology.num_devices,
        model_flops=model_flops,
        hardware_flops=hardware_flops,
        hbm_bytes=traffic,
        interconnect_seconds=sum(seconds),
        tokens=config.train.batch_size * config.train.sequence_length,
    )
    return Plan(
        step=step,
        target=target,
        model_flops=model_flops,
        hardware_flops=hardware_flops,
        hbm_traffic=traffic,
        collectives=collectives,
        collective_seconds=seconds,
        hidden_shares=hidden_shares(step.program, collectives, seconds, topology.chip, routed_rows),
        roofline=roofline,
    )


def advise(config: Config, memory: StepMemory, hbm_bytes: int, num_devices: int) -> list[str]:
    """What to change so that the step fits, the simplest change first. Empty if it fits."""
    if memory.peak <= hbm_bytes:
        return []
    state = memory.parameters + memory.optimizer
    train, finetune, advice = config.train, config.finetune, []
    if (
        finetune
        and finetune.lora.rank
        and (finetune.frozen_dtype or config.model.param_dtype) == "float32"
    ):
        advice.append(
            "--config.finetune.frozen_dtype=bfloat16: halves the bytes of the frozen weights"
        )
    if state < hbm_bytes:
        smallest = num_devices // config.mesh.tensor
        accumulation = train.gradient_accumulation * 2
        if train.micro_batch_size >= 2 * smallest and train.batch_size % accumulation == 0:
            advice.append(
                f"--config.train.gradient_accumulation={accumulation}: halves the micro-batch"
            )
        if config.model.remat != "full":
            advice.append("--config.model.remat=full: keeps only the input of each layer")
    if config.mesh.data and config.mesh.data > 1:
        fsdp = config.mesh.fsdp * config.mesh.data
        advice.append(
            f"--config.mesh.data=1 --config.mesh.fsdp={fsdp}: shards weights and optimizer over "
            "all devices"
        )
    needed = math.ceil(num_devices * memory.peak / hbm_bytes)
    advice.append(
        f"a larger topology with a larger mesh.fsdp: {needed:,} devices have room for these bytes"
    )
    return advice


def _hardware_flops(step: CompiledStep, target: Target, routed_rows: int) -> int:
    """FLOPs of all devices, counted in the compiled program.

    They are counted in the traced step instead if the program is for another chip, or if it has
    loops whose length depends on the data.
    """
    flops = None if target.is_estimate else count_program_flops(step.program, routed_rows)
    if flops is None:
        return count_traced_flops(trace_grouped(step.config, target), routed_rows)
    pallas = count_traced_flops(step.traced, routed_rows, only_pallas=True)
    return flops * target.topology.num_devices + pallas


def _coordinates(step: CompiledStep, target: Target) -> np.ndarray:
    """The coordinates of the devices in the order of the mesh, [devices, dimensions]."""
    devices, shape = step.mesh.devices.flat, target.topology.shape
    if target.platform == "tpu":
        return np.array([device.coords[: len(shape)] for device in devices])
    return np.stack(np.unravel_index([device.id for device in devices], shape), axis=-1)
