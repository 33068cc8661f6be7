"""The simulation over time: the identities of quantized and spiking network, and the options."""

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import nadaptor
from nadaptor._jaxpr.trace import contains, sub_jaxprs
from nadaptor.neurons import triangle

SCALES = [0.125, 0.1, 0.3, 0.0437]
LEVELS = [1, 2, 3, 4, 7, 15]


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dyadic(*shape):
    """Random eighths: sums and products of them are exact, in any order."""
    seed = np.random.default_rng(sum(shape))
    return jnp.asarray(seed.integers(-8, 9, shape) / 8, jnp.float32)


def conv(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def mlp(params, x, scale=0.5, levels=2):
    for w in params[:-1]:
        x = nadaptor.lsq(x @ w, scale, levels)
    return x @ params[-1]


def cnn(params, x, scale=0.5, levels=2):
    for kernel in params[:-1]:
        x = nadaptor.lsq(conv(x, kernel), scale, levels)
    return x.mean((1, 2)) @ params[-1]


CNN = [dyadic(3, 3, 2, 4), dyadic(3, 3, 4, 4), dyadic(3, 3, 4, 4), dyadic(4, 3)]
IMAGES = dyadic(5, 4, 4, 2)
RANDOM_CNN = [random(i, *w.shape) / 2 for i, w in enumerate(CNN)]
RANDOM_IMAGES = random(9, 5, 4, 4, 2)


def simulate(f, *args, **kwargs):
    return jax.jit(functools.partial(nadaptor.simulate, f, **kwargs))(*args)


def ties_and_others(scale, levels):
    """Pre-activations at every tie, at the floats beside it, and anywhere."""
    ties = (np.arange(-2, levels + 2) + 0.5).astype(np.float32) * np.float32(scale)
    below = np.nextafter(ties, np.float32(-np.inf))
    above = np.nextafter(ties, np.float32(np.inf))
    anywhere = np.random.default_rng(levels).uniform(-1, levels + 1, 2000) * scale
    return np.concatenate([ties, below, above, anywhere.astype(np.float32)])


class IdentityTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_rate_of_one_layer_is_lsq_at_T_equal_to_the_levels(self):
        """Identity (a): the same integer everywhere, ties and the floats beside them included."""
        for levels in LEVELS:
            f = functools.partial(nadaptor.lsq, levels=levels)
            quantize = self.variant(f)
            spike = self.variant(functools.partial(nadaptor.simulate, f, num_steps=levels))
            for scale in map(np.float32, SCALES):
                v = ties_and_others(scale, levels)
                sim, quantized = spike(v, scale), np.asarray(quantize(v, scale))
                (counts,) = sim.spike_counts
                np.testing.assert_array_equal(counts, np.rint(quantized / scale))
                np.testing.assert_array_equal(np.float32(counts) * scale, quantized)
                np.testing.assert_allclose(sim.outputs[-1], quantized, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_identity_a_under_vmap_with_a_scale_for_each_channel(axis):
    scales, levels = jnp.array(SCALES), 3
    channels = [ties_and_others(scale, levels)[:1024].reshape(32, 32) for scale in SCALES]
    v = np.stack(channels, axis)

    def f(v, scales):
        return jax.vmap(functools.partial(nadaptor.lsq, levels=levels), (axis, 0), axis)(v, scales)

    quantized = jax.jit(f)(v, scales)
    each = np.expand_dims(scales, tuple(i for i in range(3) if i != axis))
    for rate in (
        simulate(f, v, scales, num_steps=levels).outputs[-1],
        jax.jit(
            jax.vmap(
                lambda v, s: nadaptor.simulate(
                    functools.partial(nadaptor.lsq, levels=levels), v, s, num_steps=levels
                ).outputs[-1],
                (axis, 0),
                axis,
            )
        )(v, scales),
    ):
        np.testing.assert_array_equal(np.rint(rate / each), np.rint(quantized / each))
        np.testing.assert_allclose(rate, quantized, rtol=1e-6)


def test_identity_a_for_a_scalar():
    sim = nadaptor.simulate(lambda v: nadaptor.lsq(v, 0.5, 3), 0.75, num_steps=3)
    assert (sim.outputs[-1], sim.spike_counts) == (1.0, (2,))


def test_no_examples_give_no_outputs():
    for options in ({}, {"in_axes": (None, 0)}):
        sim = nadaptor.simulate(cnn, CNN, IMAGES[:0], num_steps=2, **options)
        assert sim.outputs.shape == (2, 0, 3)


RANDOM_MLP = [random(0, 3, 16) / 2, random(1, 16, 16) / 2, random(2, 16, 5)]


@pytest.mark.parametrize(
    ("f", "params", "x"), [(cnn, RANDOM_CNN, RANDOM_IMAGES), (mlp, RANDOM_MLP, random(7, 6, 3))]
)
def test_one_level_and_one_step_give_the_logits_of_the_quantized_network(f, params, x):
    """Identity (b), bit for bit."""
    f = functools.partial(f, levels=1)
    logits = simulate(f, params, x, num_steps=1).outputs[0]
    np.testing.assert_array_equal(logits, jax.jit(f)(params, x))


@pytest.mark.parametrize("num_steps", [1, 5, 64, 1000])
def test_rate_of_one_layer_is_within_half_a_threshold_over_T_of_the_clipped_input(num_steps):
    """Identity (c), and twice as close as it asks."""
    scale, levels = 0.0437, 3
    v = np.linspace(-0.1, 0.3, 1001, dtype=np.float32)
    f = functools.partial(nadaptor.lsq, scale=scale, levels=levels)
    rate = simulate(f, v, num_steps=num_steps).outputs[-1]
    threshold = levels * scale
    error = np.abs(rate - np.clip(v, 0, threshold)).max()
    assert error <= threshold / (2 * num_steps) + 1e-6


def test_outputs_up_to_t_do_not_depend_on_T():
    """Identity (e)."""
    long = simulate(cnn, RANDOM_CNN, RANDOM_IMAGES, num_steps=12)
    for num_steps in (1, 7):
        short = simulate(cnn, RANDOM_CNN, RANDOM_IMAGES, num_steps=num_steps)
        np.testing.assert_array_equal(short.outputs, long.outputs[:num_steps])


@functools.cache
def whole():
    """The simulation of all images at once, step by step."""
    return simulate(cnn, CNN, IMAGES, num_steps=7)


@pytest.mark.parametrize("tile_size", [1, 2, 5, 9])
def test_batch_split_changes_nothing(tile_size):
    """Identity (f)."""
    tiled = simulate(cnn, CNN, IMAGES, num_steps=7, in_axes=(None, 0), tile_size=tile_size)
    chex.assert_trees_all_equal(tiled, whole())


@pytest.mark.parametrize("number", [1, 3])
def test_devices_that_share_the_examples_change_nothing(number):
    def f(weights, x):
        shared = nadaptor.lsq(weights[0], 0.5, 2)  # a layer that has no axis of the examples
        return nadaptor.lsq(weights @ x, 0.5, 2).T + shared[:3]

    weights = jnp.round(4 * jax.random.normal(jax.random.key(0), (3, 6))) / 4
    x = jnp.round(4 * jax.random.normal(jax.random.key(1), (6, 6))) / 4
    run = functools.partial(simulate, f, weights, x, num_steps=5)
    shared = run(in_axes=(None, -1), devices=jax.devices()[:number], tile_size=1)
    chex.assert_trees_all_equal(jax.device_get(shared), jax.device_get(run()))


def test_weights_are_transformed_once_for_all_tiles():
    def f(w, x):
        return nadaptor.lsq(x, 0.5, 2) @ jnp.exp(w)

    run = functools.partial(simulate, f, num_steps=3, in_axes=(None, 0), tile_size=2)
    jaxpr = jax.make_jaxpr(run)(jnp.ones((3, 3)), jnp.ones((6, 3))).jaxpr

    def is_exp(eqn):
        return eqn.primitive.name == "exp"

    def repeats_it(eqn):
        loop = eqn.primitive.name == "scan"
        return loop and any(contains(sub, is_exp) for sub in sub_jaxprs(eqn.params))

    assert contains(jaxpr, lambda eqn: eqn.primitive.name == "scan")
    assert contains(jaxpr, is_exp)
    assert not contains(jaxpr, repeats_it)


@pytest.mark.parametrize("tile_size", [2, 3])
def test_batch_split_finds_the_axis_of_the_examples_in_each_layer(tile_size):
    def f(params, extra, x):
        hidden = nadaptor.lsq(params["w"] @ x, 0.5, 2)
        shared = nadaptor.lsq(params["b"], 0.5, 2)
        return {"logits": (hidden + shared[:, None]).T}

    params = {"w": dyadic(3, 4), "b": dyadic(3), "unused": None}
    args = (params, None, dyadic(4, 7))
    tiled = simulate(f, *args, num_steps=3, in_axes=(None, None, -1), tile_size=tile_size)
    chex.assert_trees_all_equal(tiled, simulate(f, *args, num_steps=3))
    assert [count.shape for count in tiled.spike_counts] == [(3, 7), (3,)]


@pytest.mark.parametrize("chunk", [2, 3, 7, 10])
def test_steps_folded_into_the_batch_give_equal_results(chunk):
    """Bit for bit on dyadic numbers, for T no multiple of K and for K above T."""
    folded = simulate(cnn, CNN, IMAGES, num_steps=7, steps_per_chunk=chunk)
    chex.assert_trees_all_equal(folded, whole())
    tiled = simulate(
        cnn, CNN, IMAGES, num_steps=7, steps_per_chunk=chunk, in_axes=(None, 0), tile_size=2
    )
    chex.assert_trees_all_equal(tiled, whole())


def test_folding_flips_few_spikes_where_sums_are_rounded(record_property):
    images = random(3, 16, 8, 8, 2)
    plain = simulate(cnn, RANDOM_CNN, images, num_steps=32).spike_counts
    folded = simulate(cnn, RANDOM_CNN, images, num_steps=32, steps_per_chunk=8).spike_counts
    flipped = sum(int(jnp.abs(a - b).sum()) for a, b in zip(plain, folded, strict=True))
    share = flipped / sum(int(count.sum()) for count in plain)
    record_property("flipped_share", share)
    assert share < 1e-3


def test_memory_does_not_grow_with_the_number_of_steps():
    def temporary(num_steps, chunk=None):
        run = functools.partial(nadaptor.simulate, cnn, num_steps=num_steps, steps_per_chunk=chunk)
        compiled = jax.jit(run).lower(RANDOM_CNN, random(1, 8, 16, 16, 2)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    of_outputs = 64 * 8 * 3 * 4
    assert temporary(64) <= temporary(8) + of_outputs
    assert temporary(64, 4) <= temporary(8, 4) + of_outputs


def bptt(w, readout, x, scale, levels, num_steps):
    """Gradient with respect to w of the summed rates, by hand: the chain rule, step by step."""
    current = x @ w / scale
    u, seen = np.full(current.shape, levels / 2), []
    for _ in range(num_steps):
        u = u + current
        seen.append(u)
        u = u - levels * (u >= levels)
    of_out = np.broadcast_to(readout.sum(1) * scale / num_steps, current.shape)
    after, of_current = np.zeros_like(current), 0
    for u in seen[::-1]:
        slope = np.maximum(0, 1 - np.abs(u / levels - 1))
        after = after + (of_out - after) * slope
        of_current = of_current + after
    return x.T @ of_current / scale


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradient_with_a_surrogate_is_backpropagation_through_time(chunk):
    w, readout, x = map(np.asarray, (random(0, 3, 4), random(1, 4, 2), random(2, 5, 3)))

    def loss(w, neuron):
        options = dict(num_steps=5, neuron=neuron, steps_per_chunk=chunk)
        return nadaptor.simulate(mlp, [w, readout], x, **options).outputs[-1].sum()

    grad = jax.jit(jax.grad(lambda w: loss(w, nadaptor.IntegrateAndFire(triangle))))(w)
    np.testing.assert_allclose(grad, bptt(w, readout, x, 0.5, 2, 5), rtol=1e-4, atol=1e-5)
    assert np.abs(grad).max() > 0.1
    without = jax.jit(jax.grad(lambda w: loss(w, nadaptor.IntegrateAndFire())))(w)
    np.testing.assert_array_equal(without, np.zeros_like(w))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_network_counts_right_over_many_steps(dtype):
    """In bfloat16 a potential would lose 14 % of the counts by T = 256."""
    scale, levels, num_steps = 0.1, 3, 256
    v = jnp.linspace(-0.1, 0.4, 501).astype(dtype)
    net = nadaptor.spiking(lambda v: nadaptor.lsq(v, scale, levels), v)
    state, out = net.step(net.init(()), net.prepare(v))
    assert (state[0].dtype, out.dtype) == (jnp.float32, dtype)
    sim = simulate(lambda v: nadaptor.lsq(v, scale, levels), v, num_steps=num_steps)
    x = np.float64(np.float32(v) * (1 / np.float32(scale)))
    expected = np.clip(np.floor(num_steps * x / levels + 0.5), 0, num_steps)
    np.testing.assert_array_equal(sim.spike_counts[0], expected)


X64 = """
import jax, jax.numpy as jnp, nadaptor
f = lambda w, v: nadaptor.lsq(nadaptor.lsq(v, 0.1, 3) @ w, 0.25, 2)
w, v = jnp.ones((4, 2)), jnp.linspace(-0.1, 0.4, 12).reshape(3, 4)
sim = nadaptor.simulate(f, w, v, num_steps=6, steps_per_chunk=4)
plain = nadaptor.simulate(f, w, v, num_steps=6)
assert sim.outputs.dtype == v.dtype == jnp.float64
assert (sim.outputs == plain.outputs).all() and int(sim.spike_counts[0].sum()) > 0
assert nadaptor.spiking(f, w, v).init(())[0].dtype == jnp.float32
"""


def test_double_precision_network_runs():
    env = {**os.environ, "JAX_ENABLE_X64": "1"}
    subprocess.run([sys.executable, "-W", "error", "-c", X64], check=True, env=env)


MESH = Mesh(np.array(jax.devices()[:2]), ("batch",))
BATCH = PartitionSpec("batch")
ROWS = dyadic(4, 3)
DYADIC_MLP = [dyadic(3, 4), dyadic(4, 4), dyadic(4, 2)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_chunk": 2, "in_axes": (None, 0), "tile_size": 1},
        {"neuron": nadaptor.SignedIntegrateAndFire()},
        {"correction": nadaptor.OffsetSpikes(2)},
        {"correction": nadaptor.Srp(2)},
    ],
    ids=str,
)
def test_simulation_inside_shard_map_is_the_simulation_outside(options):
    def run(params, x):
        return nadaptor.simulate(mlp, params, x, num_steps=3, **options).outputs

    specs = dict(in_specs=(PartitionSpec(), BATCH), out_specs=PartitionSpec(None, "batch"))
    sharded = jax.jit(jax.shard_map(run, mesh=MESH, **specs))
    np.testing.assert_array_equal(sharded(DYADIC_MLP, ROWS), jax.jit(run)(DYADIC_MLP, ROWS))


def test_simulation_under_pmap_and_on_an_explicit_mesh_is_the_simulation_outside():
    run = functools.partial(nadaptor.simulate, mlp, num_steps=3, steps_per_chunk=2)
    expected = jax.jit(run)(DYADIC_MLP, ROWS).outputs
    halves = jax.pmap(lambda x: run(DYADIC_MLP, x).outputs, devices=jax.devices()[:2])
    mapped = halves(ROWS.reshape(2, 2, 3))
    np.testing.assert_array_equal(np.concatenate(mapped, 1), expected)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(ROWS, NamedSharding(mesh, BATCH))
        outputs = jax.jit(run)(DYADIC_MLP, rows).outputs
    np.testing.assert_array_equal(outputs, expected)


def test_collectives_act_on_spikes():
    def f(params, x):
        return jax.lax.pmean(mlp(params, x), "batch")

    def run(params, x):
        return nadaptor.simulate(f, params, x, num_steps=3, steps_per_chunk=2).outputs

    specs = dict(in_specs=(PartitionSpec(), BATCH), out_specs=PartitionSpec())
    averaged = jax.jit(jax.shard_map(run, mesh=MESH, **specs))(DYADIC_MLP, ROWS)
    each = simulate(mlp, DYADIC_MLP, ROWS, num_steps=3).outputs
    np.testing.assert_allclose(averaged, (each[:, :2] + each[:, 2:]) / 2, rtol=1e-6)


@pytest.mark.parametrize("in_axes", [None, (None, 0)])
def test_simulation_exports_with_a_symbolic_number_of_examples(in_axes):
    run = jax.jit(functools.partial(nadaptor.simulate, mlp, num_steps=3, in_axes=in_axes))
    (number,) = jax.export.symbolic_shape("number")
    rows = jax.ShapeDtypeStruct((number, 3), jnp.float32)
    avals = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in DYADIC_MLP]
    outputs = jax.export.export(jax.jit(lambda *args: run(*args).outputs))(avals, rows)
    np.testing.assert_array_equal(outputs.call(DYADIC_MLP, ROWS), run(DYADIC_MLP, ROWS).outputs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_steps=0), "num_steps must be a positive int, not 0"),
        (dict(num_steps=True), "num_steps must be a positive int, not True"),
        (dict(num_steps=1.5), "num_steps must be a positive int, not 1.5"),
        (dict(steps_per_chunk=0), "steps_per_chunk must be a positive int, not 0"),
        (dict(tile_size=2), r"tile_size=2 needs in_axes.*in_axes=\(None, 0\)"),
        (dict(tile_size=0, in_axes=(None, 0)), "tile_size must be a positive int, not 0"),
        (dict(devices=jax.devices()[:1]), r"devices=.* needs in_axes"),
        (dict(devices=jax.devices()[:7], in_axes=(None, 0)), "do not divide by 7 devices"),
        (dict(in_axes=(None, 0, 0)), "in_axes has 3 entries for 2 arguments"),
        (dict(in_axes=(None, 4)), r"in_axes has 4 for an argument of shape \(5, 4, 4, 2\)"),
        (dict(in_axes=(None, None)), r"must pick axes of one length, not \[\]"),
        (dict(in_axes=([None, None, None, 0], 0)), r"must pick axes of one length, not \[4, 5\]"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        nadaptor.simulate(cnn, CNN, IMAGES, **{"num_steps": 2, **options})


def test_outputs_are_a_pytree_of_running_means_and_counts_are_integers():
    def f(x):
        y = nadaptor.lsq(x, 0.5, 2)
        return {"y": y, "sum": (y.sum(), None)}

    sim = nadaptor.simulate(f, IMAGES, num_steps=4)
    np.testing.assert_allclose(sim.outputs["y"].sum((1, 2, 3, 4)), sim.outputs["sum"][0], rtol=1e-6)
    (counts,) = sim.spike_counts
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(sim.outputs["y"][-1], counts / 4)
    assert sim.total_steps == 4


class Warm(NamedTuple):
    """A correction that spends steps to warm the potentials up."""

    num_steps: int

    def start(self, net, prepared):
        state = net.init(prepared)
        for _ in range(self.num_steps):
            state, _ = net.step(state, prepared)
        return state


def test_correction_gives_the_start_state_and_its_steps_are_counted():
    sim = simulate(cnn, CNN, IMAGES, num_steps=4, correction=Warm(3))
    long = simulate(cnn, CNN, IMAGES, num_steps=7)
    first = simulate(cnn, CNN, IMAGES, num_steps=3)
    assert sim.total_steps == 7
    for late, all_, early in zip(*(s.spike_counts for s in (sim, long, first)), strict=True):
        np.testing.assert_array_equal(late, all_ - early)


class Leaky(NamedTuple):
    """A user's own neuron, with a state that is a pytree."""

    leak: float

    def init(self, shape, threshold, start):
        return {"u": jnp.full(shape, start), "steps": jnp.zeros((), jnp.int32)}

    def step(self, state, x, threshold):
        u = self.leak * state["u"] + x
        out = jnp.where(u >= threshold, jnp.float32(threshold), 0)
        return {"u": u - out, "steps": state["steps"] + 1}, out


def test_user_written_neurons_serve():
    with_leak = simulate(cnn, CNN, IMAGES, num_steps=6, neuron=Leaky(0.5), steps_per_chunk=4)
    chex.assert_trees_all_equal(
        with_leak, simulate(cnn, CNN, IMAGES, num_steps=6, neuron=Leaky(0.5))
    )
    without = simulate(cnn, CNN, IMAGES, num_steps=6, neuron=Leaky(1.0))
    chex.assert_trees_all_equal(without, simulate(cnn, CNN, IMAGES, num_steps=6))
    assert (with_leak.spike_counts[0] < without.spike_counts[0]).any()


@pytest.mark.parametrize(
    "args",
    [
        (np.asarray(CNN[0], np.float64), np.asarray(IMAGES, np.float64)),
        (CNN[0], np.asarray(IMAGES)),
    ],
)
def test_numpy_arguments_and_python_scalars_serve(args):
    kernels = np.asarray(CNN[1], np.float64)

    def f(kernel, x, gain):
        return conv(nadaptor.lsq(conv(x, jnp.asarray(kernel)), 0.5, 2), kernels) * gain

    sim = nadaptor.simulate(f, *args, 2.0, num_steps=2)
    expected = nadaptor.simulate(f, CNN[0], IMAGES, jnp.float32(2), num_steps=2)
    chex.assert_trees_all_equal(sim, expected)
