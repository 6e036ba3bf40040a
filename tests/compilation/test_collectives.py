"""Collectives of a program that is small enough to count by hand: bytes, groups of devices, bytes that are sent."""

import pytest

from armd_jax import typed
from armd_jax.compilation import collectives
from armd_jax.compilation.collectives import Collective
from armd_jax.compilation.hlo import CollectiveKind, Program


def test_collectives(program):
    """Kind, bytes, group and runs of each; an asynchronous one counts once, a fused sum and slice is a scatter."""
    found = {(c.kind, c.bytes, c.group, c.runs) for c in collectives.find(program, 4)}
    assert found == {
        ("all-gather", 32 * 128 * 2, 4, 12),
        ("all-gather", 64 * 4, 4, 1),
        ("all-reduce", 64 * 4, 2, 1),
        ("reduce-scatter", 64 * 4, 2, 1),
    }
    # In slices of two devices, the groups {0, 2} and {0, 1, 2, 3} reach across. In slices of four, none does.
    assert all(c.crosses_slices for c in collectives.find(program, 2))
    assert not any(c.crosses_slices for c in collectives.find(program, 4))


@pytest.mark.parametrize(
    ("groups", "crosses"),
    [
        ("{{0,1},{2,3}}", False),
        ("[2,2]<=[4]", False),
        ("[2,2]<=[2,2]T(1,0)", True),
        ("mesh['a'=2,'b'=2] {'b'}", False),
        ("mesh['a'=2,'b'=2] {'a'}", True),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", False),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", True),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a'}", False),
        ("mesh['a'=4] {'a':(1)2}", True),
        ("mesh['a'=4] {'a':(2)2}", False),
    ],
)
def test_groups_of_devices(program_text, groups, crosses):
    """Every way of writing that two devices of four work together, in one slice of two or across both."""
    text = program_text.replace("channel_id=9, replica_groups=[2,2]<=[2,2]T(1,0)", f"replica_groups={groups}")
    total = next(c for c in collectives.find(Program(text), 2) if c.computation == "main")
    assert (total.group, total.crosses_slices) == (2, crosses)


def test_sent_bytes():
    """Ring algorithms: a gather sends all parts but its own, an all-reduce twice that, a permutation everything."""
    sent = {kind: Collective(kind, 400, 4, False, 1).sent_bytes for kind in typed.choices(CollectiveKind)}
    assert sent == {
        "all-gather": 300,
        "all-reduce": 600,
        "reduce-scatter": 300,
        "all-to-all": 300,
        "collective-permute": 400,
        "send": 400,
    }
    assert Collective("all-gather", 400, 4, False, 3).sent_bytes == 3 * 300
