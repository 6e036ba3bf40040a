"""How long a program takes at least: compute, memory and interconnect time of one chip, and which of them limits.

    compute        executed FLOPs / peak bfloat16 FLOP/s
    memory         bytes read and written in HBM / HBM bandwidth
    interconnect   bytes sent to chips of the same slice / bandwidth of the chip's links
    network        bytes sent to other slices / the chip's share of the host's network

Each resource is taken at its published peak and all are taken to work at the same time, so the largest of the four is
the predicted step time: a bound that says what to improve, not a measurement.
"""

import dataclasses
from collections.abc import Sequence

from armd_jax.compilation.hlo import Collective
from armd_jax.compilation.topology import Chip

# Matrix products over the visible pairs that each splash kernel does: scores and values; scores, dP, dQ; scores, dP,
# dV, dK.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds a step, by resource."""

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def limiting_term(self) -> str:
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

    @property
    def step(self) -> float:
        """All at once: the longest."""
        return max(dataclasses.astuple(self))

    def mfu(self, model_flops_a_chip: float, chip: Chip) -> float:
        """The share of the chip's peak that goes into the mathematics, were a step to take this long."""
        return model_flops_a_chip / (chip.flops * self.step)


def times(chip: Chip, flops: float, hbm_bytes: float, collectives: Sequence[Collective]) -> Times:
    """Times of one chip that executes `flops`, moves `hbm_bytes` and sends what the collectives ask for."""
    return Times(
        compute=flops / chip.flops,
        memory=hbm_bytes / chip.hbm_bandwidth,
        interconnect=sum(c.sent_bytes for c in collectives if not c.crosses_slices) / chip.ici_bandwidth,
        network=sum(c.sent_bytes for c in collectives if c.crosses_slices) / chip.dcn_bandwidth,
    )


def kernel_flops(kernels: dict[str, int], forward_flops: float) -> float:
    """FLOPs that the attention kernels execute, where one forward pass through all layers costs `forward_flops`.

    kernels: runs by name. Every layer runs its dq kernel once a step, so forward runs over dq runs says how often the
    forward pass is done (twice where it is recomputed); without a backward pass it is done once.
    """
    runs = {kind: sum(n for name, n in kernels.items() if kind in name) for kind in _PRODUCTS}
    if not runs["fwd"]:
        return 0.0
    layers = runs["dq"] or runs["fwd"]
    return forward_flops / _PRODUCTS["fwd"] * sum(_PRODUCTS[kind] * count / layers for kind, count in runs.items())
