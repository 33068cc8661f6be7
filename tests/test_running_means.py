"""Running means: what is not affine acts on the mean of its inputs, and ends at the right value."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import nadaptor
from nadaptor.analysis import layer_errors
from nadaptor.early_exit import early_exit, simulate_with_early_exit
from nadaptor.neurons import triangle

DIMS = ("NHWC", "HWIO", "NHWC")


def dyadic(*shape):
    """Random eighths: sums and products of them are exact, in any order."""
    seed = np.random.default_rng(sum(shape))
    return jnp.asarray(seed.integers(-8, 9, shape) / 8, jnp.float32)


def conv(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMS)


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def lsq(levels):
    return functools.partial(nadaptor.lsq, scale=1 / levels, levels=levels)


def clipped(v):
    return jnp.clip(v, 0, 1)


def cnn(act, x):
    x = max_pool(act(conv(x, dyadic(3, 3, 2, 4))))
    return act(conv(x, dyadic(3, 3, 4, 4)) + 0.125).mean((1, 2)) @ dyadic(4, 3)


def transformer(act, x):
    random = np.random.default_rng(0)
    weights = iter(random.standard_normal((6, 8, 8), np.float32) / 8**0.5)
    x = act(x @ next(weights))
    q, k, v = (act(layer_norm(x) @ next(weights)) for _ in range(3))
    attention = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / 8**0.5)
    x = x + act((attention @ v) @ next(weights))
    return layer_norm(x).mean(1) @ next(weights)


IMAGES = dyadic(4, 8, 8, 2)
TOKENS = np.random.default_rng(1).standard_normal((3, 5, 8), np.float32)
NETWORKS = {"cnn": (cnn, IMAGES), "transformer": (transformer, TOKENS)}


def simulate(f, *args, **options):
    options = {"num_steps": 4, "nonaffine": "running_mean", **options}
    return jax.jit(functools.partial(nadaptor.simulate, f, **options))(*args)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_level_and_one_step_are_the_quantized_network(name):
    f, x = functools.partial(NETWORKS[name][0], lsq(1)), NETWORKS[name][1]
    error = 1e-5 if name == "transformer" else 0
    outputs = simulate(f, x, num_steps=1).outputs[0]
    np.testing.assert_allclose(outputs, jax.jit(f)(x), rtol=error, atol=error)


@pytest.mark.parametrize("name", NETWORKS)
def test_distance_to_the_clipped_network_falls_as_one_over_T(name):
    f, x = NETWORKS[name]
    outputs = simulate(functools.partial(f, lsq(2)), x, num_steps=256).outputs
    wanted = jax.jit(functools.partial(f, clipped))(x)
    error = np.abs(outputs - wanted).mean(tuple(range(1, outputs.ndim)))
    # At one t it depends on the last bits; over t to 2t it is an eighth of that at t/8.
    short, middle, long = (error[t : 2 * t].mean() for t in (4, 32, 128))
    assert middle < short / 4 and long < middle / 2.5


def by_hand(x, w1, w2, num_steps):
    """A loop over two layers of two levels with a product of two spiking values between them."""
    u1, u2, total, sent, out = np.full(4, 1.0), np.full(3, 1.0), np.zeros(4), np.zeros(3), []
    sums = np.zeros(3)
    for t in range(1, num_steps + 1):
        u1 = u1 + 2 * (x @ w1)
        spikes = 2.0 * (u1 >= 2)
        u1, total = u1 - spikes, total + spikes / 2
        arrived = t * ((total / t) ** 2 @ w2) * 2
        u2, sent = u2 + arrived - sent, arrived
        spikes = 2.0 * (u2 >= 2)
        u2, sums = u2 - spikes, sums + spikes / 2
        out.append(sums / t)
    return np.array(out)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_simulation_is_the_loop_by_hand_however_steps_are_grouped(chunk):
    x, w1, w2 = (np.asarray(dyadic(*s)) for s in ((5,), (5, 4), (4, 3)))

    def f(x):
        first = nadaptor.lsq(x @ w1, 0.5, 2)
        return nadaptor.lsq((first * first) @ w2, 0.5, 2)

    sim = simulate(f, x, num_steps=8, steps_per_chunk=chunk)
    np.testing.assert_allclose(sim.outputs, by_hand(x, w1, w2, 8), rtol=1e-6)


def test_steps_by_hand_are_the_simulation():
    f = functools.partial(cnn, lsq(2))
    net = nadaptor.spiking(f, IMAGES, nonaffine="running_mean")
    prepared = net.prepare(IMAGES)
    _, each = lax.scan(lambda s, _: net.step(s, prepared), net.init(prepared), length=4)
    means = jnp.cumsum(each, 0) / jnp.arange(1, 5).reshape(-1, 1, 1)
    np.testing.assert_allclose(simulate(f, IMAGES).outputs, means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"in_axes": 0, "tile_size": 3}, {"in_axes": 0, "devices": jax.devices()[:2]}],
    ids=["tiles", "devices"],
)
def test_how_it_is_run_changes_nothing(options):
    f = functools.partial(cnn, lsq(2))
    whole = simulate(f, IMAGES, steps_per_chunk=4)
    chex.assert_trees_all_close(simulate(f, IMAGES, **options), whole, rtol=1e-6)


def test_corrections_errors_and_early_exit_work_on_means():
    f = functools.partial(cnn, lsq(2))
    for correction in (nadaptor.OffsetSpikes(4), nadaptor.Srp(4)):
        sim = simulate(f, IMAGES, correction=correction)
        assert jnp.isfinite(sim.outputs).all() and sim.total_steps == 8
    options = dict(num_steps=4, nonaffine="running_mean")
    assert max(map(float, layer_errors(f, IMAGES, **options).values())) < 0.5
    exits = simulate_with_early_exit(f, IMAGES, confidence=0.45, **options)
    wanted = early_exit(simulate(f, IMAGES).outputs, jnp.array([0.45]))
    chex.assert_trees_all_equal(exits, wanted)


def test_output_that_is_a_mean_is_returned_as_it_is():
    sim = simulate(lambda v: jax.nn.softmax(nadaptor.lsq(v, 0.5, 2)), dyadic(3, 4))
    np.testing.assert_allclose(sim.outputs.sum(-1), 1, rtol=1e-6)


def test_gradient_with_a_surrogate_passes_through_a_mean():
    def loss(x):
        sim = simulate(
            functools.partial(cnn, lsq(2)), x, neuron=nadaptor.IntegrateAndFire(triangle)
        )
        return sim.outputs[-1].sum()

    grad = jax.grad(loss)(IMAGES)
    assert jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0


def test_layers_and_analog_operations_are_listed():
    net = nadaptor.spiking(functools.partial(cnn, lsq(2)), IMAGES, nonaffine="running_mean")
    assert [layer.from_mean for layer in net.layers] == [False, True]
    assert any("max_pool" in op and __file__ in op for op in net.analog)


def test_a_mean_costs_nothing_where_it_is_not_used():
    def f(x):
        return nadaptor.lsq(conv(nadaptor.lsq(x, 0.5, 2), dyadic(3, 3, 2, 4)), 0.25, 2)

    programs = [
        str(
            jax.make_jaxpr(functools.partial(nadaptor.simulate, f, num_steps=3, nonaffine=n))(
                IMAGES
            )
        )
        for n in ("refuse", "running_mean")
    ]
    assert programs[0] == programs[1]
    assert nadaptor.spiking(f, IMAGES, nonaffine="running_mean").analog == ()


def test_own_neuron_serves():
    class Twice(nadaptor.IntegrateAndFire):
        """Sees every current doubled."""

        def step(self, state, x, threshold):
            return super().step(state, 2 * x, threshold)

    f = functools.partial(cnn, lsq(2))
    assert (simulate(f, IMAGES, neuron=Twice()).outputs != simulate(f, IMAGES).outputs).any()


class Pooled(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = nnx.max_pool(nadaptor.lsq(self.conv(x), 0.5, 1), (2, 2), (2, 2))
        return nadaptor.lsq(x.mean((1, 2)), 0.5, 1)


def equinox_network():
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, padding=1, key=jax.random.key(0)),
            eqx.nn.Lambda(lambda x: nadaptor.lsq(x, 0.5, 1)),
            eqx.nn.MaxPool2d(2, 2),
        ]
    )
    return lambda x: jax.vmap(net)(x.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("make", [Pooled, equinox_network], ids=["nnx", "equinox"])
def test_modules_are_their_quantized_network_at_one_step(make):
    f = make()
    outputs = simulate(f, IMAGES, num_steps=1).outputs[0]
    np.testing.assert_allclose(outputs, jax.jit(f)(IMAGES), rtol=1e-6)


def test_refusal_names_both_options_and_what_stays_refused_is():
    f = functools.partial(cnn, lsq(2))
    with pytest.raises(ValueError, match="nonaffine='running_mean', or on sums, coding='sum'"):
        nadaptor.spiking(f, IMAGES)
    with pytest.raises(ValueError, match="sums may go through any operation"):
        nadaptor.spiking(f, IMAGES, coding="sum", nonaffine="running_mean")

    def random(x):
        x = max_pool(nadaptor.lsq(x, 0.5, 2))
        return x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)

    with pytest.raises(ValueError, match="draws random numbers"):
        nadaptor.spiking(random, IMAGES, nonaffine="running_mean")
