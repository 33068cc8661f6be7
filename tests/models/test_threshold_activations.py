"""The layers that learn a threshold: their starts, their gradients, and the neurons they become."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.models import Qcfs, SlipRelu, Ttrbr, create, fold_batch_norm, project_scales

LAYERS = [Qcfs(levels=4), Qcfs(levels=4, clip="first"), SlipRelu(levels=4), Ttrbr()]
V = jnp.linspace(-3.0, 12.0, 121).reshape(11, 11)


@pytest.mark.parametrize("layer", LAYERS[:3])
def test_the_threshold_starts_at_8(layer):
    assert layer.init(jax.random.key(0), V)["params"] == {"threshold": 8.0}


@pytest.mark.parametrize("layer", [Ttrbr(), Qcfs(levels=4, data_init=True)])
def test_the_threshold_starts_at_the_maximum_where_asked(layer):
    assert layer.init(jax.random.key(0), V)["params"] == {"threshold": 12.0}


def test_each_layer_is_its_function():
    expected = [
        nadaptor.qcfs(V, 6.0, 4),
        nadaptor.qcfs(V, 6.0, 4, clip="first"),
        nadaptor.slip_relu(V, 6.0, 4),
        nadaptor.qcfs(V, 6.0, 32, clip="first"),
    ]
    variables = {"params": {"threshold": jnp.float32(6.0)}}
    for layer, y in zip(LAYERS, expected, strict=True):
        np.testing.assert_array_equal(layer.apply(variables, V), y)


def test_slip_relu_without_slope_is_qcfs_in_value_and_gradient():
    variables = {"params": {"threshold": jnp.float32(3.0)}}

    def value_and_grads(layer):
        return jax.value_and_grad(lambda w, v: (layer.apply(w, v) * v).sum(), (0, 1))(variables, V)

    slip, plain = value_and_grads(SlipRelu(levels=4, slope=0.0)), value_and_grads(Qcfs(levels=4))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), slip, plain)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_threshold_has_no_gradient_factor(layer):
    """Far above the threshold dy/dth is 1 for each element, unscaled."""
    variables = {"params": {"threshold": jnp.float32(2.0)}}
    grads = jax.grad(lambda w: layer.apply(w, jnp.full((3, 5), 9.0)).sum())(variables)
    assert grads["params"]["threshold"] == 15.0


@pytest.mark.parametrize("layer", LAYERS)
def test_a_threshold_that_an_update_drives_negative_is_projected(layer):
    variables = layer.init(jax.random.key(0), V)
    updated = jax.tree.map(lambda th: th - 100.0, variables)
    assert layer.apply(project_scales(updated), V).max() > 0


@pytest.mark.parametrize(
    ("layer", "levels", "start"), [(Qcfs, 4, 2.0), (SlipRelu, 4, 2.0), (Ttrbr, 32, 16.0)]
)
def test_networks_become_neurons_with_the_layers_threshold_and_start(layer, levels, start):
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    slot = functools.partial(layer, levels=levels)
    model = create("digits_resnet8", 10, activation=slot)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    folded = jax.eval_shape(fold_batch_norm, variables)
    net = nadaptor.spiking(model.clone(norm=None).apply, folded, images)
    assert {(n.threshold, n.start) for n in net.layers} == {(levels, start)}


def test_a_floor_shift_moves_the_start_of_the_neuron():
    layer = SlipRelu(levels=4, floor_shift=0.25)
    net = nadaptor.spiking(layer.apply, layer.init(jax.random.key(0), V), V)
    assert net.layers[0].start == 1.0


@pytest.mark.parametrize("make", [Qcfs, SlipRelu, Ttrbr])
def test_bad_levels_are_refused_when_the_layer_is_built(make):
    with pytest.raises(ValueError, match="levels must be a positive int"):
        make(levels=0)


def test_an_unknown_clip_order_and_slope_are_refused():
    layers = [(Qcfs(levels=4, clip="middle"), "'middle'"), (SlipRelu(levels=4, slope=2.0), "2.0")]
    for layer, message in layers:
        with pytest.raises(ValueError, match=message):
            layer.init(jax.random.key(0), V)
