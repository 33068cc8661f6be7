"""The draw's statistics, each within five deviations of what independent uniform noise gives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor._noise import uniform_noise
from nadaptor.models import NoiseAdaptor

IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]
STREAMS, SIZE = 64, 2**14
LIMIT = 5


def draws(keys, size=SIZE):
    """[streams, size], scaled to a variance of 1."""
    draw = jax.jit(jax.vmap(lambda key: uniform_noise(key, (size,), 0.5)))
    return np.asarray(draw(keys), np.float64) * math.sqrt(12)


def folded(impl):
    key = jax.random.key(3, impl=impl)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(STREAMS))


def seeds(impl):
    return jax.vmap(lambda seed: jax.random.key(seed, impl=impl))(jnp.arange(STREAMS))


def deviations(products):
    """Each stream's sum of products, and their total, in deviations of independent noise."""
    return np.abs(
        [*products.sum(1) / math.sqrt(products.shape[1]), products.sum() / math.sqrt(products.size)]
    ).max()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("keys", [folded, seeds])
def test_mean_and_variance_are_those_of_the_uniform_distribution(keys, impl):
    x = draws(keys(impl))
    assert deviations(x) < LIMIT
    assert deviations((x**2 - 1) / math.sqrt(0.8)) < LIMIT  # the variance of x**2 is 9/5 - 1


def test_values_are_uniform_and_so_are_pairs_of_neighbours():
    x = draws(folded("threefry2x32")) / math.sqrt(12) + 0.5
    bins = (x * 16).astype(int)
    pairs = bins[:, 1:] * 16 + bins[:, :-1]
    for counts in (np.bincount((x * 256).astype(int).ravel()), np.bincount(pairs.ravel())):
        assert counts.shape == (256,)
        expected = counts.sum() / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < LIMIT * math.sqrt(2 * 255)


# Channels, rows and pixels of feature maps lie these far apart.
@pytest.mark.parametrize("lag", [1, 2, 3, 16, 32, 64, 512, 1024, 2048, 4096])
def test_neighbours_are_uncorrelated_and_so_are_their_squares(lag):
    x = draws(folded("threefry2x32"))
    squares = (x**2 - 1) / math.sqrt(0.8)
    assert deviations(x[:, lag:] * x[:, :-lag]) < LIMIT
    assert deviations(squares[:, lag:] * squares[:, :-lag]) < LIMIT


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("keys", [folded, seeds])
@pytest.mark.parametrize("lag", [0, 1, 16])
def test_keys_that_follow_one_another_draw_uncorrelated_noise(keys, impl, lag):
    """Examples, layers and steps differ in what is folded into their keys."""
    x = draws(keys(impl))
    assert deviations(x[1:, lag:] * x[:-1, : SIZE - lag]) < LIMIT


def test_noise_of_layers_steps_and_examples_is_uncorrelated():
    """At v = 1/2 a level fires with probability 1/2: outputs are fair coins, one an element."""
    v, layer = jnp.full((16, 2000), 0.5), NoiseAdaptor(1, data_init=False)
    variables = layer.init(jax.random.key(0), v)
    run = jax.random.key(1)

    def coins(step, index):
        key = jax.random.fold_in(jax.random.fold_in(run, step), index)
        return 2 * layer.apply(variables, v, rngs={"noise": key}) - 1

    x = np.asarray(jnp.stack([coins(step, index) for step in range(3) for index in range(3)]))
    x = x.reshape(9 * 16, 2000)
    correlations = (x @ x.T / math.sqrt(2000))[np.triu_indices(len(x), 1)]
    assert np.abs(correlations).max() < LIMIT + 1  # the largest of ten thousand
    assert abs(correlations.std() - 1) < 0.05


@pytest.mark.parametrize("amplitude", [0.0, 0.5, 2.0])
def test_draws_are_symmetric_and_inside_the_amplitude(amplitude):
    eps = uniform_noise(jax.random.key(0), (200_000,), amplitude)
    assert eps.dtype == jnp.float32
    if amplitude:
        assert (jnp.abs(eps) < amplitude).all() and (eps != 0).all()
        assert jnp.abs(eps).max() > 0.999 * amplitude
        assert len(np.unique(eps)) > 190_000
    else:
        assert (eps == 0).all()


@pytest.mark.reuses_keys
def test_the_draw_is_the_same_in_any_shape_and_under_vmap_and_jit():
    keys = jax.random.split(jax.random.key(0), 3)
    plain = jnp.stack([uniform_noise(key, (2, 3, 4), 0.5) for key in keys])
    flat = jnp.stack([uniform_noise(key, (24,), 0.5) for key in keys])
    mapped = jax.jit(jax.vmap(lambda key: uniform_noise(key, (2, 3, 4), 0.5)))(keys)
    np.testing.assert_array_equal(plain, mapped)
    np.testing.assert_array_equal(plain.reshape(3, 24), flat)
    assert uniform_noise(keys[0], (), 0.5).shape == ()
