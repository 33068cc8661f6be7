"""Firing rates and layer errors, against what a plain loop over examples gives."""

import functools

import jax
import jax.numpy as jnp
import pytest

import nadaptor
from nadaptor.analysis import firing_rates, layer_errors


@functools.cache
def deep():
    weights = jax.random.normal(jax.random.key(4), (4, 24, 24)) / 4
    x = jax.random.normal(jax.random.key(5), (16, 24))

    def f(weights, x):
        for w in weights:
            x = nadaptor.lsq(x @ w, 0.3, 2)
        return x

    return f, weights, x


def test_firing_rates_are_spikes_a_neuron_and_step():
    v = jnp.array([0.0, 1.0, 8.0])
    sim = nadaptor.simulate(lambda v: nadaptor.lsq(v, 1.0, 4), v, num_steps=8)
    (rate,) = firing_rates(sim, 8)
    assert float(rate) == pytest.approx((0 + 2 + 8) / 3 / 8)


def test_the_first_layer_has_no_error_at_T_equal_p_and_deeper_ones_have():
    f, weights, x = deep()
    errors = list(layer_errors(f, weights, x, num_steps=2).values())
    assert errors[0] == 0
    assert 0 < errors[2] < errors[3]


def test_layer_errors_fall_with_time_against_the_clipped_network():
    f, weights, x = deep()
    short, long = (
        sum(layer_errors(f, weights, x, num_steps=t, reference="clipped").values()) for t in (4, 64)
    )
    assert long < 0.3 * short


def test_a_correction_and_signed_spikes_lower_the_layer_errors():
    f, weights, x = deep()
    measure = functools.partial(layer_errors, f, weights, x, num_steps=2)
    plain = sum(measure().values())
    assert sum(measure(correction=nadaptor.OffsetSpikes(2)).values()) < 0.5 * plain
    assert sum(measure(neuron=nadaptor.SignedIntegrateAndFire()).values()) < plain


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match="'other'"):
        layer_errors(lambda v: nadaptor.lsq(v, 1.0, 1), jnp.ones(2), num_steps=2, reference="other")
