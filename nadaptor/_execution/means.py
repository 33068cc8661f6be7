"""Running means: how an operation that is not affine acts on spikes.

It has no mean over its outputs, but it can be given the mean of its inputs,
`m_t = (a_1 + ... + a_t) / t`. What follows it stays in means up to a neuron, whose current at step
t is `t * x(m_t) - (t-1) * x(m_{t-1})`: the currents up to step t add up to `t * x(m_t)`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Means(NamedTuple):
    """What goes from one time step to the next, all float32; for a network without means nothing.

    The keys are numbers of variables.
    """

    time: jax.Array  # steps so far
    sums: dict[int, jax.Array]  # of each spiking value whose mean is asked for
    arrived: dict[int, jax.Array]  # the sum of a layer's currents, by the layer's input


class Averages:
    """The running means during one evaluation; each mean is taken once, however often it is read.

    Attributes:
        after: the running means after the last step, once all have been asked for.
    """

    def __init__(self, means: Means, steps: int | None) -> None:
        """Begins at the step after those in `means`, for one step or for several together."""
        self._before, self._t = means, step_numbers(means.time, steps)
        self._means: dict[int, jax.Array] = {}
        self.after = Means(means.time + (1 if steps is None else steps), {}, {})

    def mean(self, i: Any, value: jax.Array) -> jax.Array:
        """The running mean of the spiking variable i, which has this value."""
        if i not in self._means:
            self.after.sums[i], mean = running_mean(self._before.sums[i], value, self._t)
            # What reads it was traced for the type that the value has.
            self._means[i] = mean.astype(value.dtype)
        return self._means[i]

    def current(self, i: Any, mean: jax.Array) -> jax.Array:
        """The current of a layer whose input is the variable i, a mean."""
        before = self._before.arrived[i]
        self.after.arrived[i], x = current(before, mean.astype(jnp.float32), self._t)
        return x


def step_numbers(time: jax.Array, steps: int | None) -> jax.Array:
    """The number t of the next step, or [steps] numbers of the next ones, float32."""
    return time + 1 if steps is None else time + 1 + jnp.arange(steps, dtype=jnp.float32)


def running_mean(total: jax.Array, value: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds steps to a sum; returns it after them, and the mean up to each of them.

    Args:
        total: the sum before, [...].
        value: at step t, [...], or at several, [K, ...].
        t: the numbers of the steps, a scalar or [K].

    Example:
        >>> running_mean(jnp.float32(1.0), jnp.array([0.0, 1.0]), jnp.array([2.0, 3.0]))[1]
        Array([0.5      , 0.6666667], dtype=float32)
    """
    value = value.astype(jnp.float32)
    if not t.ndim:
        return total + value, (total + value) / t
    sums = total + jnp.cumsum(value, 0)
    return sums[-1], sums / _beside(t, sums)


def current(arrived: jax.Array, mean: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a neuron takes in where its input is a mean, at step t or at [K] steps.

    Returns:
        The sum of all currents after the last step, and the current at each.

    Example:
        >>> current(jnp.float32(1.0), jnp.array([0.5, 1.0]), jnp.array([2.0, 3.0]))[1]
        Array([0., 2.], dtype=float32)
    """
    if not t.ndim:
        total = t * mean
        return total, total - arrived
    totals = _beside(t, mean) * mean
    return totals[-1], totals - jnp.concatenate([arrived[None], totals[:-1]])


def _beside(t: jax.Array, x: jax.Array) -> jax.Array:
    return t.reshape(-1, *[1] * (x.ndim - 1))
