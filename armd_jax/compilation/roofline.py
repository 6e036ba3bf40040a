"""How long a program takes at least: the time that each resource of a chip is busy, and which of them limits the step.

    compute        executed FLOPs / peak bfloat16 FLOP/s
    memory         bytes read and written in HBM / HBM bandwidth
    interconnect   bytes sent to chips of the same slice / bandwidth of the chip's links
    network        bytes sent to other slices / the chip's share of the host's network

Each resource is assumed to work at its published peak, and all of them at the same time, so the longest of the four
times is the predicted step time: a bound that says what to improve, not a measurement.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, assert_never

from armd_jax import typed
from armd_jax.compilation.collectives import Collective
from armd_jax.compilation.topology import Chip

Resource = Literal["compute", "memory", "interconnect", "network"]
SplashKernel = Literal["fwd", "dq", "dkv"]  # the forward pass, and the gradients of queries and of keys and values
_RESOURCES: tuple[Any, ...] = typed.choices(Resource)
_KERNELS: tuple[Any, ...] = typed.choices(SplashKernel)


@dataclasses.dataclass(frozen=True)
class RooflineSeconds:
    """Seconds per step for which each resource of one chip is busy."""

    compute: float
    memory: float
    interconnect: float
    network: float

    def of(self, resource: Resource) -> float:
        """The seconds of one resource."""
        match resource:
            case "compute":
                return self.compute
            case "memory":
                return self.memory
            case "interconnect":
                return self.interconnect
            case "network":
                return self.network
            case _:
                assert_never(resource)

    @property
    def limiting_term(self) -> Resource:
        """The resource that is busy longest."""
        return max(_RESOURCES, key=self.of)

    @property
    def step(self) -> float:
        """Seconds per step if all resources work at the same time: those of the limiting one."""
        return self.of(self.limiting_term)

    def mfu(self, model_flops_per_chip: float, chip: Chip) -> float:
        """Model FLOPs utilisation: the share of the chip's peak that the mathematics alone would use in this time."""
        return model_flops_per_chip / (chip.flops * self.step)


def seconds(chip: Chip, flops: float, hbm_bytes: float, collectives: Sequence[Collective]) -> RooflineSeconds:
    """The times of one chip that executes `flops`, moves `hbm_bytes` and sends what the collectives ask for."""
    return RooflineSeconds(
        compute=flops / chip.flops,
        memory=hbm_bytes / chip.hbm_bandwidth,
        interconnect=sum(c.sent_bytes for c in collectives if not c.crosses_slices) / chip.ici_bandwidth,
        network=sum(c.sent_bytes for c in collectives if c.crosses_slices) / chip.dcn_bandwidth,
    )


def kernel_flops(kernels: dict[str, float], forward_flops: float) -> float:
    """FLOPs that the attention kernels execute.

    kernels: number of runs by name. forward_flops: those of one forward pass of the kernels in all layers.

    Every layer runs its dq kernel once per step. Forward runs divided by dq runs is therefore how often the forward
    pass is done: twice if it is recomputed. Without a backward pass it is done once.
    """
    runs: dict[SplashKernel, float] = {
        kernel: sum(count for name, count in kernels.items() if kernel in name) for kernel in _KERNELS
    }
    if not runs["fwd"]:
        return 0.0
    layers = runs["dq"] or runs["fwd"]
    products = sum(_products(kernel) * count / layers for kernel, count in runs.items())
    return forward_flops / _products("fwd") * products


def _products(kernel: SplashKernel) -> int:
    """Matrix products that a kernel computes over its pairs of query and key."""
    match kernel:
        case "fwd":
            return 2  # scores, values
        case "dq":
            return 3  # scores, dP, dQ
        case "dkv":
            return 4  # scores, dP, dV, dK
        case _:
            assert_never(kernel)
