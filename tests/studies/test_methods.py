"""What the methods promise of whole networks: limits over time, and corrections that help."""

import functools

import jax
import jax.numpy as jnp
import pytest

import nadaptor
from nadaptor.configs.build import build_model
from nadaptor.configs.inference import get_inference
from nadaptor.conversion.convert import build_folded
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_split
from nadaptor.training import CONFIGS, get_config, load_snn

pytestmark = pytest.mark.usefixtures("optimized")

THRESHOLD = 1.5
METHODS = {
    "lsq": lambda v: nadaptor.lsq(v, THRESHOLD / 4, 4),
    "noise_adaptor": lambda v: nadaptor.noise_adaptor(jax.random.key(0), v, THRESHOLD / 4, 4),
    "qcfs": lambda v: nadaptor.qcfs(v, THRESHOLD, 4),
    "slip_relu": lambda v: nadaptor.slip_relu(v, THRESHOLD, 4),
    "ttrbr": lambda v: nadaptor.qcfs(v, THRESHOLD, 32, clip="first"),
    "clipped_relu": lambda v: nadaptor.clipped_relu(v, THRESHOLD),
}


def network(activation, weights, x):
    for w in weights:
        x = activation(x @ w)
    return x @ weights[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tends_to_its_own_network_with_clipped_relus(method):
    weights = jax.random.normal(jax.random.key(1), (3, 24, 24)) * 0.3
    x = jax.random.normal(jax.random.key(2), (16, 24))
    f = functools.partial(network, METHODS[method])
    sim = jax.jit(functools.partial(nadaptor.simulate, f, num_steps=256))(weights, x)
    wanted = network(METHODS["clipped_relu"], weights, x)
    error = jnp.abs(sim.outputs - wanted).mean((1, 2))
    assert error[255] < 0.1 * error[7]
    assert error[255] < 0.02 * jnp.abs(wanted).mean()


def test_offset_spikes_help_a_trained_network_at_T_equal_rho(runs):
    model, variables, config = load_snn(runs / "digits_na" / "snn")
    images = load_images(open_split(config.data, "validation", limit=64)).images
    ann = jax.jit(model.apply)(variables, images)

    def error(name):
        chosen = get_inference(name, 2)
        run = functools.partial(
            nadaptor.simulate,
            model.apply,
            num_steps=2,
            neuron=chosen.neuron,
            correction=chosen.correction,
        )
        return float(jnp.abs(jax.jit(run)(variables, images).outputs[-1] - ann).mean())

    assert error("offset-spikes") < 0.5 * error("none")
    assert error("offset-spikes-published") < 0.5 * error("none")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("digits_")])
def test_the_converted_network_of_every_config_has_its_own_activation_without_noise(name):
    config = get_config(name)
    trained, folded = build_model(config), build_folded(config)
    expected = "Lsq" if config.quantizer.activation == "noise_adaptor" else layer_of(trained)
    assert layer_of(folded) == expected
    assert folded.norm is None


def layer_of(model):
    return getattr(model.activation, "func", model.activation).__name__
