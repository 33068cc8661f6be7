"""What mixes the examples of a batch is refused where that is certain, and nothing else is."""

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

RANDOM = np.random.default_rng(0)
W = jnp.asarray(RANDOM.normal(size=(8, 8)), jnp.float32)
X = jnp.asarray(RANDOM.normal(size=(6, 8)), jnp.float32)
IMAGES = jnp.asarray(RANDOM.normal(size=(4, 8, 8, 2)), jnp.float32)
FILTERS = jnp.asarray(RANDOM.normal(size=(3, 3, 2, 4)), jnp.float32)


def simulate(f, *args, **options):
    q = nadaptor.quantize(f)
    return nadaptor.simulate(q, q.init(*args), *args, num_steps=2, **options)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        norm = nn.BatchNorm(use_running_average=not train)
        return nn.Dense(3)(nn.relu(nn.Sequential([nn.Conv(4, (3, 3)), norm])(x)).mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x))).mean((1, 2))


def linen(train):
    variables = Net().init(jax.random.key(0), IMAGES)

    def f(variables, x):
        return Net().apply(variables, x, train=train, mutable=["batch_stats"])[0]

    return f, variables, IMAGES


def nnx_net(train):
    net = NnxNet(nnx.Rngs(0))
    (net.train if train else net.eval)()
    graph, state = nnx.split(net)
    return lambda state, x: nnx.merge(graph, state, copy=True)(x), state, IMAGES


def equinox(train):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(8, "batch", mode="ema")
    leaves, tree = jax.tree.flatten(state)
    norm = norm if train else eqx.nn.inference_mode(norm)

    def f(x):
        state = jax.tree.unflatten(tree, leaves)
        mapped = jax.vmap(lambda x: norm(W @ x, state)[0], axis_name="batch")
        return jax.nn.relu(mapped(x)) @ W

    return f, X


def haiku(train):
    def make(x):
        return jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), train))

    net = hk.without_apply_rng(hk.transform_with_state(make))
    params, state = hk.transform_with_state(
        lambda x: hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), True)
    ).init(jax.random.key(0), X)
    return lambda params, x: net.apply(params, state, x)[0], params, X


def keras_net(train):
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    x = keras.Input((8,))
    y = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Dense(4)(x)))
    model = keras.Model(x, y)
    params = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]
    return lambda p, x: model.stateless_call(p, state, x, training=train)[0], params, X


@pytest.mark.parametrize("make", [linen, nnx_net, equinox, haiku, keras_net])
def test_a_batch_norm_in_training_is_refused_with_its_remedy(make):
    with pytest.raises(
        ValueError, match=r"test_examples.py:\d+.* measures the batch .*use_running_average=True"
    ):
        simulate(*make(train=True))
    simulate(*make(train=False))


def patches(x):
    tokens = x.reshape(-1, 2) @ jnp.ones((2, 8))
    tokens = jax.nn.relu(tokens).reshape(x.shape[0], 64, 8)
    return tokens.mean(1)


def conv(x):
    return jax.lax.conv_general_dilated(
        x, FILTERS, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


APART = {
    "features": (lambda x: jax.nn.relu(x @ W).mean(-1), X),
    "cumulative": (lambda x: jnp.cumsum(jax.nn.relu(jnp.cumsum(x @ W, 1)), 1), X),
    "layer norm": (lambda x: jax.nn.relu(jax.nn.standardize(x @ W, axis=-1)) @ W, X),
    "softmax before": (lambda x: jax.nn.relu(jax.nn.softmax(x) @ W), X),
    "shifted by the maximum": (lambda x: jax.nn.relu((x - x.max()) @ W), X),
    "flatten": (lambda x: jax.nn.relu(x.reshape(x.shape[0], -1) @ jnp.ones((128, 3)) + 9), IMAGES),
    "merged with patches": (patches, IMAGES),
    "vmap": (jax.vmap(lambda x: jax.nn.relu(W @ x).sum(0)), X),
    "vmapped convolution": (jax.vmap(lambda x: jax.nn.relu(conv(x[None])[0]).sum()), IMAGES),
    "attention": (
        lambda x: jax.nn.relu(
            jax.nn.softmax(jnp.einsum("bhwc,bhvc->bhwv", x, x)).sum(1) @ jnp.ones((8, 3))
        ).sum((1, 2)),
        IMAGES,
    ),
    "scan": (
        lambda x: jax.nn.relu(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), 0), x, W[None])[0] @ W),
        X,
    ),
}


@pytest.mark.parametrize("case", APART)
def test_what_treats_each_example_by_itself_is_taken(case):
    f, x = APART[case]
    simulate(f, x, in_axes=(None, 0))
    simulate(f, x, in_axes=(None, 0), tile_size=1)


def test_a_number_that_is_only_printed_mixes_nothing(capfd):
    def f(x):
        jax.debug.print("{}", x.mean())
        return jax.nn.relu(x @ W)

    simulate(f, X, in_axes=(None, 0))


MIXED = {
    "mean": lambda x: jax.nn.relu(x @ W - (x @ W).mean(0)),
    "total mean": lambda x: jax.nn.relu(x @ W - (x @ W).mean()),
    "behind relu": lambda x: jax.nn.relu(x @ W) - jax.nn.relu(x @ W).mean(0),
    "reshaped": lambda x: jax.nn.relu(
        x.reshape(6, 2, 4).transpose(2, 0, 1).sum((1, 2)) + x @ W[:, :4]
    ),
    "gram": lambda x: jax.nn.relu(x @ (x.T @ x)),
    "cumulative": lambda x: jax.nn.relu(jnp.cumsum(x @ W, 0)),
    "custom": lambda x: jax.nn.relu(jax.nn.softmax(x, 0) @ W),
    "vmap": jax.vmap(
        lambda x: jax.nn.relu(W @ x - jax.lax.pmean(W @ x, "batch")), axis_name="batch"
    ),
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("options", [{}, {"tile_size": 2}, {"devices": jax.devices()[:2]}])
def test_a_sum_over_the_axis_of_the_examples_is_refused(case, options):
    with pytest.raises(ValueError, match=r"in_axes says .* at .*test_examples.py:\d+ adds up over"):
        simulate(MIXED[case], X, in_axes=(None, 0), **options)


def test_frames_are_followed_without_the_axis_of_time():
    frames = jnp.stack([X[:4], X[2:]])
    options = dict(num_steps=2, over_time=-1, in_axes=(None, 0))
    nadaptor.simulate(lambda w, x: nadaptor.lsq(x @ w, 0.5, 2).sum(-1), W, frames, **options)
    with pytest.raises(ValueError, match="adds up over"):
        nadaptor.simulate(
            lambda w, x: nadaptor.lsq(x @ w - x.mean(0), 0.5, 2), W, frames, **options
        )


def test_without_in_axes_the_first_axis_may_be_of_features():
    simulate(lambda w, x: jax.nn.relu(w @ x - (w @ x).mean(0)), W, X.T)
    simulate(lambda w, x: jax.nn.relu(w @ x), W, X.T[:, 0])
