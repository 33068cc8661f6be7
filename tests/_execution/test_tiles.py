"""The choice of tiles and chunks, and that it changes no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor._execution.tiles import CACHE_BYTES, choose_sizes


@pytest.mark.parametrize("features", [1, 1000, 100_000, 10_000_000])
@pytest.mark.parametrize("number", [1, 5, 100])
@pytest.mark.parametrize("num_steps", [1, 3, 64])
def test_what_is_evaluated_together_fits_the_cache_or_is_one(features, number, num_steps):
    tile, chunk = choose_sizes([(number, 2), (number, features)], number, num_steps, "cpu")
    assert 1 <= tile <= number
    assert 1 <= chunk <= num_steps
    assert tile * chunk == 1 or 4 * features * tile * chunk <= CACHE_BYTES


def test_accelerators_take_the_whole_batch():
    assert choose_sizes([(64, 10**7)], 64, 16, "gpu") == (64, 1)


def test_the_choice_changes_no_result_on_dyadic_numbers():
    weights = jnp.round(8 * jax.random.normal(jax.random.key(0), (2, 12, 12))) / 32
    x = jnp.round(16 * jax.random.normal(jax.random.key(1), (20, 12))) / 16

    def f(weights, x):
        for w in weights:
            x = nadaptor.lsq(x @ w, 0.25, 2)
        return x

    run = functools.partial(nadaptor.simulate, f, weights, x, num_steps=6)
    chosen, whole = run(in_axes=(None, 0)), run()
    np.testing.assert_array_equal(chosen.outputs, whole.outputs)
    for a, b in zip(chosen.spike_counts, whole.spike_counts, strict=True):
        np.testing.assert_array_equal(a, b)
