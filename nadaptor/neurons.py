"""Spiking neurons: the state they keep and what they do with one time step of input.

A neuron is a value with two pure functions. It counts potential in units of the quantizer's scale,
`x = v / scale`: its threshold is then the number of levels, and it agrees with the quantizer
exactly, ties included, which in units of the input or of the threshold it does not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Threshold = int | jax.Array
"""The threshold in units of the scale; an array where a calibration has set it."""

State = Any
"""Whatever a neuron carries from one time step to the next: a pytree of arrays."""


class Neuron(Protocol):
    """What the simulator asks of a neuron; write your own with these two functions."""

    def init(self, shape: tuple[int, ...], threshold: Threshold, start: float | jax.Array) -> State:
        """Returns the state before the first step, its potential `start` broadcast to `shape`."""
        ...

    def step(self, state: State, x: jax.Array, threshold: Threshold) -> tuple[State, jax.Array]:
        """Takes the input current of one step; returns the new state and the output.

        Potential, current and output are float32, in units of the scale: a spike is an output of
        `threshold`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class IntegrateAndFire:
    """Integrate-and-fire with reset by subtraction (Eq. 1, 2).

    Each step `u += x`; where `u >= th` the neuron fires, gives out `th` and `u -= th`.
    The state is the potential u, float32 whatever the network's compute dtype: in bfloat16 it
    would lose count. It starts at half the threshold.

    Attributes:
        surrogate: derivative that stands in for the step function's in a backward pass, as a
            function of the distance to the threshold `u/threshold - 1` (see `triangle`). None
            leaves the true derivative, which is zero.

    Example:
        >>> neuron = IntegrateAndFire()
        >>> u = neuron.init((), threshold=2, start=1.0)
        >>> u, out = neuron.step(u, jnp.float32(1.5), threshold=2)
        >>> float(u), float(out)
        (0.5, 2.0)

    Source: Noise Adaptor, Eq. 1 and 2; Rueckauer et al., 2017 (reset by subtraction).
    """

    surrogate: Callable[[jax.Array], jax.Array] | None = None

    def init(
        self, shape: tuple[int, ...], threshold: Threshold, start: float | jax.Array
    ) -> jax.Array:
        """Returns the potential before the first step: `start`, in units of the scale."""
        return jnp.full(shape, start, jnp.float32)

    def step(
        self, state: jax.Array, x: jax.Array, threshold: Threshold
    ) -> tuple[jax.Array, jax.Array]:
        """Adds one step's current `x` to the potential and fires where it reaches `threshold`."""
        u = state + x
        out = threshold * fire(u, threshold, self.surrogate)
        return u - out, out


class SignedState(NamedTuple):
    """State of `SignedIntegrateAndFire`."""

    potential: jax.Array  # float32, in units of the scale
    net_spikes: jax.Array  # float32, spikes minus negative spikes so far


@dataclasses.dataclass(frozen=True)
class SignedIntegrateAndFire:
    """Integrate-and-fire that takes a spike back by a negative one.

    After the step of `IntegrateAndFire`: where the potential is at most -0.001 thresholds and the
    net count of spikes is positive, the neuron gives out `-th`, `u += th` and the count falls by
    one. At the first step it does what the plain neuron does.

    Example:
        >>> neuron = SignedIntegrateAndFire()
        >>> state = neuron.init((), threshold=2, start=1.0)
        >>> state, first = neuron.step(state, jnp.float32(1.0), threshold=2)
        >>> state, second = neuron.step(state, jnp.float32(-1.0), threshold=2)
        >>> float(first), float(second)
        (2.0, -2.0)

    Source: Li et al., Quantization framework for fast spiking neural networks, 2022 (QFFS).
    """

    def init(
        self, shape: tuple[int, ...], threshold: Threshold, start: float | jax.Array
    ) -> SignedState:
        """Returns the state before the first step: potential `start`, no spikes."""
        return SignedState(jnp.full(shape, start, jnp.float32), jnp.zeros(shape, jnp.float32))

    def step(
        self, state: SignedState, x: jax.Array, threshold: Threshold
    ) -> tuple[SignedState, jax.Array]:
        """Runs one plain step, then takes a spike back where too many were sent."""
        u = state.potential + x
        spikes = fire(u, threshold)
        u, net = u - threshold * spikes, state.net_spikes + spikes
        back = ((u <= -1e-3 * threshold) & (net > 0)).astype(u.dtype)
        return SignedState(u + threshold * back, net - back), threshold * (spikes - back)


def fire(
    u: jax.Array, threshold: Threshold, surrogate: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """Returns 1 where the potential has reached the threshold, else 0 (Eq. 2).

    Args:
        u: potential in units of the scale, any shape.
        threshold: the threshold in the same units.
        surrogate: derivative to use in a backward pass, a function of `u/threshold - 1`; None
            for 0.

    Returns:
        Spikes z in {0, 1}, with the shape and dtype of `u`.

    Example:
        >>> fire(jnp.array([1.9, 2.0]), 2)
        Array([0., 1.], dtype=float32)
    """
    spikes = (u >= threshold).astype(u.dtype)
    if surrogate is None:
        return spikes
    distance = u / threshold - 1
    return _with_derivative(surrogate)(distance, jax.lax.stop_gradient(spikes))


def triangle(distance: jax.Array) -> jax.Array:
    """Surrogate derivative `max(0, 1 - |distance|)`, distance in units of the threshold.

    Example:
        >>> triangle(jnp.array([0.0, 0.5, 2.0]))
        Array([1. , 0.5, 0. ], dtype=float32)

    Source: Bellec et al., 2018; Neftci et al., 2019.
    """
    return jnp.maximum(0, 1 - jnp.abs(distance))


def rectangle(distance: jax.Array) -> jax.Array:
    """Surrogate derivative 1 within half a threshold of firing, else 0: the quantizer's own.

    Example:
        >>> rectangle(jnp.array([0.0, 0.4, 0.6]))
        Array([1., 1., 0.], dtype=float32)

    Source: Wu et al., 2018.
    """
    return (jnp.abs(distance) <= 0.5).astype(distance.dtype)


def _with_derivative(surrogate: Callable) -> Callable:
    @jax.custom_jvp
    def replaced(distance, spikes):
        return spikes

    @replaced.defjvp
    def _replaced_jvp(primals, tangents):
        distance, spikes = primals
        return spikes, surrogate(distance) * tangents[0]

    return replaced
