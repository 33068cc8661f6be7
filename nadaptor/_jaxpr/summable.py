"""Currents whose sums are exact: why a neuron and its quantizer agree to the last spike.

A neuron adds its current T times where the quantizer multiplies once, and float32 rounds each sum:
at 0.1 a step, ten steps are not 1. Rounded to a grid of which float32 holds every multiple in the
potential's range, no sum rounds, whatever T; and rounded *down*, a current stays on its side of
every tie, so that the quantizer's own rounding of it is unchanged.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def summable(x: jax.Array, threshold: int) -> jax.Array:
    """Rounds currents down to a grid on which sums are exact, on their side of every tie.

    Float32 holds all multiples of the grid up to 2 * threshold, the potential's range: however many
    the steps, no spike comes or goes by rounding.
    """
    grid = 2.0 ** ((2 * threshold - 1).bit_length() - 24)
    # The half is added as the quantizer adds it: the float below 1/2 is a tie for both. A clip
    # stands before it there, and here a bound that no current reaches. Else the compiler may fuse
    # the addition with the product v * (1/s), and round once where the quantizer rounds twice.
    bounded = jnp.maximum(x, -(2.0**30))
    return jnp.floor((bounded + 0.5) / grid) * grid - 0.5


@summable.defjvp
def _summable_jvp(
    threshold: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # Straight-through: to a gradient the grid is not there.
    return summable(*primals, threshold), tangents[0]
