"""The training state: everything that a checkpoint holds and a step changes."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from armd_jax.config import Config
from armd_jax.core import parameters
from armd_jax.core import task as tasks
from armd_jax.core.parameters import Params
from armd_jax.training import optimizer, sharding


@flax.struct.dataclass
class TrainState:
    """The arrays of a run.

    step: int32, batches consumed. ema: averaged parameters; None if no average is kept. skipped: int32, updates skipped
    in a row up to now. loss_average: float32, running average of the loss of applied updates; infinite before any. If
    spikes are skipped, there is one for every kind of step whose loss differs by nature, as that of each number of
    streams does: [number of kinds].
    """

    step: jax.Array
    params: Params
    ema: Params | None
    opt_state: optax.OptState
    skipped: jax.Array
    loss_average: jax.Array

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate with: the average if there is one."""
        return self.params if self.ema is None else self.ema


def init(config: Config, key: jax.Array, params: Params | None = None) -> TrainState:
    """A fresh state that starts from `params`, or from random parameters if there are none. Traceable."""
    params = parameters.init(key, config.model) if params is None else params
    tx = optimizer.make(config)
    # A copy: parameters and average are donated to the step together and must not share buffers.
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema=ema,
        opt_state=tx.init(params),
        skipped=jnp.int32(0),
        loss_average=jnp.full(_averages(config), jnp.inf, jnp.float32),
    )


def _averages(config: Config) -> tuple[int, ...]:
    """The shape of the running averages of the loss."""
    num_kinds = tasks.of(config).num_kinds if config.training.spike_nats else 1
    return (num_kinds,) if num_kinds > 1 else ()


def shardings(config: Config, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state, a tree like it. Moments and average lie like their parameters."""
    abstract = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    params = sharding.param_shardings(mesh, abstract.params)
    everywhere = sharding.replicated(mesh)
    opt_state = _like_their_parameters(abstract.opt_state, params, everywhere)
    scalars = jax.tree.map(lambda _: everywhere, abstract)
    return dataclasses.replace(scalars, params=params, ema=abstract.ema and params, opt_state=opt_state)


def _like_their_parameters(opt_state: Any, params: Params, everywhere: NamedSharding) -> Any:
    """The sharding of every array of the optimizer's state.

    Optimizers keep moments in trees of the parameters' structure, whatever is around these trees. So an array whose
    path ends in the path of a parameter is sharded like that parameter, and every other one is small and replicated.
    """
    places = {_names(path): place for path, place in jax.tree_util.tree_leaves_with_path(params)}

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = _names(path)
        found = (places[names[start:]] for start in range(len(names)) if names[start:] in places)
        return next(found, everywhere) if leaf.ndim else everywhere

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The parts of a path in a tree of dicts, tuples and dataclasses, as texts."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def create(config: Config, mesh: Mesh, params: Params | None = None) -> TrainState:
    """A fresh state that is created sharded, so that no device ever holds more than its part."""
    make = jax.jit(lambda key, params: init(config, key, params), out_shardings=shardings(config, mesh))
    return make(jax.random.fold_in(jax.random.key(config.training.seed), 0), params)


def abstract(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring into."""
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(config, mesh),
    )
