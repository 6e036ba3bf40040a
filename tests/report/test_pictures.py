"""The pictures of a report: every kind of order is in them, colours differ, and settings stay the caller's."""

import dataclasses
import inspect

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from armd_jax import typed
from armd_jax.config import Config, ModelConfig, TrainingConfig
from armd_jax.core import curriculum
from armd_jax.names import OrderKind
from armd_jax.order_config import OrderConfig
from armd_jax.report import bars, loss_curve, masks, order_schedule, phases, sample_text, style

KINDS = typed.choices(OrderKind)


def _config(**order) -> Config:
    schedule = dict(ar_steps=10, permute_steps=25, max_permuted=4, streams=(1, 4), sbp_steps=10) | order
    return Config(
        model=ModelConfig(max_length=16),
        order=OrderConfig(**schedule),
        training=TrainingConfig(num_steps=40, batch_size=2),
    )


def _phases(**order) -> list[tuple[str, int, int]]:
    config = _config(**order)
    found = curriculum.phases(config.order, config.training.num_steps)
    return [(phase.name, phase.first, phase.end) for phase in found]


def test_phases_share_out_the_steps():
    """Every step belongs to one phase, and phases without steps are left out."""
    assert _phases() == [("identity", 0, 10), ("rising", 10, 25), ("constant", 25, 30), ("SBP", 30, 40)]
    assert _phases(ar_steps=0, permute_steps=100) == [("rising", 0, 30), ("SBP", 30, 40)]
    assert _phases(kind="uniform", sbp_steps=0) == [("uniform", 0, 40)]
    assert _phases(kind="strided") == [("strided", 0, 40)]
    assert {name for name, _, _ in _phases()} == set(phases.COLORS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sbp_steps", [0, 10])
def test_every_order_kind_has_its_schedule(kind, sbp_steps):
    """Whatever orders a run trains with, their schedule can be drawn, with and without strided orders at the end."""
    assert order_schedule.picture(_config(kind=kind, sbp_steps=sbp_steps)).startswith(b"\x89PNG")


def test_shuffled_tokens_are_those_of_the_curriculum():
    """Schedules with a number of shuffled tokens give it for every step, and others give none."""
    steps = jnp.arange(30)
    for kind in KINDS:
        config = _config(kind=kind).order
        found = curriculum.shuffled_tokens(config, steps)
        if found is not None:
            np.testing.assert_array_equal(found, curriculum.num_permuted(config, steps))
    assert curriculum.shuffled_tokens(_config(kind="progressive").order, steps) is not None
    assert curriculum.shuffled_tokens(_config(kind="uniform").order, steps) is None


@pytest.mark.parametrize("kind", KINDS)
def test_examples_of_a_schedule_are_drawn_by_training_and_differ(kind):
    """In every phase there is an example at a step of that phase, and no order is shown twice there."""
    config = _config(kind=kind)
    found = curriculum.phases(config.order, config.training.num_steps)
    examples = order_schedule._examples(config, found)
    assert [one.step for one in examples] == sorted({one.step for one in examples})
    assert {one.phase for one in examples} == {phase.name for phase in found}
    assert len(examples) <= 6
    for phase in found:
        orders = [one.positions.tobytes() + one.blocks.tobytes() for one in examples if one.phase == phase.name]
        assert len(set(orders)) == len(orders)
        assert all(phase.first <= one.step < phase.end for one in examples if one.phase == phase.name)


def test_examples_of_a_mix_show_every_kind():
    """Kinds that are mixed in have an example each under their own names, and phases show orders of the main kind."""
    config = _config(ar_steps=20, permute_steps=60, sbp_steps=40, mix=("contiguous:0.3", "strided:0.3"))
    config = dataclasses.replace(config, training=TrainingConfig(num_steps=160, batch_size=2))
    examples = order_schedule._examples(config, curriculum.phases(config.order, 160))
    assert [one.step for one in examples] == sorted({one.step for one in examples})
    assert {one.phase for one in examples} == {"identity", "rising", "constant", "SBP", "contiguous", "strided"}
    for one in examples:
        natural, single = np.array_equal(one.positions, np.arange(16)), one.num_blocks == 16
        if one.phase in ("identity", "contiguous"):
            assert natural and single == (one.phase == "identity")
        elif one.phase in ("rising", "constant"):
            assert single and one.step < 120
    assert order_schedule.picture(config).startswith(b"\x89PNG")


@pytest.mark.slow
def test_masks_show_every_order_kind():
    """Each kind of order has its example under the curriculum's own words for it, and evidence has one as well."""
    examples = masks.examples()
    assert len({title for title, _ in examples}) == len(examples) == len(KINDS) + 1
    for kind, (title, order) in zip(KINDS, examples, strict=False):
        assert title == curriculum.describe(typed.build(OrderConfig, {"kind": kind, **masks._SMALL}))
        assert sorted(order.positions_BN[0].tolist()) == list(range(8))
    titles = dict(examples)
    assert set(titles["strided, S = 2"].block_BN[0].tolist()) == {1, 2, 3, 4, 5}
    moved = titles["progressive, 4 tokens shuffled"].positions_BN[0] != np.arange(8)
    assert int(moved.sum()) == 4
    assert len(set(np.bincount(titles["diffusion blocks, 4 time steps"].block_BN[0])[1:].tolist())) > 1
    assert examples[-1][0].startswith("evidence") and examples[-1][1].positions_BN[0, :2].tolist() == [2, 5]


def test_an_odd_number_of_masks_can_be_drawn(monkeypatch):
    """A new kind of order needs no change of the picture."""
    three = masks.examples()[:3]
    monkeypatch.setattr(masks, "examples", lambda: three)
    assert masks.picture().startswith(b"\x89PNG")


def test_colours_are_readable_and_distinct_for_many_calls():
    """128 calls have 128 colours from dark to light, none of them the grey of a prompt, with ink that can be read."""
    colors = [style.call_color(call, 128) for call in range(129)]
    assert len(set(colors)) == 129
    assert style.ink_on(colors[1]) == "#ffffff" and style.ink_on(colors[128]) == "#000000"
    assert style.call_color(1, 1) == colors[1]


def test_settings_of_matplotlib_stay_as_they_were():
    """A picture has its own settings, and the caller's are untouched."""
    before = dict(matplotlib.rcParams)
    loss_curve.picture([{"step": 1, "train/nll": 3.0, "train/learning_rate": 1e-3}], ())
    assert dict(matplotlib.rcParams) == before


def test_pictures_keep_their_signatures():
    """What is wrapped still says which arguments it takes."""
    for picture in (bars.likelihoods, bars.speed, loss_curve.picture, sample_text.picture, order_schedule.picture):
        assert picture.__doc__ and list(inspect.signature(picture).parameters)[0] in ("rows", "drawn", "config")
