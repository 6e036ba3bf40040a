"""Which order a training step draws: the kinds, their phases, and mixtures of them."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import typed
from armd_jax.core import curriculum, order
from armd_jax.names import OrderKind
from armd_jax.order_config import OrderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed)


def test_curriculum():
    """k = 0 until i_AR, 1 there, rising linearly to rho at i_perm, and rho for ever."""
    config = OrderConfig(ar_steps=100, permute_steps=300, max_permuted=9)
    steps = {0: 0, 99: 0, 100: 1, 125: 2, 200: 5, 275: 8, 300: 9, 301: 9, 10**6: 9}
    assert {step: int(curriculum.num_permuted(config, step)) for step in steps} == steps
    ks = [int(k) for k in jax.jit(jax.vmap(lambda s: curriculum.num_permuted(config, s)))(jnp.arange(400))]
    assert ks == sorted(ks) and set(ks) == set(range(10))
    paper = OrderConfig()
    assert [int(curriculum.num_permuted(paper, s)) for s in (8_999, 9_000, 48_000)] == [0, 1, 32]
    at_once = OrderConfig(ar_steps=0, permute_steps=0, max_permuted=5)
    assert int(curriculum.num_permuted(at_once, 1)) == 5


def _steps(config: OrderConfig, num_steps: int, batch: int = 4, length: int = 8):
    """(step) -> the order of a training step, compiled once."""
    run = jax.jit(
        lambda step: curriculum.draw(config, jax.random.fold_in(_key(0), step), step, num_steps, batch, length)
    )
    return lambda step: jax.tree.map(np.asarray, run(jnp.asarray(step)))


@pytest.mark.parametrize("kind", typed.choices(OrderKind))
def test_curriculum_draws_the_kind(kind):
    """Each kind gives its orders inside jit, the same for the same step, others at other steps."""
    config = OrderConfig(
        kind=kind, ar_steps=3, permute_steps=6, max_permuted=8, diffusion_steps=4, weight="simple", streams=(1, 2, 4)
    )
    run = _steps(config, num_steps=100)
    drawn = [run(step) for step in range(20)]
    for a, b in zip(jax.tree.leaves(drawn), jax.tree.leaves([run(step) for step in range(20)]), strict=True):
        np.testing.assert_array_equal(a, b)
    for one in drawn:
        np.testing.assert_array_equal(np.sort(one.positions_BN, axis=1), np.tile(np.arange(8), (4, 1)))
    different = len({one.positions_BN.tobytes() + one.block_BN.tobytes() for one in drawn})
    natural = np.tile(np.arange(8), (4, 1))
    if kind == "left_to_right":
        assert different == 1 and np.all(drawn[0].positions_BN == natural)
    elif kind == "progressive":
        assert all(np.all(one.positions_BN == natural) for one in drawn[:4])  # k = 0, and k = 1 at the fourth
        assert different == 17 and np.all(drawn[-1].block_BN[0] == np.arange(1, 9))
    elif kind == "strided":
        expected = {order.strided(4, 8, s).positions_BN.tobytes() for s in (2, 4)} | {natural.tobytes()}
        found = {one.positions_BN.astype(natural.dtype).tobytes() for one in drawn}
        assert different == 3 and natural.tobytes() in found and len(expected) == len(found) == 3
    else:
        assert different == 20
        assert np.all(np.diff(drawn[0].block_BN) == 1) == (kind == "uniform")
        assert np.all(drawn[0].weight_BN == 1) == (kind != "masked_diffusion")  # weight="simple" is not all ones
        assert np.all(drawn[0].positions_BN == natural) == (kind == "contiguous")


def test_last_steps_are_strided():
    """The SBP phase is the last `sbp_steps` steps, with S drawn anew each step from `streams`."""
    run = _steps(OrderConfig(kind="uniform", streams=(2, 4), sbp_steps=30), num_steps=50)
    strided = {streams: np.asarray(order.strided(4, 8, streams).block_BN) for streams in (2, 4)}
    seen = collections.Counter()
    for step in range(50):
        blocks = run(step).block_BN
        match = [streams for streams, expected in strided.items() if np.array_equal(blocks, expected)]
        assert bool(match) == (step >= 20), step
        seen.update(match)
    assert min(seen[2], seen[4]) >= 5


def test_kinds_of_steps_are_those_that_are_drawn():
    """A kind is a phase before the SBP phase, or the number of streams that `draw` draws with the same key."""
    progressive = OrderConfig(ar_steps=4, permute_steps=8, max_permuted=2, streams=(2, 4), sbp_steps=30)
    for config, num_phases in (
        (progressive, 3),
        (dataclasses.replace(progressive, kind="uniform"), 1),
        (dataclasses.replace(progressive, sbp_steps=0), 3),
        (dataclasses.replace(progressive, kind="strided"), 0),
    ):
        run = _steps(config, num_steps=50)
        strided = [np.asarray(order.strided(4, 8, streams).block_BN) for streams in config.streams]
        kinds = jax.jit(lambda step, c=config: curriculum.kind_of_step(c, jax.random.fold_in(_key(0), step), step, 50))
        seen = collections.Counter()
        for step in range(50):
            blocks, kind = run(step).block_BN, int(kinds(jnp.asarray(step)))
            match = [num_phases + n for n, expected in enumerate(strided) if np.array_equal(blocks, expected)]
            before = [0 if num_phases == 1 else int(step >= 4) + int(step >= 8)]
            assert [kind] == (match or before), step
            seen[kind] += 1
        assert set(seen) == set(range(curriculum.num_kinds(config)))


# --- mixtures -------------------------------------------------------------------------------------------------------

MIX = OrderConfig(ar_steps=4, permute_steps=8, max_permuted=8, streams=(2, 4), sbp_steps=30, diffusion_steps=4)
MIX = dataclasses.replace(MIX, mix=("contiguous:0.25", "uniform:0.1", "strided:0.15"))
PROGRESSIVE, CONTIGUOUS, UNIFORM, STRIDED = range(4)  # as `part_of_step` numbers them


def _assert_same(one: order.Order, other: order.Order) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def _parts(config: OrderConfig, num_steps: int) -> np.ndarray:
    """Which kind of the mix each step draws."""
    part = lambda step: curriculum.part_of_step(config, jax.random.fold_in(_key(0), step))  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(part))(jnp.arange(num_steps)))


def test_without_a_mix_orders_are_those_of_their_keys():
    """The first half of a step's key draws the order and the second the number of streams, now and in older runs."""
    config = dataclasses.replace(MIX, mix=())
    run, progressive = _steps(config, num_steps=50), jax.jit(lambda *a: order.progressive(a[0], 4, 8, a[1], "scatter"))
    for step in range(50):
        order_key, streams_key = jax.random.split(jax.random.fold_in(_key(0), step))
        if step >= 20:
            expected = order.strided(4, 8, int(jax.random.choice(streams_key, jnp.asarray([2, 4]))))
        else:
            expected = progressive(order_key, 0 if step < 4 else 1 + round(min((step - 4) / 4, 1) * 7))
        _assert_same(run(step), expected)


def test_a_step_of_a_mix_draws_the_order_of_its_kind():
    """Each step draws the order that it would draw if there were no other kind: so do those of the main kind."""
    alone = [
        _steps(dataclasses.replace(MIX, kind=kind, mix=(), sbp_steps=MIX.sbp_steps * (number == 0)), num_steps=50)
        for number, kind in enumerate(("progressive", "contiguous", "uniform", "strided"))
    ]
    run, parts = _steps(MIX, num_steps=50), _parts(MIX, 50)
    for step, part in enumerate(parts):
        _assert_same(run(step), alone[part](step))
    assert set(parts[:20]) == set(parts[20:]) == {PROGRESSIVE, CONTIGUOUS, UNIFORM, STRIDED}  # the SBP phase, too


def test_shares_of_a_mix():
    """Of 20,000 steps, each kind has its share within five sigma, whatever the step and its neighbours are."""
    parts = _parts(MIX, 20_000)
    for steps in (parts, parts[:5000], parts[::2], parts[1:][parts[:-1] == CONTIGUOUS]):
        for part, share in ((PROGRESSIVE, 0.5), (CONTIGUOUS, 0.25), (UNIFORM, 0.1), (STRIDED, 0.15)):
            assert abs(np.mean(steps == part) - share) < 5 * (share * (1 - share) / len(steps)) ** 0.5, part


def test_the_kind_that_is_chosen_says_nothing_about_the_order():
    """Kind and order are drawn with different random numbers: the first token is anywhere, within five sigma."""
    config = OrderConfig(kind="left_to_right", mix=("uniform:0.5",))
    run, parts = _steps(config, num_steps=2000, batch=1), _parts(config, 2000)
    places = [int(np.argmin(run(step).positions_BN[0])) for step in np.flatnonzero(parts)]
    assert abs(np.mean(places) - 3.5) < 5 * np.sqrt(63 / 12 / len(places))


def test_kinds_of_steps_tell_the_kinds_of_a_mix_apart():
    """Each kind of order has numbers of its own: one for every phase, or for every number of streams."""
    assert curriculum.num_kinds(dataclasses.replace(MIX, mix=())) == 3 + 2
    assert curriculum.num_kinds(MIX) == (3 + 2) + 1 + 1 + 2
    run, parts = _steps(MIX, num_steps=200), _parts(MIX, 200)
    kinds = jax.jit(lambda step: curriculum.kind_of_step(MIX, jax.random.fold_in(_key(0), step), step, 200))
    seen = set()
    for step, part in enumerate(parts):
        drawn = run(step)
        wide = int(np.array_equal(drawn.block_BN, order.strided(4, 8, 4).block_BN))  # four streams, else two
        phase = int(step >= 4) + int(step >= 8)
        expected = {
            PROGRESSIVE: 3 + wide if step >= 170 else phase, CONTIGUOUS: 5, UNIFORM: 6, STRIDED: 7 + wide
        }[int(part)]  # fmt: skip
        kind = kinds(jnp.asarray(step))
        assert kind.dtype == jnp.int32 and int(kind) == expected, step
        seen.add(expected)
    assert seen == set(range(9))


def test_a_mix_in_words_and_phases():
    """A mix is told with its shares, and leaves the phases, the shuffled tokens and the bound to the main kind."""
    assert curriculum.describe(MIX) == (
        "progressive, 8 tokens shuffled, mixed with contiguous blocks of up to 4 tokens (25% of steps) and uniform"
        " (10% of steps) and strided, S from 2, 4 (15% of steps)"
    )
    plain = dataclasses.replace(MIX, mix=())
    assert curriculum.describe(plain) == "progressive, 8 tokens shuffled"
    assert curriculum.phases(MIX, 50) == curriculum.phases(plain, 50)
    assert [phase.name for phase in curriculum.phases(MIX, 50)] == ["identity", "rising", "constant", "SBP"]
    np.testing.assert_array_equal(
        curriculum.shuffled_tokens(MIX, jnp.arange(50)), curriculum.shuffled_tokens(plain, jnp.arange(50))
    )
    assert curriculum.bounding_order(MIX) is None
    blocks = OrderConfig(kind="masked_diffusion", mix=("contiguous:0.5",))
    assert curriculum.bounding_order(blocks) is not None
    swapped = OrderConfig(kind="contiguous", mix=("masked_diffusion:0.5",))
    assert curriculum.bounding_order(swapped) is None and curriculum.shuffled_tokens(swapped, 3) is None
