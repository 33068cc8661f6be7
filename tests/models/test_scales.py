import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.models import (
    SCALE_FLOOR,
    ClippedRelu,
    Lsq,
    NoiseAdaptor,
    Relu,
    create,
    is_scale,
    project_scales,
    start_scales,
)


def sample(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


class Chain(nn.Module):
    """Two dense layers and two activations."""

    activation: functools.partial

    @nn.compact
    def __call__(self, x):
        x = self.activation(name="act1")(nn.Dense(8, name="fc1")(x))
        return self.activation(name="act2")(nn.Dense(4, name="fc2")(x))


def without_scales(params):
    return {name: leaf for name, leaf in params.items() if not name.startswith("act")}


def test_start_scales_creates_exactly_the_missing_scales():
    model = Chain(functools.partial(Lsq, levels=2))
    x = sample(16, 6)
    params = model.init(jax.random.key(0), x)["params"]
    weights = without_scales(params)
    full = start_scales(model, {"params": weights}, x, jax.random.key(9))["params"]
    chex.assert_trees_all_equal(full, params)
    kept = {**weights, "act1": {"quant_scale": jnp.array(0.125)}}
    full = start_scales(model, {"params": kept}, x, jax.random.key(9))["params"]
    assert full["act1"]["quant_scale"] == 0.125
    hidden = nadaptor.lsq(nn.Dense(8).apply({"params": weights["fc1"]}, x), 0.125, 2)
    v = nn.Dense(4).apply({"params": weights["fc2"]}, hidden)
    np.testing.assert_allclose(
        full["act2"]["quant_scale"], 2 * jnp.maximum(v, 0).mean() / math.sqrt(2), rtol=1e-6
    )


def test_start_scales_works_under_jit():
    model, x = Chain(functools.partial(NoiseAdaptor, levels=2)), sample(16, 6)
    weights = {"params": without_scales(model.init(jax.random.key(0), x)["params"])}
    start = functools.partial(start_scales, model)
    chex.assert_trees_all_close(
        jax.jit(start)(weights, x, jax.random.key(0)), start(weights, x, jax.random.key(0))
    )


def test_start_scales_refuses_to_invent_weights():
    model, x = Chain(functools.partial(Lsq, levels=2)), sample(16, 6)
    weights = without_scales(model.init(jax.random.key(0), x)["params"])
    del weights["fc2"]["kernel"]
    with pytest.raises(ValueError, match=r"more than scales: \['fc2'\]\['kernel'\]"):
        start_scales(model, {"params": weights}, x, jax.random.key(0))


def test_projection_raises_scales_to_the_floor_and_nothing_else():
    params = {
        "conv1_norm": {"scale": jnp.array([-1.0, 2.0])},
        "act1": {"quant_scale": jnp.array(-1.0)},
        "act2": {"quant_scale": jnp.array([0.5, 0.0])},
        "act3": {"threshold": jnp.array(1e-9)},
    }
    projected = project_scales(params)
    floor = jnp.float32(SCALE_FLOOR)
    expected = {
        "conv1_norm": params["conv1_norm"],
        "act1": {"quant_scale": floor},
        "act2": {"quant_scale": jnp.array([0.5, floor])},
        "act3": {"threshold": floor},
    }
    chex.assert_trees_all_equal(projected, expected)
    chex.assert_trees_all_equal_dtypes(projected, params)
    chex.assert_trees_all_equal(project_scales(projected), projected)


def test_projection_leaves_nan_to_be_seen():
    assert jnp.isnan(
        project_scales({"act1": {"quant_scale": jnp.array(jnp.nan)}})["act1"]["quant_scale"]
    )


@pytest.mark.parametrize("floor", [0.0, -1.0, math.nan])
def test_projection_needs_a_positive_floor(floor):
    with pytest.raises(ValueError, match="floor must be positive"):
        project_scales({}, floor)


def test_is_scale_tells_a_quantizer_from_a_batch_norm():
    layer = nn.BatchNorm(use_running_average=True)
    norm = layer.init(jax.random.key(0), jnp.ones((1, 2)))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(norm)]
    assert not any(is_scale(path) for path in paths)
    for layer in (Lsq(3), NoiseAdaptor(3), ClippedRelu()):
        ((path, _),) = jax.tree_util.tree_leaves_with_path(
            layer.init(jax.random.key(0), sample(2, 2))
        )
        assert is_scale(path)


def test_mmse_relu_starts_are_those_of_the_network_with_relus():
    slot = functools.partial(Lsq, levels=2, scale_init="mmse_relu")
    model = create("digits_resnet8", 10, activation=slot)
    relus = model.clone(activation=Relu)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = jax.jit(relus.init)(jax.random.key(1), images)
    full = jax.jit(functools.partial(start_scales, model))(variables, images, jax.random.key(2))
    found = jax.jit(nadaptor.quantize(relus.apply).init)(variables, images)
    assert len(found) == 7
    for name, scale in found.items():
        layer = full["params"]
        for part in name.split("/")[1:]:
            layer = layer[part]
        assert layer["quant_scale"] == scale
