"""The optimizers: what Muon does to each matrix and what it leaves to Adam, rates of token vectors, memory, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from armd_jax import config as configs
from armd_jax import names, typed
from armd_jax.config import Config, OptimizerConfig, TrainingConfig
from armd_jax.core import axes, parameters
from armd_jax.training import optimizer, sharding, state

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = configs.ModelConfig(vocab_size=5, max_length=4, num_layers=4, two_stream_layers=2, width=16, num_heads=2)
MODEL = dataclasses.replace(MODEL, mlp="swiglu", mlp_width=32, positional_width=4, neighbours="both", qk_norm=True)
MUON = OptimizerConfig(kind="muon", learning_rate=0.5, schedule="constant", warmup_steps=0, clip_norm=0.0)


def _gradients(model: configs.ModelConfig = MODEL) -> parameters.Params:
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), model))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)


def _update(config: OptimizerConfig, params: parameters.Params, grads: parameters.Params) -> parameters.Params:
    tx = optimizer.make(Config(optimizer=config))
    return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)


def _matrices(name: str, leaf: np.ndarray) -> list[np.ndarray]:
    """The matrices [inputs, outputs] in a parameter of the layers, one for each layer, keys apart from values."""
    inputs = {"attention_out": 2}.get(name, 1)
    rank = {"query": 3, "key_value": 4, "attention_out": 3}.get(name, 2)
    layers = leaf.reshape(-1, *leaf.shape[leaf.ndim - rank :])
    if name == "key_value":
        layers = np.concatenate([layers[:, :, 0], layers[:, :, 1]])
    return [layer.reshape(int(np.prod(layer.shape[:inputs])), -1) for layer in layers]


@pytest.mark.slow
def test_muon_orthogonalises_every_matrix_of_the_layers():
    """Each is what `optax.contrib.muon` makes of it alone, nearly orthogonal and of RMS 0.2; the rest is Adam's."""
    grads = _gradients()
    params = jax.tree.map(jnp.zeros_like, grads)
    updates, adams = (_update(dataclasses.replace(MUON, kind=kind), params, grads) for kind in ("muon", "adamw"))
    alone = optax.contrib.muon(MUON.learning_rate, ns_steps=4, preconditioning="aol", consistent_rms=0.2)
    seen = set()
    for (path, update), grad, adam in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(grads), jax.tree.leaves(adams), strict=True
    ):
        name = path[-1].key
        if name not in axes.PARAMETERS or name in ("embedding", "head"):
            np.testing.assert_allclose(update, adam, rtol=1e-6)
            continue
        seen.add(name)
        for found, matrix in zip(_matrices(name, np.asarray(update)), _matrices(name, np.asarray(grad)), strict=True):
            given = {"w": jnp.asarray(matrix)}
            expected = alone.update(given, alone.init(given), jax.tree.map(jnp.zeros_like, given))[0]["w"]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
            singular = np.linalg.svd(found, compute_uv=False) / (0.2 * MUON.learning_rate * max(matrix.shape) ** 0.5)
            assert 0.6 < np.median(singular) < 1.3 and singular.max() < 1.4  # four iterations leave that
    assert seen == set(axes.PARAMETERS) - {"embedding", "head"}


@pytest.mark.slow
def test_muon_decays_what_adamw_decays():
    """With zero gradients, matrices that multiply activations shrink by rate times weight decay; nothing else moves."""
    untied = dataclasses.replace(MODEL, tie_embeddings=False)
    params = jax.tree.map(jnp.ones_like, _gradients(untied))
    updates = _update(dataclasses.replace(MUON, weight_decay=0.25), params, jax.tree.map(jnp.zeros_like, params))
    moved = {}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert np.ptp(update) == 0
        moved[path[-1].key] = float(update.ravel()[0])
    assert {name for name, value in moved.items() if value} == set(optimizer.DECAYED)
    assert set(moved.values()) == {0.0, -0.125}


def test_muon_keeps_one_moment_of_the_matrices():
    """Adam's state has two numbers per weight; Muon's has one per weight of a matrix, laid on the mesh alike."""
    config = Config(model=MODEL, optimizer=dataclasses.replace(MUON, ema_decay=0.0))
    mesh = sharding.make_mesh(config.mesh)
    sizes = {}
    for kind in ("adamw", "muon"):
        of_kind = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind=kind))
        abstract = jax.eval_shape(lambda of_kind=of_kind: state.create(of_kind, mesh))
        sizes[kind] = sum(leaf.size for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim)
        assert jax.tree.structure(state.shardings(of_kind, mesh).opt_state) == jax.tree.structure(abstract.opt_state)
    matrices = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)
        if path[-1].key in optimizer.MUON_AXES
    )
    coefficients = 3
    assert sizes["adamw"] - sizes["muon"] == matrices - coefficients


def test_vectors_of_tokens_have_a_rate_of_their_own():
    """With `embedding_rate` 4 they move four times as far, and nothing else moves otherwise; of either kind."""
    grads = _gradients()
    params = jax.tree.map(jnp.ones_like, grads)
    for kind in typed.choices(names.OptimizerKind):
        config = dataclasses.replace(MUON, kind=kind, weight_decay=0.1, clip_norm=1.0)
        usual = _update(config, params, grads)
        faster = _update(dataclasses.replace(config, embedding_rate=4.0), params, grads)
        seen = set()
        for (path, found), before in zip(
            jax.tree_util.tree_leaves_with_path(faster), jax.tree.leaves(usual), strict=True
        ):
            of_tokens = path[-1].key in optimizer.TOKEN_VECTORS
            seen |= {path[-1].key} if of_tokens else set()
            np.testing.assert_allclose(found, 4 * before if of_tokens else before, rtol=1e-6)
        assert seen == optimizer.TOKEN_VECTORS


@pytest.mark.parametrize("kind", typed.choices(names.OptimizerKind))
def test_the_rate_is_in_inverse_proportion_to_the_width(kind):
    """With a base width, both optimizers and what is reported; at the base width itself, not a bit is different."""
    grads = _gradients()
    params = jax.tree.map(jnp.ones_like, grads)
    for base, factor in ((0, 1.0), (MODEL.width, 1.0), (MODEL.width // 4, 0.25), (4 * MODEL.width, 4.0)):
        updates, rates = [], []
        for settings in (dataclasses.replace(MUON, kind=kind, embedding_rate=3.0),) * 2:
            if updates:
                settings = dataclasses.replace(settings, base_width=base)
            config = Config(model=MODEL, optimizer=settings, training=TrainingConfig(num_steps=10))
            tx = optimizer.make(config)
            updates.append(jax.jit(lambda g, tx=tx: tx.update(g, tx.init(params), params)[0])(grads))
            rates.append(float(optimizer.learning_rate(config)(0)))
        assert rates[1] == factor * rates[0]
        for plain, scaled in zip(jax.tree.leaves(updates[0]), jax.tree.leaves(updates[1]), strict=True):
            np.testing.assert_array_equal(scaled, factor * plain)  # exact, because all factors are powers of two


@pytest.mark.parametrize(("size", "kept"), [(10.0, 0.5), (0.1, 0.1)])
def test_long_gradients_are_cut(size, kept):
    """To the norm of `clip_norm`, over all parameters together; shorter ones stay as they are."""
    grads = _gradients()
    norm = float(optax.global_norm(grads))
    grads = jax.tree.map(lambda leaf: size * leaf / norm, grads)
    tx = optimizer.make(Config(optimizer=dataclasses.replace(MUON, kind="adamw", clip_norm=0.5)))
    opt_state = jax.jit(lambda g: tx.update(g, tx.init(g), g)[1])(grads)
    moment = optax.tree_utils.tree_get(opt_state, "mu")  # after the first update (1 - beta1) times the gradient
    for found, grad in zip(jax.tree.leaves(moment), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(found, (1 - MUON.beta1) * kept / size * grad, rtol=1e-4, atol=1e-9)


def test_schedules_are_at_the_step_that_is_asked_for():
    """However many updates were applied: all schedules, of which Muon has two, and nothing else of the state."""
    grads = _gradients()
    params = jax.tree.map(jnp.ones_like, grads)
    for kind in typed.choices(names.OptimizerKind):
        settings = dataclasses.replace(MUON, kind=kind, schedule="cosine", clip_norm=1.0)
        config = Config(optimizer=settings, training=TrainingConfig(num_steps=10))
        tx, rate = optimizer.make(config), optimizer.learning_rate(config)
        update = jax.jit(lambda g, s, at, tx=tx: tx.update(g, optimizer.at_step(s, at), params))
        opt_state = tx.init(params)
        first, _ = update(grads, opt_state, jnp.int32(0))
        later, after = update(grads, opt_state, jnp.int32(7))
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(later), strict=True):
            np.testing.assert_allclose(other, one * float(rate(7) / rate(0)), rtol=1e-5, atol=1e-9)
        counts = optax.tree_utils.tree_get_all_with_path(after, "count")
        assert sorted({int(count) for _, count in counts}) == [1, 8]  # of Adam's moments, and of the schedules
