"""A neuron of one's own: a leaky one, and what its leak costs.

A neuron is a value with `init` and `step`. This one forgets a part of its potential at each step,
as the leaky neurons of neuromorphic chips do. A current far below (1 - leak) * threshold then never
makes it fire, and any other makes it fire less often than the network was trained for.
"""

import dataclasses

import jax
import jax.numpy as jnp

import nadaptor
from nadaptor.neurons import Threshold, fire

NUM_STEPS = 64


@dataclasses.dataclass(frozen=True)
class LeakyIntegrateAndFire:
    """Integrate-and-fire with `u <- leak * u + x`; a leak of 1 is `nadaptor.IntegrateAndFire`."""

    leak: float = 0.9

    def init(
        self, shape: tuple[int, ...], threshold: Threshold, start: float | jax.Array
    ) -> jax.Array:
        """Returns the potential before the first step, in units of the scale."""
        return jnp.full(shape, start, jnp.float32)

    def step(
        self, state: jax.Array, x: jax.Array, threshold: Threshold
    ) -> tuple[jax.Array, jax.Array]:
        """Takes the current of one step; a spike is an output of `threshold`."""
        u = self.leak * state + x
        out = threshold * fire(u, threshold)
        return u - out, out


def outputs(leak: float, v: jax.Array) -> jax.Array:
    """Returns the mean output over all steps of one layer of leaky neurons."""

    def layer(v: jax.Array) -> jax.Array:
        return nadaptor.lsq(v, 0.25, levels=4)

    neuron = LeakyIntegrateAndFire(leak)
    return nadaptor.simulate(layer, v, num_steps=NUM_STEPS, neuron=neuron).outputs[-1]


def main() -> dict[float, jax.Array]:
    """Prints the mean output for some inputs and leaks, and returns it by leak."""
    v = jnp.linspace(0, 1, 6)
    found = {leak: outputs(leak, v) for leak in (1.0, 0.95, 0.9)}
    print("input    ", *(f"{x:6.2f}" for x in v))
    for leak, mean in found.items():
        print(f"leak {leak:4}", *(f"{x:6.2f}" for x in mean))
    return found


if __name__ == "__main__":
    main()
