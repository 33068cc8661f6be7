"""Spiking neurons: the state they keep and what they do with one time step of input.

A neuron is a value with two pure functions. It counts potential in units of the quantizer's scale,
`x = v / scale`: its threshold is then the number of levels, and it agrees with the quantizer
exactly, ties included, which in units of the input or of the threshold it does not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

# Shapes as types: see `quantizers.py`.
if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32

Threshold = int | jax.Array
"""The threshold in units of the scale; an array where a calibration has set it."""

Coding = Literal["rate", "sum"]
"""How spikes carry a number: by their mean over the steps, or by their sum."""

State = Any
"""Whatever a neuron carries from one time step to the next: a pytree of arrays."""


class Neuron(Protocol):
    """What the simulator asks of a neuron; write your own with these two functions.

    A neuron for sum coding has `coding = "sum"` in its class, and knows totals only: x is what has
    arrived in all steps so far, and the output what has been sent in all of them, of which a spike
    is 1, the scale. One that sends whenever something is missing says so by `never_pauses = True`:
    a step in which no neuron sends a spike is then the last that is run. Without it, as where a
    neuron rests after a spike, all steps are.
    """

    def init(self, shape: tuple[int, ...], threshold: Threshold, start: float | jax.Array) -> State:
        """Returns the state before the first step, its potential `start` broadcast to `shape`."""
        ...

    def step(
        self, state: State, x: Float32[Array, "*shape"], threshold: Threshold
    ) -> tuple[State, Float32[Array, "*shape"]]:
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
    ) -> Float32[Array, "..."]:
        """Returns the potential before the first step: `start`, in units of the scale."""
        return jnp.full(shape, start, jnp.float32)

    def step(
        self, state: Float32[Array, "*shape"], x: Float32[Array, "*shape"], threshold: Threshold
    ) -> tuple[Float32[Array, "*shape"], Float32[Array, "*shape"]]:
        """Adds one step's current `x` to the potential and fires where it reaches `threshold`."""
        u = state + x
        out = threshold * fire(u, threshold, self.surrogate)
        return u - out, out


class SignedState(NamedTuple):
    """State of `SignedIntegrateAndFire`."""

    potential: Float32[Array, "*shape"]  # in units of the scale
    net_spikes: Float32[Array, "*shape"]  # spikes minus negative spikes so far


@dataclasses.dataclass(frozen=True)
class SignedIntegrateAndFire:
    """Integrate-and-fire that takes a spike back by a negative one.

    After the step of `IntegrateAndFire`: where the potential is at most -0.001 thresholds and the
    net count of spikes is positive, the neuron gives out `-th`, `u += th` and the count falls by
    one. At the first step it does what the plain neuron does. The limit is a part of the threshold;
    Fast-SNN's code has an absolute -0.001, which differs for thresholds other than 1.

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
        self, state: SignedState, x: Float32[Array, "*shape"], threshold: Threshold
    ) -> tuple[SignedState, Float32[Array, "*shape"]]:
        """Runs one plain step, then takes a spike back where too many were sent."""
        u = state.potential + x
        spikes = fire(u, threshold)
        u, net = u - threshold * spikes, state.net_spikes + spikes
        # A neuron that fires ends at 0 or above: at the first step nothing is taken back.
        back = ((u <= -1e-3 * threshold) & (net > 0)).astype(u.dtype)
        return SignedState(u + threshold * back, net - back), threshold * (spikes - back)


class Count(NamedTuple):
    """State of `StBif`."""

    sent: Float32[Array, "*shape"]  # spikes minus negative spikes so far
    start: Float32[Array, ""]  # what rounds: half a level for a quantizer to the nearest


@dataclasses.dataclass(frozen=True)
class StBif:
    """The neuron of sum coding: moves its count of spikes to the quantized total, one a step.

    With x the total of what has arrived so far, in units of the scale, and c the spikes minus the
    negative spikes sent so far, it sends `z = clip(q(x) - c, -1, 1)`, where q is the quantizer's
    own rounding and clip. That is integrate-and-fire with a threshold of one level, which sends a
    spike where the potential `x - c + 1/2` is 1 or more and c < p, and takes one back where it is
    below 0 and c > 0. Once x stands still it falls silent at c = q(x), after p steps at the latest.

    Attributes:
        surrogate: derivative that stands in for that of the rounding in a backward pass, as a
            function of the distance to the nearest tie, in levels. With `rectangle` a settled
            network has the gradient of the quantized one. None leaves the true one, which is zero.

    Example:
        >>> neuron = StBif()
        >>> state, sent = neuron.init((), threshold=4, start=2.0), []
        >>> for total in (2.2, 2.2, 0.9, 0.9):
        ...     state, out = neuron.step(state, jnp.float32(total), threshold=4)
        ...     sent.append(float(out))
        >>> sent
        [1.0, 2.0, 1.0, 1.0]

    Source: You et al., SpikeZIP-TF: conversion is all you need for transformer-based SNN, 2024.
    """

    surrogate: Callable[[jax.Array], jax.Array] | None = None
    coding: ClassVar[Coding] = "sum"
    never_pauses: ClassVar[bool] = True

    def init(self, shape: tuple[int, ...], threshold: Threshold, start: float | jax.Array) -> Count:
        """Returns the state before the first step: no spikes."""
        return Count(jnp.zeros(shape, jnp.float32), jnp.float32(start / threshold))

    def step(
        self, state: Count, x: Float32[Array, "*shape"], threshold: Threshold
    ) -> tuple[Count, Float32[Array, "*shape"]]:
        """Takes the total of all steps so far; returns the total of spikes sent, in levels."""
        # A bound that no x reaches, as in `summable`: it keeps the compiler from rounding once,
        # with a product before it, where the quantizer rounds twice.
        u = jnp.maximum(x, -(2.0**30)) + state.start
        wanted = jax.lax.stop_gradient(jnp.clip(jnp.floor(u), 0, threshold))
        if self.surrogate is not None:
            # As in LSQ: nothing passes where the clip holds.
            inside = (x > 0) & (x < threshold)
            wanted = _rounded(self.surrogate, u, wanted, inside.astype(jnp.float32))
        missing = wanted - state.sent
        # Not a clip: within one spike of it the total is `wanted`, and has its derivative.
        sent = jnp.where(jnp.abs(missing) > 1, state.sent + jnp.sign(missing), state.sent + missing)
        return Count(sent, state.start), sent


def fire(
    u: Float[Array, "*shape"],
    threshold: Threshold,
    surrogate: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "*shape"]:
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
    # The output is the threshold times z: in u its derivative is the surrogate's value alone.
    distance = u / threshold - 1
    return _with_derivative(surrogate)(distance, jax.lax.stop_gradient(spikes))


def triangle(distance: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Surrogate derivative `max(0, 1 - |distance|)`, distance in units of the threshold.

    Example:
        >>> triangle(jnp.array([0.0, 0.5, 2.0]))
        Array([1. , 0.5, 0. ], dtype=float32)

    Source: Bellec et al., 2018; Neftci et al., 2019.
    """
    return jnp.maximum(0, 1 - jnp.abs(distance))


def rectangle(distance: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(surrogate: Callable, u: jax.Array, floor: jax.Array, inside: jax.Array) -> jax.Array:
    """The floor of u, with a derivative."""
    return floor


@_rounded.defjvp
def _rounded_jvp(
    surrogate: Callable, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    # With the start of half a level, the integers of u are the ties.
    u, floor, inside = primals
    return floor, surrogate(jnp.abs(u - jnp.round(u))) * inside * tangents[0]
