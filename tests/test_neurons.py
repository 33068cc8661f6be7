"""The integrate-and-fire neuron against Eq. 1 and 2."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor.neurons import IntegrateAndFire, fire, rectangle, triangle


def run(neuron, currents, levels, start):
    state = neuron.init(currents.shape[1:], levels, start)
    return jax.lax.scan(lambda u, x: neuron.step(u, x, levels), state, currents)


def test_potential_is_input_minus_spikes():
    """Eq. 1 summed over time: u_T = u_0 + sum of currents - levels * spikes."""
    currents = jax.random.normal(jax.random.key(0), (50, 20))
    u, out = run(IntegrateAndFire(), currents, 2, 1.0)
    np.testing.assert_allclose(u, 1.0 + currents.sum(0) - out.sum(0), atol=1e-4)
    assert set(np.unique(out)) == {0.0, 2.0}


def test_fires_at_the_threshold_and_not_below_it():
    below = np.nextafter(np.float32(3), np.float32(0))
    np.testing.assert_array_equal(fire(jnp.array([below, 3.0, 3.5]), 3), [0, 1, 1])


def test_reset_subtracts_the_threshold_and_keeps_the_rest():
    u, out = IntegrateAndFire().step(jnp.float32(1.5), jnp.float32(4.0), 2)
    assert (u, out) == (3.5, 2.0)


@pytest.mark.parametrize("levels", [1, 2, 3, 7])
def test_count_after_T_steps_of_constant_current_is_the_floor(levels):
    x = jnp.arange(-16, 16 * levels + 32) / 16
    T = 13
    _, out = run(IntegrateAndFire(), jnp.broadcast_to(x, (T, *x.shape)), levels, levels / 2)
    expected = np.clip(np.floor((T * x + levels / 2) / levels), 0, T)
    np.testing.assert_array_equal(out.sum(0), levels * expected)


def test_half_precision_current_is_integrated_in_float32():
    u, _ = IntegrateAndFire().step(IntegrateAndFire().init((), 300, 0.0), jnp.bfloat16(0.01), 300)
    assert u.dtype == jnp.float32


@pytest.mark.parametrize("surrogate", [triangle, rectangle])
def test_surrogate_is_the_derivative_of_a_spike(surrogate):
    u = jnp.linspace(-1.0, 6.0, 29)
    grad = jax.vmap(jax.grad(lambda u: fire(u, 2, surrogate)))(u)
    np.testing.assert_allclose(grad, surrogate(u / 2 - 1) / 2, rtol=1e-6)
    np.testing.assert_array_equal(fire(u, 2, surrogate), fire(u, 2))


def test_without_a_surrogate_no_gradient_passes():
    chex.assert_trees_all_equal(jax.grad(lambda u: fire(u, 2))(jnp.float32(2)), jnp.float32(0))
