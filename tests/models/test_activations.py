import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.models import ClippedRelu, Lsq, NoiseAdaptor, Relu, start_scales

LEARNED = [Lsq(3), NoiseAdaptor(3), ClippedRelu()]


def sample(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_relu_is_the_positive_part():
    v = sample(4, 5)
    chex.assert_trees_all_equal(Relu().apply({}, v), jnp.maximum(v, 0))


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_the_scale_starts_at_twice_the_mean_over_the_root_of_the_levels(levels):
    v = sample(6, 5, 5, 3)
    params = Lsq(levels).init(jax.random.key(1), v)["params"]
    expected = 2 * np.maximum(np.asarray(v, np.float64), 0).mean() / math.sqrt(levels)
    np.testing.assert_allclose(params["quant_scale"], expected, rtol=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_the_scale_of_least_error_is_better_than_its_neighbours(levels):
    v = jnp.maximum(sample(6, 5, 5, 3), 0)
    start = Lsq(levels, scale_init="mmse").init(jax.random.key(1), v)["params"]["quant_scale"]

    def error(scale):
        return float(((v - nadaptor.lsq(v, scale, levels)) ** 2).mean())

    grid = v.max() / levels * 0.01
    np.testing.assert_allclose(start / grid, np.round(start / grid), rtol=1e-4)
    assert error(start) <= min(error(start - grid), error(start + grid))
    assert error(start) < error(Lsq(levels).init(jax.random.key(1), v)["params"]["quant_scale"])


def test_the_scale_of_least_error_is_measured_over_all_devices():
    layer, v = Lsq(2, scale_init="mmse", axis_name="batch"), sample(8, 5)
    whole = Lsq(2, scale_init="mmse").init(jax.random.key(1), v)

    def start(part):
        return start_scales(layer, {"params": {}}, part, jax.random.key(0))

    parts = jax.vmap(start, axis_name="batch")(v.reshape(2, 4, 5))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], parts), whole)


def test_an_unknown_start_is_refused_with_its_value():
    with pytest.raises(ValueError, match=r"'lsq', 'mmse', 'mmse_relu'.*not 'best'"):
        Lsq(2, scale_init="best")


def test_the_threshold_starts_at_the_maximum():
    v = sample(6, 5)
    params = ClippedRelu().init(jax.random.key(1), v)["params"]
    assert params["threshold"] == v.max()


def test_a_start_per_channel_is_the_start_of_each_channel_alone():
    v = sample(6, 5, 3)
    scales = Lsq(2, per_channel=True).init(jax.random.key(1), v)["params"]["quant_scale"]
    alone = [
        Lsq(2).init(jax.random.key(1), v[..., c : c + 1])["params"]["quant_scale"] for c in range(3)
    ]
    np.testing.assert_allclose(scales, alone, rtol=1e-6)


@pytest.mark.parametrize("layer", LEARNED, ids=lambda layer: type(layer).__name__)
def test_a_layer_silent_on_the_first_batch_starts_at_the_constant(layer):
    (scale,) = jax.tree.leaves(layer.init(jax.random.key(0), jnp.full((2, 3), -1.0)))
    assert scale == getattr(layer, "initial_scale", getattr(layer, "initial_threshold", None))


def test_the_start_from_data_can_be_switched_off():
    layer = Lsq(2, data_init=False, initial_scale=0.25)
    assert layer.init(jax.random.key(0), sample(4, 4))["params"]["quant_scale"] == 0.25


@pytest.mark.parametrize("layer", LEARNED, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scales_are_float32_and_activations_keep_the_compute_dtype(layer, dtype):
    v = sample(4, 5, dtype=dtype)
    y, variables = layer.init_with_output(jax.random.key(0), v)
    chex.assert_equal_shape([y, v])
    assert y.dtype == dtype
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_without_a_noise_key_the_noise_adaptor_is_lsq():
    v = sample(4, 50)
    variables = NoiseAdaptor(2).init(jax.random.key(0), v)
    expected = nadaptor.lsq(v, variables["params"]["quant_scale"], 2)
    chex.assert_trees_all_equal(NoiseAdaptor(2).apply(variables, v), expected)
    key = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    chex.assert_trees_all_equal(NoiseAdaptor(2).apply(variables, v, rngs=key), expected)


def test_the_same_noise_key_draws_the_same_and_another_key_another():
    layer, v = NoiseAdaptor(2), sample(4, 50)
    variables = layer.init(jax.random.key(0), v)
    first, again, other = (
        layer.apply(variables, v, rngs={"noise": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    chex.assert_trees_all_equal(first, again)
    assert (first != other).any()


def test_layers_and_examples_draw_different_noise():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, v):
            layer = functools.partial(NoiseAdaptor, levels=2, data_init=False)
            return layer(name="act1")(v), layer(name="act2")(v)

    v = jnp.full((2, 200), 0.5)
    first, second = Twice().apply(
        Twice().init(jax.random.key(0), v), v, rngs={"noise": jax.random.key(1)}
    )
    for one, two in [(first, second), (first[0], first[1])]:
        assert 0.3 < (one != two).mean() < 0.7


def test_the_mean_over_the_noise_is_the_clip():
    v = jnp.tile(jnp.linspace(-0.3, 1.3, 9), (40_000, 1))
    layer = NoiseAdaptor(2, data_init=False, initial_scale=0.5)
    y = layer.apply(layer.init(jax.random.key(0), v), v, rngs={"noise": jax.random.key(1)})
    np.testing.assert_allclose(y.mean(0), jnp.clip(v[0], 0, 1.0), atol=5e-3)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_noise_of_an_example_does_not_depend_on_the_device_count(devices):
    v, rngs = sample(8, 5, 3), {"noise": jax.random.key(1)}
    variables = NoiseAdaptor(2).init(jax.random.key(0), v)
    layer = NoiseAdaptor(2, axis_name="batch")
    local = jax.vmap(lambda part: layer.apply(variables, part, rngs=rngs), axis_name="batch")
    split = local(v.reshape(devices, 8 // devices, 5, 3)).reshape(v.shape)
    chex.assert_trees_all_equal(split, NoiseAdaptor(2).apply(variables, v, rngs=rngs))


@pytest.mark.parametrize("layer", LEARNED, ids=lambda layer: type(layer).__name__)
def test_the_start_does_not_depend_on_the_device_count(layer):
    v = sample(8, 5, 3)
    local = layer.clone(axis_name="batch")

    def start(part):
        return start_scales(local, {"params": {}}, part, jax.random.key(0))

    split = jax.vmap(start, axis_name="batch")(v.reshape(4, 2, 5, 3))
    whole = layer.init(jax.random.key(0), v)
    first, last = (jax.tree.map(lambda x, i=i: x[i], split) for i in (0, 3))
    chex.assert_trees_all_equal(first, last)
    chex.assert_trees_all_close(first, whole, rtol=1e-6)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_layer_with_an_axis_needs_the_axis_only_for_starts_and_noise(noisy):
    v, layer = sample(4, 5), NoiseAdaptor(2, axis_name="batch")
    rngs = {"params": jax.random.key(0)} | ({"noise": jax.random.key(1)} if noisy else {})
    y = layer.apply(layer.init(rngs, v), v)
    chex.assert_equal_shape([y, v])


@pytest.mark.parametrize(("on", "factor"), [(True, 1 / math.sqrt(2 * 20)), (False, 1.0)])
def test_the_gradient_of_the_scale_has_lsqs_factor(on, factor):
    v = sample(4, 5, 4)
    layer = Lsq(2, scale_gradient=on)
    variables = layer.init(jax.random.key(0), v)
    got = jax.grad(lambda w: layer.apply(w, v).sum())(variables)["params"]["quant_scale"]
    scale = variables["params"]["quant_scale"]
    plain = jax.grad(lambda s: nadaptor.lsq(v, s, 2).sum())(scale)
    np.testing.assert_allclose(got, plain * factor, rtol=1e-6)


def test_the_gradient_factor_does_not_depend_on_the_batch_size():
    assert Lsq(2).gradient_factor(sample(4, 5, 4), jnp.ones(())) == 1 / math.sqrt(40)
    assert Lsq(2).gradient_factor(sample(9, 5, 4), jnp.ones(())) == 1 / math.sqrt(40)
    assert Lsq(2).gradient_factor(sample(9, 5, 4), jnp.ones(4)) == 1 / math.sqrt(10)


@pytest.mark.parametrize(
    ("layer", "v", "message"),
    [
        (NoiseAdaptor(2, -1.0), sample(2, 2), "amplitude must be a number >= 0"),
        (NoiseAdaptor(2, 0.5, "other"), sample(2, 2), "gradient must be"),
        (Lsq(2), sample(3), "add a batch axis"),
        (Lsq(2), jnp.ones((2, 2), jnp.int32), "must be floating point"),
    ],
)
def test_bad_input_is_refused(layer, v, message):
    rngs = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    with pytest.raises(ValueError, match=message):
        layer.init(rngs, v)


@pytest.mark.parametrize("levels", [0, -1, 2.5, True])
def test_bad_levels_are_refused_when_the_layer_is_built(levels):
    for layer in (Lsq, NoiseAdaptor):
        with pytest.raises(ValueError, match="levels must be a positive int"):
            layer(levels)


def test_the_noise_under_a_real_pmap_is_that_of_one_device():
    v, rngs = sample(4, 6), {"noise": jax.random.key(1)}
    variables = NoiseAdaptor(2).init(jax.random.key(0), v)
    devices = math.gcd(jax.local_device_count(), 4)
    layer = NoiseAdaptor(2, axis_name="batch")
    split = jax.pmap(
        lambda part: layer.apply(variables, part, rngs=rngs),
        axis_name="batch",
        devices=jax.local_devices()[:devices],
    )(v.reshape(devices, -1, 6))
    chex.assert_trees_all_equal(
        jnp.asarray(split).reshape(v.shape), NoiseAdaptor(2).apply(variables, v, rngs=rngs)
    )
