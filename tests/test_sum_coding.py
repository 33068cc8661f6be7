"""Sum coding: it ends at the quantized network, whatever its operations, and falls silent."""

import functools
from typing import ClassVar, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import nadaptor
from nadaptor.analysis import layer_errors
from nadaptor.calibration import calibrate_thresholds
from nadaptor.early_exit import early_exit, simulate_with_early_exit
from nadaptor.neurons import rectangle

DIMS = ("NHWC", "HWIO", "NHWC")


def dyadic(*shape):
    """Random eighths: sums and products of them are exact, in any order."""
    seed = np.random.default_rng(sum(shape))
    return jnp.asarray(seed.integers(-8, 9, shape) / 8, jnp.float32)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def conv(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMS)


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def cnn(levels, x):
    x = max_pool(nadaptor.lsq(conv(x, dyadic(3, 3, 2, 4)), 0.5, levels))
    x = nadaptor.lsq(conv(x, dyadic(3, 3, 4, 4)) + 0.125, 0.25, levels)
    return max_pool(x).mean((1, 2)) @ dyadic(4, 3)


def transformer(levels, x):
    """Two blocks of softmax attention, layer norm and a quantized layer between residuals."""
    weights = iter([random(i, 8, 8) / 8**0.5 for i in range(12)])
    act = functools.partial(nadaptor.lsq, scale=1 / levels, levels=levels)
    x = act(x @ next(weights))
    for _ in range(2):
        q, k, v = (act(layer_norm(x) @ next(weights)) for _ in range(3))
        attention = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / 8**0.5)
        x = x + act((attention @ v) @ next(weights))
        x = x + act(layer_norm(x) @ next(weights))
    return layer_norm(x).mean(1) @ next(weights)


def u_net(levels, x):
    act = functools.partial(nadaptor.lsq, scale=0.5, levels=levels)
    wide = act(conv(x, dyadic(3, 3, 2, 4)))
    deep = act(conv(max_pool(wide), dyadic(3, 3, 4, 8)))
    deep = act(conv(deep, dyadic(3, 3, 8, 4)))
    up = jnp.repeat(jnp.repeat(deep, 2, 1), 2, 2)
    return conv(act(conv(jnp.concatenate([wide, up], -1), dyadic(3, 3, 8, 4))), dyadic(1, 1, 4, 2))


IMAGES, TOKENS = dyadic(4, 8, 8, 2), random(20, 3, 5, 8)
NETWORKS = {"cnn": (cnn, IMAGES), "transformer": (transformer, TOKENS), "u_net": (u_net, IMAGES)}


def simulate(f, *args, **options):
    options = {"num_steps": 24, "coding": "sum", **options}
    return jax.jit(functools.partial(nadaptor.simulate, f, **options))(*args)


def test_neuron_moves_its_count_one_level_a_step_to_the_quantized_total():
    """Against a loop over the published neuron: threshold one level, start 1/2, bounded count."""
    totals = np.random.default_rng(0).uniform(-2, 6, (40, 30)).astype(np.float32)
    neuron, levels = nadaptor.StBif(), 4
    state, count = neuron.init((30,), levels, levels / 2), np.zeros(30)
    for x in totals:
        u = x - count + 0.5
        count = count + ((u >= 1) & (count < levels)) - ((u < 0) & (count > 0))
        state, sent = neuron.step(state, x, levels)
        np.testing.assert_array_equal(sent, count)


@pytest.mark.parametrize("levels", [1, 2, 3, 7])
def test_one_layer_is_the_quantizer_after_as_many_steps_as_levels_ties_included(levels):
    ties = (np.arange(-2, levels + 2) + 0.5).astype(np.float32) * np.float32(0.3)
    v = np.concatenate([ties, np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf)])
    for f in (
        lambda v: nadaptor.lsq(v, 0.3, levels),
        lambda v: nadaptor.qcfs(v, 0.3 * levels, levels),
        lambda v: nadaptor.slip_relu(v, 0.3 * levels, levels, slope=0.0, floor_shift=0.25),
    ):
        sim = simulate(f, v, num_steps=levels + 1)
        np.testing.assert_array_equal(sim.outputs[levels - 1], jax.jit(f)(v))
        assert sim.settled == levels


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_ends_at_the_quantized_one_and_settled_says_when(name, levels):
    f, x = functools.partial(NETWORKS[name][0], levels), NETWORKS[name][1]
    sim, wanted = simulate(f, x), jax.jit(f)(x)
    settled = int(sim.settled)
    assert (settled == 1) if levels == 1 else (1 < settled < 24)
    # Softmax and layer norm round as the compiler orders their sums; all else here is exact.
    error = 1e-5 if name == "transformer" else 0
    np.testing.assert_allclose(sim.outputs[-1], wanted, rtol=error, atol=error)
    chex.assert_trees_all_equal(sim.outputs[settled - 1], sim.outputs[-1])
    assert levels == 1 or (sim.outputs[0] != sim.outputs[-1]).any()


def test_positive_minus_negative_spikes_is_the_quantized_activation():
    # The second layer sees the small input first, and that the large one outweighs it later.
    v, w = jnp.array([[0.125, 0.5], [0.25, 0.25], [0.0, 0.5]]), jnp.array([[4.0], [-2.0]])

    def layers(v):
        first = nadaptor.lsq(v, 0.125, 4)
        return first, nadaptor.lsq(jnp.abs(first @ w + 0.5), 0.25, 4)

    sim = simulate(lambda v: layers(v)[1], v)
    for counts, negative, a, s in zip(
        sim.spike_counts, sim.negative_counts, layers(v), (0.125, 0.25), strict=True
    ):
        np.testing.assert_array_equal((counts - 2 * negative) * s, a)
    assert sim.negative_counts[0].sum() == 0 < sim.negative_counts[1].sum()
    assert sim.total_steps == 24


def test_one_level_and_one_step_are_the_quantized_network_in_both_codings():
    def f(x):
        return nadaptor.lsq(conv(nadaptor.lsq(x, 0.5, 1), dyadic(3, 3, 2, 4)), 0.25, 1)

    both = [simulate(f, IMAGES, num_steps=1, coding=coding) for coding in ("rate", "sum")]
    chex.assert_trees_all_equal(both[0].outputs[0], both[1].outputs[0], jax.jit(f)(IMAGES))
    chex.assert_trees_all_equal(both[0].spike_counts, both[1].spike_counts)


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_chunk": 5},
        {"in_axes": 0, "tile_size": 3},
        {"in_axes": 0, "devices": jax.devices()[:2]},
    ],
    ids=["chunks", "tiles", "devices"],
)
def test_how_it_is_run_changes_nothing(options):
    f = functools.partial(cnn, 3)
    chex.assert_trees_all_equal(simulate(f, IMAGES, **options), simulate(f, IMAGES))


def test_simulation_under_shard_map_and_on_an_explicit_mesh_is_the_simulation_outside():
    def run(x):
        return nadaptor.simulate(functools.partial(cnn, 3), x, num_steps=9, coding="sum").outputs

    wanted, batch = jax.jit(run)(IMAGES), PartitionSpec("batch")
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=batch, out_specs=PartitionSpec(None, "batch"))
    np.testing.assert_array_equal(jax.jit(sharded)(IMAGES), wanted)
    with jax.set_mesh(jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Explicit,))) as mesh:
        images = jax.device_put(IMAGES, NamedSharding(jax.sharding.get_mesh(), batch))
        np.testing.assert_array_equal(jax.jit(run)(images), wanted)


def test_steps_after_the_last_spike_are_not_run():
    calls = []

    def f(v):
        q = nadaptor.lsq(v, 0.25, 2)
        spy = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return jax.pure_callback(
            lambda q: calls.append(0) or np.asarray(q), spy, q, vmap_method="expand_dims"
        )

    sim = simulate(f, dyadic(3, 2), num_steps=50)
    jax.block_until_ready(sim)
    assert int(sim.settled) == 2 and len(calls) == 3


def test_devices_that_talk_to_each_other_all_run_every_step():
    """One part settles before the other: were its steps left out, the sum would never come."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    x = jnp.array([[0.0, 0.1], [3.0, 4.0]])

    def f(x):
        return lax.pmean(nadaptor.lsq(x, 0.5, 8), "batch")

    run = functools.partial(nadaptor.simulate, f, num_steps=12, coding="sum")
    specs = dict(in_specs=PartitionSpec("batch"), out_specs=PartitionSpec())
    sharded = jax.shard_map(lambda x: run(x).outputs[-1], mesh=mesh, check_vma=False, **specs)
    np.testing.assert_array_equal(jax.jit(sharded)(x), [[1.5, 2.0]])


def test_settled_network_has_the_gradient_of_the_quantized_one():
    w, x = (dyadic(5, 4), dyadic(4, 3)), dyadic(6, 5)

    def f(w, x):
        return nadaptor.lsq(nadaptor.lsq(x @ w[0], 0.25, 3) @ w[1], 0.5, 3)

    def ends(w):
        neuron = nadaptor.StBif(rectangle)
        return simulate(f, w, x, neuron=neuron, steps_per_chunk=2).outputs[-1]

    ours = jax.grad(lambda w: (ends(w) ** 2).sum())(w)
    wanted = jax.grad(lambda w: (f(w, x) ** 2).sum())(w)
    chex.assert_trees_all_close(ours, wanted, rtol=1e-5)
    assert jnp.abs(wanted[0]).max() > 0


def test_early_exit_is_that_of_the_whole_simulation():
    def f(x):
        return 8 * cnn(3, x)

    exits = simulate_with_early_exit(
        f, IMAGES, num_steps=24, confidence=0.7, coding="sum", in_axes=0, tile_size=2
    )
    chex.assert_trees_all_equal(exits, early_exit(simulate(f, IMAGES).outputs, jnp.array([0.7])))
    assert exits.steps.min() < 24


def test_layer_errors_are_zero_at_the_end():
    f = functools.partial(cnn, 3)
    errors = [
        [float(e) for e in layer_errors(f, IMAGES, num_steps=t, coding="sum").values()]
        for t in (1, 24)
    ]
    assert min(errors[0]) > 0 and errors[1] == [0, 0]


class Eager:
    """A neuron of one's own for sum coding: it sends all that is missing at once."""

    coding: ClassVar[str] = "sum"

    def init(self, shape, threshold, start):
        return ()

    def step(self, state, x, threshold):
        return state, jnp.floor(jnp.clip(x, 0, threshold) + 0.5)


def test_own_neuron_serves():
    f = functools.partial(cnn, 4)
    sim = simulate(f, IMAGES, neuron=Eager(), num_steps=2)
    np.testing.assert_array_equal(sim.outputs[0], jax.jit(f)(IMAGES))
    assert sim.settled == 1


class EverySecond(Eager):
    """One that sends at every second step, and pauses between."""

    def init(self, shape, threshold, start):
        return jnp.zeros(shape, int), jnp.zeros(shape)

    def step(self, state, x, threshold):
        (time, sent), wanted = state, jnp.floor(jnp.clip(x, 0, threshold) + 0.5)
        sent = jnp.where(time % 2 == 0, sent + jnp.sign(wanted - sent), sent)
        return (time + 1, sent), sent


def test_a_neuron_that_pauses_ends_where_it_would():
    sim = simulate(
        lambda v: nadaptor.lsq(v, 0.25, 3), jnp.ones(1), neuron=EverySecond(), num_steps=8
    )
    np.testing.assert_array_equal(sim.outputs[:, 0], [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75])


class Pooled(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.max_pool(nadaptor.lsq(self.conv(x), 0.25, 3), (2, 2), (2, 2)).mean((1, 2))


def equinox_network():
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, padding=1, key=jax.random.key(0)),
            eqx.nn.Lambda(lambda x: nadaptor.lsq(x, 0.25, 3)),
            eqx.nn.MaxPool2d(2, 2),
        ]
    )
    return lambda x: jax.vmap(net)(x.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("make", [Pooled, equinox_network], ids=["nnx", "equinox"])
def test_modules_end_at_their_quantized_network(make):
    f = make()
    np.testing.assert_allclose(simulate(f, IMAGES).outputs[-1], jax.jit(f)(IMAGES), rtol=1e-6)


class Wrong(NamedTuple):
    f: object
    options: dict
    words: str


def lsq(v, levels=2):
    return nadaptor.lsq(v, 0.5, levels)


WRONG = {
    "correction": Wrong(lsq, {"correction": nadaptor.Srp(4)}, "corrects rates"),
    "neuron": Wrong(lsq, {"neuron": nadaptor.SignedIntegrateAndFire()}, "neuron for rate coding"),
    "coding": Wrong(lsq, {"coding": "sums"}, "must be 'rate' or 'sum'"),
    "levels": Wrong(functools.partial(lsq, levels=2**24), {}, r"float32 counts to 2\*\*24"),
    "random": Wrong(
        lambda v: lsq(v) * jax.random.bernoulli(jax.random.key(0), 0.5, v.shape), {}, "random"
    ),
    "loop": Wrong(lambda v: lax.while_loop(lambda v: v.sum() < 0, lsq, lsq(v)), {}, "holds a"),
    "nothing": Wrong(lambda v: v, {}, "no quantizer is left"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match=wrong.words):
        simulate(wrong.f, dyadic(3, 2), **wrong.options)


def test_neuron_of_sums_is_refused_for_rates_and_a_calibration_for_sums():
    with pytest.raises(ValueError, match="neuron for sum coding"):
        simulate(lsq, dyadic(3, 2), coding="rate", neuron=nadaptor.StBif())
    found = calibrate_thresholds(lambda v: nadaptor.clipped_relu(v, 1.0), dyadic(3, 2))
    with pytest.raises(ValueError, match="sets thresholds for rates"):
        found.apply(nadaptor.spiking(lsq, dyadic(3, 2), coding="sum"))
