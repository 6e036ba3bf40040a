"""TPU topologies by name, and what one of their chips can do.

Chip figures are Google's published ones (Cloud TPU documentation, cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, section
"System architecture"): peak bfloat16 FLOP/s (`core.peaks`), memory and its bandwidth, and the bandwidth of all of the
chip's inter-chip links together, in one direction (the tables give both directions, or bits). Between slices a chip has
its share of the host's network cards: v5e has 2 x 100 Gbit/s for 8 chips, v6e 4 x 200 for 8, v4 and v5p 200 for 4.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from armd_jax.core.peaks import TPU_FLOPS
from armd_jax.errors import UserError, nearest

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, in bytes, FLOP/s (bfloat16) and bytes per second."""

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float  # to its neighbours in the slice, one direction
    dcn_bandwidth: float  # to other slices: the chip's share of the host's network
    shapes: tuple[str, ...]  # shapes of the slices on offer, small to large


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
CHIPS = {
    "v4": Chip(32 * GIB, TPU_FLOPS["v4"], 1228e9, 300e9, 6.25e9, _CUBES),
    "v5e": Chip(16 * GIB, TPU_FLOPS["v5e"], 819e9, 200e9, 3.125e9, _FLAT),
    "v5p": Chip(95 * GIB, TPU_FLOPS["v5p"], 2765e9, 600e9, 6.25e9, _CUBES),
    "v6e": Chip(32 * GIB, TPU_FLOPS["v6e"], 1638e9, 400e9, 12.5e9, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of one shape, such as v5e:4x4."""

    chip_name: str
    shape: str
    slices: int = 1

    @property
    def name(self) -> str:
        """Chip and shape of one slice."""
        return f"{self.chip_name}:{self.shape}"

    @property
    def chip(self) -> Chip:
        """What each of the chips can do."""
        return CHIPS[self.chip_name]

    @property
    def chips(self) -> int:
        """Number of chips in all slices together."""
        return self.slices * math.prod(int(size) for size in self.shape.split("x"))

    def larger(self) -> "list[Topology]":
        """The same number of slices with more chips per slice, for every shape on offer, small to large."""
        others = [dataclasses.replace(self, shape=shape) for shape in self.chip.shapes]
        return [other for other in others if other.chips > self.chips]


def parse(name: str, slices: int = 1) -> Topology:
    """Reads a name such as `v5e:4x4`. Raises UserError if the chip, the shape or the number of slices is impossible."""
    chip, colon, shape = name.partition(":")
    if chip not in CHIPS:
        raise UserError(f"--topology={name}: chip {chip!r} is not known{nearest(chip, list(CHIPS))}")
    axes = CHIPS[chip].shapes[0].count("x") + 1
    example = f"{chip}:{CHIPS[chip].shapes[3]}"
    if not colon or not re.fullmatch("x".join([r"[1-9]\d*"] * axes), shape):
        raise UserError(f"--topology={name}: expected {axes} sizes after the chip, such as {example}")
    if slices < 1:
        raise UserError(f"--slices={slices}: must be at least 1")
    return Topology(chip, shape, slices)


def prepare_environment() -> None:
    """Tells JAX and libtpu that there is no TPU to look for.

    Must be called before JAX is imported. Environment variables that are set already keep their values.
    """
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock between two compiling processes
        "TPU_LOG_DIR": "disabled",
    }.items():
        os.environ.setdefault(name, value)


def devices(topology: Topology) -> "Sequence[jax.Device]":
    """Devices that can only be compiled for, one per chip.

    Raises UserError if libtpu is missing or knows no such topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip_name == "v4":  # the two cores of a chip as one device
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except ModuleNotFoundError as error:
        raise UserError("compiling for TPU needs libtpu: pip install libtpu") from error
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "libtpu" in reason and "not" in reason and "found" in reason:
            raise UserError(f"compiling for TPU needs libtpu: pip install libtpu ({reason[:200]})") from error
        raise UserError(f"--topology={topology.name}: no such slice ({reason[:200]})") from error
    return found
