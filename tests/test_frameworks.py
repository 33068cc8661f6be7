"""One network written with each of the libraries: all convert unchanged, to the same network."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nadaptor

LEVELS = 2


def dyadic(*shape):
    """Random eighths: sums and products of them are exact, in any order."""
    seed = np.random.default_rng(sum(shape))
    return jnp.asarray(seed.integers(-8, 9, shape) / 8, jnp.float32)


WEIGHTS = {
    "conv1": (dyadic(3, 3, 2, 4), dyadic(4)),
    "act1": jnp.float32(0.5),
    "conv2": (dyadic(3, 3, 4, 6), dyadic(6)),
    "act2": jnp.float32(0.25),
    "dense1": (dyadic(6, 5), dyadic(5)),
    "act3": jnp.float32(0.125),
    "dense2": (dyadic(5, 3), dyadic(3)),
}
IMAGES = dyadic(3, 8, 8, 2)


def activation(v, scale):
    return nadaptor.lsq(v, scale, LEVELS)


def plain(weights, x):
    def conv(x, name):
        kernel, bias = weights[name]
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return x + bias

    x = activation(conv(x, "conv1"), weights["act1"])
    x = x.reshape(-1, 4, 2, 4, 2, 4).mean((2, 4))
    x = activation(conv(x, "conv2"), weights["act2"]).mean((1, 2))
    x = activation(x @ weights["dense1"][0] + weights["dense1"][1], weights["act3"])
    return x @ weights["dense2"][0] + weights["dense2"][1]


class LinenAct(nn.Module):
    @nn.compact
    def __call__(self, x):
        return activation(x, self.param("scale", nn.initializers.ones, ()))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv1")(x)
        x = LinenAct(name="act1")(x)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.Conv(6, (3, 3), name="conv2")(x)
        x = LinenAct(name="act2")(x).mean((1, 2))
        x = nn.Dropout(0.5, deterministic=True)(x)
        x = LinenAct(name="act3")(nn.Dense(5, name="dense1")(x))
        return nn.Dense(3, name="dense2")(x)


def linen():
    def params(weight):
        kind = {"scale": weight} if isinstance(weight, jax.Array) else None
        return kind or dict(zip(("kernel", "bias"), weight, strict=True))

    variables = {"params": {name: params(weight) for name, weight in WEIGHTS.items()}}
    return LinenNet().apply, (variables, IMAGES)


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(6, 5, rngs=rngs)
        self.dense2 = nnx.Linear(5, 3, rngs=rngs)
        for name in ("conv1", "conv2", "dense1", "dense2"):
            getattr(self, name).kernel, getattr(self, name).bias = map(nnx.Param, WEIGHTS[name])
        self.act1, self.act2, self.act3 = (nnx.Param(WEIGHTS[f"act{i}"]) for i in (1, 2, 3))

    def __call__(self, x):
        x = activation(self.conv1(x), self.act1[...])
        x = nnx.avg_pool(x, (2, 2), (2, 2))
        x = activation(self.conv2(x), self.act2[...]).mean((1, 2))
        x = activation(self.dense1(x), self.act3[...])
        return self.dense2(x)


def nnx_():
    graph, state = nnx.split(NnxNet())
    return lambda state, x: nnx.merge(graph, state)(x), (state, IMAGES)


class EquinoxNet(eqx.Module):
    """One image, channels first, as Equinox has it; `vmap` adds the batch."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    pool: eqx.nn.AvgPool2d
    dense1: eqx.nn.Linear
    dense2: eqx.nn.Linear
    scales: list[jax.Array]

    def __init__(self):
        keys = iter(jax.random.split(jax.random.key(0), 4))

        def filled(layer, weight):
            kernel, bias = weight
            kernel = kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
            bias = bias.reshape(layer.bias.shape)
            return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (kernel, bias))

        self.conv1 = filled(eqx.nn.Conv2d(2, 4, 3, padding=1, key=next(keys)), WEIGHTS["conv1"])
        self.conv2 = filled(eqx.nn.Conv2d(4, 6, 3, padding=1, key=next(keys)), WEIGHTS["conv2"])
        self.pool = eqx.nn.AvgPool2d(2, 2)
        self.dense1 = filled(eqx.nn.Linear(6, 5, key=next(keys)), WEIGHTS["dense1"])
        self.dense2 = filled(eqx.nn.Linear(5, 3, key=next(keys)), WEIGHTS["dense2"])
        self.scales = [WEIGHTS[f"act{i}"] for i in (1, 2, 3)]

    def __call__(self, x):
        x = self.pool(activation(self.conv1(x), self.scales[0]))
        x = activation(self.conv2(x), self.scales[1]).mean((1, 2))
        return self.dense2(activation(self.dense1(x), self.scales[2]))


def equinox():
    arrays, static = eqx.partition(EquinoxNet(), eqx.is_array)

    def f(arrays, images):
        return jax.vmap(eqx.combine(arrays, static))(images.transpose(0, 3, 1, 2))

    return f, (arrays, IMAGES)


def haiku():
    def act(x, name):
        return activation(x, hk.get_parameter(name, (), init=jnp.ones))

    def net(x):
        x = act(hk.Conv2D(4, 3, name="conv1")(x), "act1")
        x = hk.avg_pool(x, (2, 2, 1), (2, 2, 1), "VALID")
        x = act(hk.Conv2D(6, 3, name="conv2")(x), "act2").mean((1, 2))
        x = act(hk.Linear(5, name="dense1")(x), "act3")
        return hk.Linear(3, name="dense2")(x)

    layers = {k: v for k, v in WEIGHTS.items() if isinstance(v, tuple)}
    params = {k: dict(zip(("w", "b"), v, strict=True)) for k, v in layers.items()}
    params["~"] = {k: v for k, v in WEIGHTS.items() if k not in layers}
    return hk.without_apply_rng(hk.transform(net)).apply, (params, IMAGES)


FRAMEWORKS = {"linen": linen, "nnx": nnx_, "equinox": equinox, "haiku": haiku}


@functools.cache
def expected():
    run = functools.partial(nadaptor.simulate, plain, num_steps=3)
    return jax.jit(plain)(WEIGHTS, IMAGES), jax.jit(run)(WEIGHTS, IMAGES)


@pytest.mark.parametrize("make", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_network_is_the_same_whatever_it_is_written_with(make):
    f, args = make()
    options = dict(steps_per_chunk=2, in_axes=(None, 0), tile_size=2)

    @jax.jit
    def evaluate(*args):
        whole = nadaptor.simulate(f, *args, num_steps=3)
        return f(*args), whole, nadaptor.simulate(f, *args, num_steps=3, **options)

    logits, sim, tiled = evaluate(*args)
    np.testing.assert_array_equal(logits, expected()[0])
    np.testing.assert_array_equal(sim.outputs, expected()[1].outputs)
    totals = [[int(count.sum()) for count in s.spike_counts] for s in (sim, expected()[1])]
    assert totals[0] == totals[1]
    assert min(totals[0]) > 0
    chex.assert_trees_all_equal(tiled, sim)


def test_layers_are_named_after_the_modules_of_linen():
    f, args = linen()
    names = [layer.name for layer in nadaptor.spiking(f, *args).layers]
    assert names == ["LinenNet/act1", "LinenNet/act2", "LinenNet/act3"]


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x = nadaptor.noise_adaptor(self.make_rng("noise"), x, 0.5, LEVELS)
        return nn.Dense(2)(x)


def test_noisy_linen_network_converts_with_the_noise_left_on():
    x = dyadic(5, 3)
    variables = Noisy().init({"params": jax.random.key(0), "noise": jax.random.key(1)}, x)

    def f(variables, x, key):
        return Noisy().apply(variables, x, rngs={"noise": key})

    sims = [
        nadaptor.simulate(f, variables, x, jax.random.key(seed), num_steps=3) for seed in (2, 3)
    ]
    chex.assert_trees_all_equal(*sims)


def test_remat_and_scanned_layers_of_linen_convert():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return activation(nn.Dense(4, use_bias=False)(x), 0.5), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            over = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return nn.scan(nn.remat(Block), **over)()(x, None)[0]

    x = dyadic(2, 4)
    variables = Scanned().init(jax.random.key(0), x)
    (kernels,) = jax.tree.leaves(variables)

    def looped(kernels, x):
        for kernel in kernels:
            x = activation(x @ kernel, 0.5)
        return x

    sim = nadaptor.simulate(Scanned().apply, variables, x, num_steps=4)
    expected = nadaptor.simulate(looped, kernels, x, num_steps=4)
    np.testing.assert_allclose(sim.outputs, expected.outputs, rtol=1e-6)
    assert len(sim.spike_counts) == 3
