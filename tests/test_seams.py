"""Plain ReLU networks, unchanged, through the whole recipe to spikes in both codings."""

import functools
import os

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nadaptor
from nadaptor.models import create, mobilenet
from nadaptor.quantization import project_scales

CLASSES = 3


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(6, (3, 3))(x)).reshape(len(x), -1)
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(8)(x)))


def linen(key, x):
    return LinenNet().apply, LinenNet().init(key, x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(96, 8, rngs=rngs)
        self.dense2 = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.relu(self.conv2(x)).reshape(len(x), -1)
        return self.dense2(nnx.relu(self.dense1(x)))


def nnx_(key, x):
    graph, state = nnx.split(NnxNet(nnx.Rngs(key)))
    return lambda state, x: nnx.merge(graph, state)(x), state


class EquinoxNet(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(1, 4, 3, padding=1, key=keys[0]),
            jax.nn.relu,
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(4, 6, 3, padding=1, key=keys[1]),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(96, 8, key=keys[2]),
            jax.nn.relu,
            eqx.nn.Linear(8, CLASSES, key=keys[3]),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def equinox(key, x):
    arrays, static = eqx.partition(EquinoxNet(key), eqx.is_inexact_array)

    def f(arrays, images):
        return jax.vmap(eqx.combine(arrays, static))(images.transpose(0, 3, 1, 2))

    return f, arrays


def haiku(key, x):
    def net(x):
        x = hk.max_pool(jax.nn.relu(hk.Conv2D(4, 3)(x)), (2, 2, 1), (2, 2, 1), "VALID")
        x = hk.Flatten()(jax.nn.relu(hk.Conv2D(6, 3)(x)))
        return hk.Linear(CLASSES)(jax.nn.relu(hk.Linear(8)(x)))

    pure = hk.without_apply_rng(hk.transform(net))
    return pure.apply, pure.init(key, x)


def keras_(key, x):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    keras.utils.set_random_seed(0)
    images = keras.Input(x.shape[1:])
    y = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(images)
    y = keras.layers.MaxPooling2D(2)(y)
    y = keras.layers.ReLU()(keras.layers.Conv2D(6, 3, padding="same")(y))
    y = keras.layers.Dense(8, activation="relu")(keras.layers.Flatten()(y))
    model = keras.Model(images, keras.layers.Dense(CLASSES)(y))
    variables = [v.value for v in model.trainable_variables]
    return lambda variables, x: model.stateless_call(variables, [], x)[0], variables


FRAMEWORKS = {"linen": linen, "nnx": nnx_, "equinox": equinox, "haiku": haiku, "keras": keras_}


def train(logits, params, labels, key, rate):
    """Ten steps of gradient descent; returns the parameters and the loss before each step."""

    def loss(params, key):
        scores = jax.nn.log_softmax(logits(params, key))
        return -jnp.take_along_axis(scores, labels[:, None], 1).mean()

    def step(params, key):
        value, grads = jax.value_and_grad(loss)(params, key)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

    return jax.lax.scan(step, params, jax.random.split(key, 10))


@pytest.mark.parametrize("make", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_relu_network_goes_through_the_whole_recipe_unchanged(make):
    keys = jax.random.split(jax.random.key(3), 4)
    labels = jnp.arange(6) % CLASSES
    x = jax.random.normal(keys[0], (6, 8, 8, 1)) + 2 * (labels[:, None, None, None] - 1)
    f, params = make(keys[1], x)
    q = nadaptor.quantize(f, levels=2, pools=True)

    @jax.jit
    def recipe(params, x):
        params, plain = train(lambda p, _: f(p, x), params, labels, keys[2], 0.1)
        start = q.init(params, x)
        (tuned, scales), noisy = train(
            lambda both, key: q(both[1], both[0], x, key=key),
            (params, start),
            labels,
            keys[3],
            0.1,
        )
        return (params, start, plain), (tuned, project_scales(scales), noisy)

    (before, start, plain), (params, scales, noisy) = recipe(params, x)
    assert plain[-1] < plain[0]
    assert jnp.isfinite(noisy).all()
    moved = jax.tree.map(lambda a, b: jnp.any(a != b), (before, start), (params, scales))
    assert all(jax.tree.leaves(moved))
    check_both_codings(f, params, x, scales)


def check_both_codings(f, params, x, scales=None, steps=24, means=False):
    """One level and one step of rates, and the end of sums, are the quantized network.

    Sums keep its max-pools; rates have means in their place, and also keep them where `means` is.
    """
    one = nadaptor.quantize(f, levels=1, pools=True)
    kept = nadaptor.quantize(f, levels=2, pools=False)
    if scales is None:
        scales = jax.jit(functools.partial(kept.init, rule="lsq"))(params, x)

    @jax.jit
    def run(scales, params, x):
        rate = nadaptor.simulate(one, scales, params, x, num_steps=1)
        total = nadaptor.simulate(kept, scales, params, x, num_steps=steps, coding="sum")
        pairs = [(one(scales, params, x), rate), (kept(scales, params, x), total)]
        if means:
            pooled = nadaptor.quantize(f, levels=1, pools=False)
            options = {"num_steps": 1, "nonaffine": "running_mean"}
            rate = nadaptor.simulate(pooled, scales, params, x, **options)
            pairs.insert(0, (pooled(scales, params, x), rate))
        return pairs

    pairs = run(scales, params, x)
    quantized, total = pairs[-1]
    for logits, sim in pairs:
        size = np.abs(logits).max()
        np.testing.assert_allclose(sim.outputs[-1], logits, rtol=1e-4, atol=1e-5 * size)
        assert len(sim.spike_counts) == len(scales)
        assert all(count.sum() > 0 for count in sim.spike_counts)
    assert not means or np.abs(pairs[0][0] - pairs[1][0]).max() > 1e-3 * size
    # The images are told apart: a network that is silent would agree with anything.
    assert np.ptp(quantized, 0).max() > 1e-3 * size
    assert total.settled < steps


NETWORKS = {
    "vgg11_bn": dict(pool="max", width=4, hidden=32),
    "resnet18": dict(pool="max", width=4, stage_sizes=(1, 1)),
    "mobilenet_v2": dict(width=0.25),
}


def published(name):
    model = create(name, num_classes=CLASSES, **NETWORKS[name])
    x = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    # Moments of the batch, as after training: with zeros and ones deep layers would be silent.
    train_mode = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    for _ in range(30):
        variables = {**variables, **train_mode(variables, x)[1]}
    return model, variables, x


@pytest.mark.parametrize("name", NETWORKS)
def test_published_network_with_its_own_pools_converts_in_both_codings(name, monkeypatch):
    # Every kind of block once: without expansion, with a stride, and with its input added.
    monkeypatch.setattr(mobilenet, "_STAGES", ((1, 16, 1, 1), (6, 24, 2, 2)))
    model, variables, x = published(name)
    check_both_codings(model.apply, variables, x, steps=64, means="pool" in NETWORKS[name])
