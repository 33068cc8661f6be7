"""The neurons against Eq. 1 and 2, and against their own laws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor.neurons import (
    IntegrateAndFire,
    SignedIntegrateAndFire,
    SignedState,
    StBif,
    fire,
    rectangle,
    triangle,
)


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


def steps(neuron, currents, threshold, start):
    """States and outputs of every step, as NumPy arrays."""
    state = neuron.init(currents.shape[1:], threshold, start)

    def step(state, x):
        state, out = neuron.step(state, x, threshold)
        return state, (state, out)

    return jax.device_get(jax.lax.scan(step, state, currents)[1])


def quarters(seed, *shape):
    """Currents of quarters, of both signs: their sums are exact."""
    return np.random.default_rng(seed).integers(-8, 12, shape).astype("f4") / 4


def test_a_signed_neuron_loses_nothing_and_takes_back_what_it_has_sent_at_most():
    currents = quarters(0, 40, 200)
    states, out = steps(SignedIntegrateAndFire(), currents, 2, 1.0)
    np.testing.assert_array_equal(states.potential, 1.0 + currents.cumsum(0) - out.cumsum(0))
    np.testing.assert_array_equal(2 * states.net_spikes, out.cumsum(0))
    assert states.net_spikes.min() == 0
    assert set(np.unique(out)) == {-2.0, 0.0, 2.0}


def test_a_signed_neuron_is_the_plain_one_until_it_has_to_take_a_spike_back():
    currents = quarters(1, 30, 200)
    _, signed = steps(SignedIntegrateAndFire(), currents, 2, 1.0)
    _, plain = steps(IntegrateAndFire(), currents, 2, 1.0)
    first = np.where((signed < 0).any(0), (signed < 0).argmax(0), len(currents))
    assert 0 < first.min() < first.max()
    before = np.arange(len(currents))[:, None] < first
    np.testing.assert_array_equal(signed[before], plain[before])


@pytest.mark.parametrize(("threshold", "limit"), [(1, -0.001), (4, -0.004)])
def test_a_signed_neuron_takes_back_at_a_thousandth_of_a_threshold_below_zero(threshold, limit):
    neuron, sent = SignedIntegrateAndFire(), SignedState(jnp.zeros(2), jnp.ones(2))
    x = jnp.float32([limit, np.nextafter(np.float32(limit), np.float32(0))])
    state, out = neuron.step(sent, x, threshold)
    np.testing.assert_array_equal(out, [-threshold, 0])
    np.testing.assert_array_equal(state.net_spikes, [0, 1])


def test_a_signed_neuron_that_has_sent_nothing_takes_nothing_back():
    _, out = steps(SignedIntegrateAndFire(), np.full((5, 1), -3, "f4"), 2, 1.0)
    assert not out.any()


def rounded(total, threshold):
    return np.clip(np.floor(total + 0.5), 0, threshold)


@pytest.mark.parametrize("threshold", [1, 2, 7])
def test_a_count_moves_by_one_spike_a_step_towards_the_quantized_total(threshold):
    totals = quarters(threshold, 50, 100).cumsum(0)
    states, sent = steps(StBif(), totals, threshold, threshold / 2)
    start = StBif().init((), threshold, threshold / 2).start
    assert start == 0.5
    moved = np.diff(sent, axis=0, prepend=0)
    before = sent - moved
    np.testing.assert_array_equal(moved, np.clip(rounded(totals, threshold) - before, -1, 1))
    np.testing.assert_array_equal(states.sent, sent)
    assert sent.min() >= 0 and sent.max() <= threshold


@pytest.mark.parametrize("threshold", [1, 3, 8])
def test_a_total_that_stands_still_is_quantized_after_as_many_steps_as_levels(threshold):
    """Whatever came before it, ties included."""
    total = np.arange(-8, 8 * threshold + 16).astype("f4") / 8
    noise = quarters(3, 20, len(total)).cumsum(0)
    totals = np.concatenate([noise, np.broadcast_to(total, (threshold, len(total)))])
    _, sent = steps(StBif(), totals, threshold, threshold / 2)
    np.testing.assert_array_equal(sent[-1], rounded(total, threshold))


def test_a_settled_count_has_the_gradient_of_the_quantizer():
    """1 where the input is between 0 and the threshold, and 0 outside of it."""
    neuron, totals = StBif(surrogate=rectangle), jnp.arange(-3.0, 12.0) / 3

    def settled(total):
        state = neuron.init((), 3, 1.5)
        for _ in range(3):
            state, sent = neuron.step(state, total, 3)
        return sent

    grads = jax.jit(jax.vmap(jax.grad(settled)))(totals)
    np.testing.assert_array_equal(grads, (totals > 0) & (totals < 3))
    assert not jax.vmap(jax.grad(lambda x: StBif().step(StBif().init((), 3, 1.5), x, 3)[1]))(
        totals
    ).any()
