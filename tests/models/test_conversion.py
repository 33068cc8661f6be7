"""Our own networks as spiking networks: the identities of the conversion, folded and not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.models import Lsq, create, fold_batch_norm

IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 1)), jnp.float32)


def network(name, levels, images, num_classes=10):
    """A network with batch-norm statistics of its own, not those of initialisation."""
    model = create(name, num_classes=num_classes, activation=functools.partial(Lsq, levels=levels))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    for _ in range(2):
        variables = {**variables, **train(variables, images)[1]}
    return model, variables


@pytest.mark.parametrize("folded", [False, True])
def test_one_level_and_one_step_give_the_logits_of_the_quantized_network(folded):
    """Identity (b): at p = 1 a neuron's first step is the quantizer's rounding."""
    model, variables = network("digits_resnet8", 1, IMAGES)
    if folded:
        model, variables = model.clone(norm=None), fold_batch_norm(variables)
    ann = jax.jit(model.apply)(variables, IMAGES)
    sim = jax.jit(functools.partial(nadaptor.simulate, model.apply, num_steps=1))(variables, IMAGES)
    np.testing.assert_allclose(sim.outputs[0], ann, rtol=1e-4, atol=1e-5)
    assert len(sim.spike_counts) == 7
    assert sum(int(c.sum()) for c in sim.spike_counts) > 0


def test_folding_keeps_the_spiking_network():
    """Identity (d) for spikes: float rounding may flip a few, and no more."""
    model, variables = network("digits_resnet8", 2, IMAGES)
    plain = jax.jit(functools.partial(nadaptor.simulate, model.apply, num_steps=4))
    folded = jax.jit(
        functools.partial(nadaptor.simulate, model.clone(norm=None).apply, num_steps=4)
    )
    counts = [plain(variables, IMAGES), folded(fold_batch_norm(variables), IMAGES)]
    pairs = zip(*(sim.spike_counts for sim in counts), strict=True)
    changed = sum(int((a != b).sum()) for a, b in pairs)
    assert changed <= 0.01 * sum(c.size for c in counts[0].spike_counts)


def of_two_levels(name, **options):
    return create(name, num_classes=20, activation=functools.partial(Lsq, levels=2), **options)


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 17), ("resnet50", 49)])
def test_imagenet_networks_have_a_spiking_layer_for_each_activation(name, layers):
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    model = of_two_levels(name, norm=None)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert len(nadaptor.spiking(model.apply, variables, images).layers) == layers


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 5), ("resnet50", 7)])
def test_both_blocks_convert_and_run_behind_the_imagenet_stem(name, layers):
    images = jax.random.normal(jax.random.key(2), (1, 32, 32, 3))
    model = of_two_levels(name, stage_sizes=(1, 1), width=16)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    folded, weights = model.clone(norm=None), fold_batch_norm(variables)
    sim = jax.jit(functools.partial(nadaptor.simulate, folded.apply, num_steps=2))(weights, images)
    assert sim.outputs.shape == (2, 1, 20)
    assert len(sim.spike_counts) == layers
    assert bool(jnp.isfinite(sim.outputs).all())
    assert int(sim.spike_counts[-1].sum()) > 0


def test_layers_carry_the_names_of_the_modules():
    model = create("digits_resnet20", num_classes=10, activation=functools.partial(Lsq, levels=2))
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    net = nadaptor.spiking(model.apply, variables, IMAGES)
    assert net.layers[0].name == "ResNet/act1"
    assert net.layers[-1].name.endswith("act2")
    assert "layer3_2" in net.layers[-1].name
    assert all(layer.threshold == 2 and layer.start == 1.0 for layer in net.layers)


def test_batch_norm_in_training_mode_is_refused_with_what_to_do():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nadaptor.lsq(nn.Dense(4)(x), 0.5, levels=2)
            return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))

    x = jnp.ones((3, 4))
    variables = Net().init(jax.random.key(0), x)

    def f(variables, x):
        return Net().apply(variables, x, mutable=["batch_stats"])[0]

    with pytest.raises(ValueError, match=r"BatchNorm_0 .*batch norm with running averages"):
        nadaptor.spiking(f, variables, x)
