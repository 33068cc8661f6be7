"""What a layer has sent in sum coding: its total so far, and the spikes that this took."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sent(NamedTuple):
    """Of one layer of neurons, up to some time step."""

    total: jax.Array  # float32, spikes minus negative spikes of each neuron, in levels
    positive: jax.Array  # int32
    negative: jax.Array  # int32
    last: jax.Array  # int32 scalar: the last step at which any neuron sent one, or 0


def nothing_sent(shape: tuple[int, ...]) -> Sent:
    """Returns what a layer of that shape has sent before the first step."""
    none = jnp.zeros(shape, jnp.int32)
    return Sent(jnp.zeros(shape, jnp.float32), none, none, jnp.int32(0))


def add_steps(sent: Sent, totals: jax.Array, time: jax.Array) -> Sent:
    """Adds some steps to what a layer has sent.

    Args:
        sent: up to the step before.
        totals: [K, ...], the layer's totals at each of K steps.
        time: int32 scalar, the number of steps before them.

    Example:
        >>> totals = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> sent = add_steps(nothing_sent((2,)), totals, jnp.int32(0))
        >>> sent.positive.tolist(), sent.negative.tolist(), sent.last.item()
        ([1, 0], [1, 0], 2)
    """
    # Totals are integers that float32 holds exactly: `fitting_neuron` has seen to it.
    before = jnp.concatenate([sent.total[None], totals[:-1]])
    spikes = (totals - before).astype(jnp.int32)
    fired = (totals != before).any(tuple(range(1, totals.ndim)))
    steps = time + 1 + jnp.arange(len(totals), dtype=jnp.int32)
    return Sent(
        totals[-1],
        sent.positive + jnp.maximum(spikes, 0).sum(0, dtype=jnp.int32),
        sent.negative - jnp.minimum(spikes, 0).sum(0, dtype=jnp.int32),
        jnp.maximum(sent.last, jnp.where(fired, steps, 0).max()),
    )
