"""Corruptions: which tokens a denoiser must fill in, and how much each of them weighs in the loss.

This is masked diffusion in continuous time with the log-linear schedule of MDLM (Sahoo et al. 2024): at time t in
(0, 1], every token is masked with probability t, independently. The negative evidence lower bound (ELBO) of a text is

    integral over t of 1/t E[ sum over masked n of -log p(x_n | tokens that are not masked) ] dt
  = sum over k = 1 .. N of 1/k E[ sum over masked n of the same, if k tokens drawn at random are masked ]

in nats. Tokens that are not masked are carried over and cost nothing, and no token of the vocabulary stands for a mask,
so that none can be predicted (MDLM's substitution parametrisation). The second line follows by integrating over t. It
is the average over random orders of predicting one token after another, which is why it bounds the likelihood.
"""

import flax.struct
import jax
import jax.numpy as jnp

# The earliest time that training draws, as in MDLM. Weights 1/t beyond its inverse would be rare and huge.
EARLIEST = 1e-3


@flax.struct.dataclass
class Corruption:
    """Which tokens of a batch are masked; all fields are [B, N], at natural positions.

    masked_BN: bool, True at tokens that the network must predict and does not see.
    weight_BN: float32, the loss weight of each token; 0 if it is not masked. The weighted sum of the nats of a row has
        the negative ELBO of the row as its mean.
    valid_BN: bool, False at padding, which stands at the end of a row and is never masked.
    """

    masked_BN: jax.Array
    weight_BN: jax.Array
    valid_BN: jax.Array


def by_time(key: jax.Array, valid_BN: jax.Array) -> Corruption:
    """The corruption that MDLM is trained with: a time t per row, and every token masked with probability t.

    The times have low discrepancy, t_b = (u + b / B) mod 1, so that every batch covers all times evenly. They are drawn
    from `EARLIEST` .. 1: the mean is the negative ELBO up to that part of the integral.
    """
    time_key, mask_key = jax.random.split(key)
    t_B1 = EARLIEST + (1.0 - EARLIEST) * _spread(time_key, valid_BN.shape[0])
    masked_BN = (jax.random.uniform(mask_key, valid_BN.shape) < t_B1) & valid_BN
    return Corruption(masked_BN, jnp.where(masked_BN, 1.0 / t_B1, 0.0), valid_BN)


def by_count(key: jax.Array, valid_BN: jax.Array) -> Corruption:
    """The corruption that the ELBO is measured with: a number k per row, and k of its n valid tokens masked.

    k is uniform in 1 .. n with low discrepancy over the batch, and masked tokens weigh n / k. The mean is exactly the
    negative ELBO, without an earliest time, and varies less than with `by_time`, where the number of masked tokens
    varies too.
    """
    count_key, mask_key = jax.random.split(key)
    n_B1 = jnp.sum(valid_BN, axis=1, keepdims=True)
    # The product can round up to n, which would be one too many.
    k_B1 = jnp.minimum(1 + jnp.floor(_spread(count_key, valid_BN.shape[0]) * n_B1).astype(jnp.int32), n_B1)
    noise_BN = jnp.where(valid_BN, jax.random.uniform(mask_key, valid_BN.shape), 2.0)
    rank_BN = jnp.argsort(jnp.argsort(noise_BN, axis=1), axis=1)
    masked_BN = (rank_BN < k_B1) & valid_BN
    return Corruption(masked_BN, jnp.where(masked_BN, n_B1 / jnp.maximum(k_B1, 1), 0.0), valid_BN)


def _spread(key: jax.Array, batch: int) -> jax.Array:
    """(u + b / B) mod 1 for every row b [B, 1] float32: each is uniform in [0, 1), and together they are even."""
    return (jax.random.uniform(key) + jnp.arange(batch, dtype=jnp.float32)[:, None] / batch) % 1.0
