"""Names of TPU slices."""

import pytest

from armd_jax.compilation import topology
from armd_jax.core import peaks
from armd_jax.errors import UserError


def test_names():
    """Chips and slices multiply; larger shapes are listed from small to large."""
    assert topology.parse("v5e:4x4").chips == 16
    assert topology.parse("v5e:16x16", slices=2).chips == 512
    assert topology.parse("v5p:8x8x8").chips == 512
    larger = [other.shape for other in topology.parse("v5e:4x4").larger()]
    assert larger == ["4x8", "8x8", "8x16", "16x16"]


@pytest.mark.parametrize(
    ("name", "slices", "says"),
    [
        ("v5x:4x4", 1, "did you mean 'v5"),
        ("v5e", 1, "expected 2 sizes"),
        ("v5e:4x4x4", 1, "expected 2 sizes"),
        ("v5p:4x4", 1, "expected 3 sizes"),
        ("v5e:0x4", 1, "expected 2 sizes"),
        ("v5e:4x4", 0, "--slices=0"),
    ],
)
def test_mistakes_are_named(name, slices, says):
    """A wrong name is an error of one line that says what is wrong."""
    with pytest.raises(UserError, match=says):
        topology.parse(name, slices)


def test_devices_of_a_slice_are_described():
    """libtpu knows the slices, with one device per chip, and refuses shapes that do not exist."""
    topology.prepare_environment()
    assert len(topology.devices(topology.parse("v5e:2x2"))) == 4
    two = topology.devices(topology.parse("v5e:2x2", slices=2))
    assert [device.slice_index for device in two] == [0] * 4 + [1] * 4
    assert len(topology.devices(topology.parse("v4:2x2x1"))) == 4
    with pytest.raises(UserError, match="v5e:3x3"):
        topology.devices(topology.parse("v5e:3x3"))


def test_names_of_compiled_chips_are_known():
    """The devices that `armd compile` compiles for have names that training knows, with the same peak."""
    topology.prepare_environment()
    for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
        where = topology.parse(name)
        kind = topology.devices(where)[0].device_kind
        assert peaks.peak_flops(kind) == where.chip.flops, (name, kind)
