"""Levels drawn anew at each step, the threshold kept."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.models import AnyLevel, Lsq, NoiseAdaptor, create

LAYER = AnyLevel(2, data_init=False, initial_scale=0.5)


def sample(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def levels_used(y):
    """The finest of the levels 1, 2 and 4 of threshold 1 that some values lie on."""
    return next(n for n in (1, 2, 4) if np.allclose(np.asarray(y) * n % 1, 0))


def test_each_step_quantizes_to_one_of_the_levels_of_the_same_threshold():
    v = sample(64, 50)
    variables = LAYER.init(jax.random.key(0), v)
    noisy = jax.jit(lambda key: LAYER.apply(variables, v, rngs={"noise": key}))
    outputs = [noisy(key) for key in jax.random.split(jax.random.key(1), 48)]
    counts = np.unique([levels_used(y) for y in outputs], return_counts=True)
    assert counts[0].tolist() == [1, 2, 4]
    assert counts[1].min() >= 6  # 16 expected each, deviation 3.3
    assert all(y.max() == 1 for y in outputs)


def test_all_layers_of_a_network_draw_the_same_levels():
    activation = functools.partial(AnyLevel, 2, data_init=False, initial_scale=0.5)
    model = create("digits_resnet8", 10, activation=activation)
    images = sample(4, 8, 8, 1)
    variables = model.init(jax.random.key(0), images)

    @jax.jit
    def activations(key):
        return model.apply(
            variables,
            images,
            rngs={"noise": key},
            capture_intermediates=lambda module, name: (
                name == "__call__" and isinstance(module, AnyLevel)
            ),
            mutable=["intermediates"],
        )[1]["intermediates"]

    for key in jax.random.split(jax.random.key(1), 6):
        assert len({levels_used(y) for y in jax.tree.leaves(activations(key)) if y.any()}) == 1


def test_with_one_number_of_levels_it_is_the_noise_adaptor():
    v, key = sample(8, 5), jax.random.key(3)
    variables = LAYER.init(jax.random.key(0), v)
    one, plain = LAYER.clone(drawn=(2,)), NoiseAdaptor(2)
    outputs = [layer.apply(variables, v, rngs={"noise": key}) for layer in (one, plain)]
    chex.assert_trees_all_equal(*outputs)


def test_the_scale_gets_the_gradient_of_the_levels_drawn():
    v, key = sample(8, 5), jax.random.key(3)
    options = {"data_init": False, "scale_gradient": False, "gradient": "exact"}

    def gradient(layer, scale):
        def total(scale):
            return layer.apply({"params": {"quant_scale": scale}}, v, rngs={"noise": key}).sum()

        return jax.grad(total)(jnp.float32(scale))

    drawn = gradient(AnyLevel(2, drawn=(4,), **options), 0.5)
    alone = gradient(NoiseAdaptor(4, **options), 0.25)
    np.testing.assert_allclose(drawn, alone / 2, rtol=1e-5)  # the step is half as long


def test_without_noise_it_is_lsq_and_converts_to_the_threshold():
    v = sample(8, 5)
    variables = LAYER.init(jax.random.key(0), v)
    chex.assert_trees_all_equal(LAYER.apply(variables, v), Lsq(2).apply(variables, v))
    sim = nadaptor.simulate(LAYER.apply, variables, v, num_steps=64)
    chex.assert_trees_all_close(sim.outputs[-1], jnp.clip(v, 0, 1), atol=1 / 64)


@pytest.mark.parametrize("drawn", [(), (1, 0), (2.5,)])
def test_bad_levels_are_refused(drawn):
    with pytest.raises(ValueError, match=r"levels|drawn"):
        AnyLevel(2, drawn=drawn)
