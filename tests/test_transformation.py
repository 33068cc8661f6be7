"""The transformation: what converts, what it then computes, and how the rest is refused."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

import nadaptor
from nadaptor._jaxpr.summable import summable

SCALE, LEVELS = 0.5, 2


def dyadic(*shape):
    """Random eighths: sums and products of them are exact, in any order."""
    seed = np.random.default_rng(sum(shape))
    return jnp.asarray(seed.integers(-8, 9, shape) / 8, jnp.float32)


KEY = jax.random.key(0)
X, W = dyadic(2, 4, 6, 3), dyadic(3, 5)
KERNEL = dyadic(3, 3, 3, 4)


def unknown():
    """A number that is not known while a function is traced."""
    return X.sum().astype(int)


def q(v):
    return nadaptor.lsq(v, SCALE, LEVELS)


def conv(x, kernel, *args, **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, *args, dimension_numbers=numbers, **kwargs)


def run(f, *args, num_steps=4):
    """Outputs of every single step."""
    net = nadaptor.spiking(f, *args)
    prepared = net.prepare(*args)
    state, outputs = net.init(prepared), []
    for _ in range(num_steps):
        state, out = net.step(state, prepared)
        outputs.append(out)
    return jax.tree.map(lambda *x: jnp.stack(x), *outputs)


AFFINE = {
    "add": lambda z: z + dyadic(3) + z,
    "sub": lambda z: 1 - z - z[..., ::-1],
    "neg": lambda z: -z,
    "mul": lambda z: 3 * z * dyadic(6, 3),
    "div": lambda z: z / jnp.array([1.0, 2.0, 4.0]),
    "integer_pow": lambda z: z**1,
    "concatenate": lambda z: jnp.concatenate([z, dyadic(2, 4, 6, 1), z], -1),
    "stack": lambda z: jnp.stack([z, dyadic(2, 4, 6, 3)]),
    "unstack": lambda z: jnp.unstack(z, axis=1)[2],
    "pad": lambda z: lax.pad(z, 1.0, ((0, 0, 0), (-1, 2, 1), (0, -1, 0), (0, 0, 2))),
    "pad_reflect": lambda z: jnp.pad(z, ((0, 0), (1, 2), (2, 1), (0, 0)), mode="reflect"),
    "pad_mean": lambda z: jnp.pad(z, ((0, 0), (1, 2), (0, 0), (0, 0)), mode="mean"),
    "reshape": lambda z: z.reshape(8, -1),
    "squeeze": lambda z: jnp.squeeze(z[:, :1], 1),
    "expand_dims": lambda z: lax.expand_dims(z, (0, 3)),
    "transpose": lambda z: jnp.moveaxis(z, 1, -1),
    "broadcast_in_dim": lambda z: jnp.broadcast_to(z, (3, 2, 4, 6, 3)),
    "tile": lambda z: jnp.tile(z, (1, 2, 1, 2)),
    "repeat": lambda z: jnp.repeat(z, np.array([1, 0, 2, 1]), 1),
    "roll": lambda z: jnp.roll(z, (1, -2), (1, 2)),
    "rev": lambda z: jnp.flip(z, 1),
    "slice": lambda z: z[:, 1::2, :, None, -1],
    "split": lambda z: jnp.split(z, (1, 4), 2)[1],
    "dynamic_slice": lambda z: lax.dynamic_slice_in_dim(z, jnp.int32(1), 2, 1),
    "dynamic_update_slice": lambda z: lax.dynamic_update_slice_in_dim(z, 2 * z[:, :1], 2, 1),
    "gather": lambda z: z[jnp.arange(2)[:, None], jnp.array([[3, 1]]), 2],
    "gather_fill": lambda z: jnp.take(z, jnp.array([0, 9]), 1, mode="fill", fill_value=7),
    "gather_mask": lambda z: z[:, np.array([True, False, True, True])],
    "scatter": lambda z: z.at[:, 1].set(z[:, 0]).at[:, 2].set(3.0),
    "scatter_add": lambda z: dyadic(2, 4, 6, 3).at[:, 1].add(z[:, 0]),
    "scatter_sub": lambda z: z.at[:, 1].subtract(z[:, 0]),
    "scatter_mul": lambda z: z.at[:, 1].multiply(2.0),
    "segment_sum": lambda z: jax.ops.segment_sum(z, jnp.array([1, 1]), 2),
    "select_n": lambda z: jnp.where(np.arange(3) > 1, z, -1.0),
    "reduce_sum": lambda z: z.sum((1, 2)),
    "mean": lambda z: z.mean((0, 1), keepdims=True),
    "cumsum": lambda z: lax.cumsum(z, 1, reverse=True),
    "associative_scan": lambda z: lax.associative_scan(jnp.add, z, axis=1),
    "reduce": lambda z: lax.reduce(z, jnp.ones(()), lax.add, (1, 2)),
    "reduce_window_sum": lambda z: nn.avg_pool(z, (2, 2), (2, 2)),
    "reduce_window": lambda z: lax.reduce_window(
        z, jnp.ones(()), lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"
    ),
    "dot_general": lambda z: jnp.einsum("bhwc,cd->bdhw", z, W),
    "dot_general_right": lambda z: dyadic(5, 6) @ z,
    "conv": lambda z: conv(z, KERNEL, (2, 1), "SAME"),
    "conv_groups": lambda z: conv(
        z, dyadic(2, 3, 1, 6), (1, 1), "SAME", rhs_dilation=(2, 1), feature_group_count=3
    ),
    "conv_transpose": lambda z: lax.conv_transpose(z, KERNEL, (2, 2), "SAME"),
    "conv_kernel": lambda z: conv(dyadic(2, 8, 8, 3), z.transpose(1, 2, 3, 0), (1, 1), "VALID"),
    "resize": lambda z: jax.image.resize(z, (2, 8, 6, 3), "linear"),
    "triangular_solve": lambda z: jax.scipy.linalg.solve_triangular(2 * jnp.eye(6), z),
    "convert_element_type": lambda z: z.astype(jnp.bfloat16).astype(jnp.float32),
    "reduce_precision": lambda z: lax.reduce_precision(z, 8, 10),
    "fft": lambda z: jnp.fft.ifft(jnp.fft.fft(z, axis=1) * dyadic(6, 3), axis=1).real,
    "complex": lambda z: jnp.conj(lax.complex(z, 2 * z) * (1 + 2j)).imag,
    "copy": lambda z: jnp.copy(z),
    "optimization_barrier": lambda z: lax.optimization_barrier((z, 1.0))[0],
    "stop_gradient": lambda z: lax.stop_gradient(z),
    "device_put": lambda z: jax.device_put(z),
    "sharding_constraint": lambda z: lax.with_sharding_constraint(
        z, jax.sharding.NamedSharding(Mesh(jax.devices()[:1], "b"), PartitionSpec("b"))
    ),
    "vjp_of_a_linear_map": lambda z: jax.linear_transpose(lambda y: y @ W, X)(z @ W)[0],
    "map": lambda z: lax.map(lambda row: row @ W, z),
    "fori_loop": lambda z: lax.fori_loop(0, 3, lambda i, y: y + dyadic(3, 3)[i] * z, z),
    "static_attention": lambda z: jax.nn.softmax(dyadic(6, 6)) @ z,
    "avg_pool_count": lambda z: nn.avg_pool(z, (3, 2), (3, 2), "SAME", count_include_pad=False),
    "batch_norm": lambda z: (z - dyadic(3)) * lax.rsqrt(jnp.array([1.0, 4.0, 0.25])) + 1,
}


@pytest.mark.parametrize("g", AFFINE.values(), ids=AFFINE)
def test_time_average_of_an_affine_operation_is_the_operation_on_the_time_average(g):
    net = nadaptor.spiking(lambda x: g(q(x)), X)
    trains = LEVELS * jax.random.bernoulli(jax.random.key(0), 0.5, (4, *X.shape)).astype(float)

    @jax.jit
    def evaluate(x, trains):
        prepared = net.prepare(x)
        single = [net.propagate(prepared, lambda i, x, z=z: (None, z))[1] for z in trains]
        together = net.propagate(prepared, lambda i, x: (None, trains), steps=4)[1]
        return jnp.stack(single), together, g(SCALE * trains.mean(0))

    single, together, of_mean = evaluate(X, trains)
    np.testing.assert_allclose(single.mean(0), of_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-5)


def add_one(i, y):
    return y + 1


LAYER_NORM = nn.LayerNorm(use_scale=False, use_bias=False)
REFUSED = {
    "relu": (lambda z: jax.nn.relu(z), "relu (max)", "quantized activation"),
    "max_pool": (lambda z: nn.max_pool(z, (2, 2)), "max_pool", "replace max_pool by avg_pool"),
    "gelu": (lambda z: jax.nn.gelu(z), "gelu", "quantized activation"),
    "softmax": (lambda z: jax.nn.softmax(z), "softmax (reduce_max)", "return the logits"),
    "log_softmax": (lambda z: jax.nn.log_softmax(z), "log_softmax", "return the logits"),
    "argmax": (lambda z: jnp.argmax(z, -1), "argmax", "return the logits"),
    "layer_norm": (lambda z: LAYER_NORM.apply({}, z), "LayerNorm (square)", "batch norm with"),
    "var": (lambda z: z / jnp.var(z), "var (square)", "batch norm with running averages"),
    "maximum": (lambda z: z.max((1, 2)), "max (reduce_max)", "affine: replace the maximum by a"),
    "maxout": (
        lambda z: z.reshape(2, -1, z.size // 2).max(0),
        "max (reduce_max)",
        "replace the maximum",
    ),
    "loss": (
        lambda z: optax.softmax_cross_entropy(z, dyadic(3)),
        "softmax_cross_entropy",
        "affine: return the logits",
    ),
    "clip": (lambda z: jnp.clip(z, 0, 1), "clip (max)", "quantized activation"),
    "product": (lambda z: z * z.mean(), "mul", "one factor has to be static"),
    "attention": (lambda z: z @ z.mT, "dot_general", "one factor has to be static"),
    "divisor": (lambda z: 1 / (1 + z), "div", "a scale that depends on spikes"),
    "scale": (lambda z: nadaptor.lsq(X, 1 + z.mean(), 2), "div", "a scale that depends on spikes"),
    "where": (lambda z: jnp.where(z > 0, X, 0), "gt", "only affine operations can act on spikes"),
    "index": (lambda z: X[z.astype(int)], "astype (convert_element_type)", "keep them floating"),
    "cast": (lambda z: z.astype(bool), "astype (convert_element_type)", "spikes into bool"),
    "bits": (lambda z: lax.bitcast_convert_type(z, jnp.int32), "bitcast_convert_type", "affine"),
    "sort": (lambda z: jnp.sort(z), "sort", "only affine operations can act on spikes"),
    "scatter_max": (lambda z: z.at[0].max(z[1]), "scatter_max (scatter-max)", "only affine"),
    "callback": (lambda z: jax.pure_callback(abs, z, z), "pure_callback", "only affine"),
    "scan": (lambda z: lax.scan(lambda c, y: (c, y * y), 0, z)[1], "mul", "one factor"),
    "branch": (lambda z: lax.cond(X[0, 0, 0, 0] > 0, abs, jnp.copy, z), "cond", "in Python"),
    "loop": (lambda z: lax.fori_loop(0, unknown(), add_one, z), "fori_loop (while)", "lax.scan"),
    "dropout": (
        lambda z: nn.Dropout(0.5, deterministic=False).apply({}, z, rngs={"dropout": KEY}),
        "Dropout (random_bits)",
        "switch dropout off (deterministic=True)",
    ),
    "frozen_noise": (
        lambda z: z + jax.random.normal(KEY, z.shape),
        "normal (random_bits)",
        "draws random numbers outside a quantizer",
    ),
}


@pytest.mark.parametrize(("g", "operation", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_affine_is_refused_with_its_name_line_and_remedy(g, operation, remedy):
    with pytest.raises(ValueError, match=r"^cannot convert to spikes: ") as error:
        nadaptor.spiking(lambda x: g(q(x)), X)
    line = f"{__file__}:{g.__code__.co_firstlineno} "
    assert re.search(f"{re.escape(operation)}.* at {re.escape(line)}", str(error.value))
    assert remedy in str(error.value)


MESH = Mesh(np.array(jax.devices()[:2]), ("batch",))
SHARDED = PartitionSpec("batch")
HIDDEN = {
    "while": lambda x: lax.while_loop(lambda c: c.sum() > 9, q, x),
    "dynamic_loop": lambda x: lax.fori_loop(0, unknown(), lambda i, y: q(y), x),
    "cond": lambda x: lax.cond(X.sum() > 0, q, lambda y: y, x),
    "switch": lambda x: lax.switch(jnp.int32(1), [lambda y: y, q, q], x),
    "shard_map": lambda x: jax.shard_map(q, mesh=MESH, in_specs=SHARDED, out_specs=SHARDED)(x),
    "pmap": lambda x: jax.pmap(q, devices=jax.devices()[:2])(x),
    "scan_of_while": lambda x: lax.scan(lambda c, y: (c, HIDDEN["while"](y)), 0, x)[1],
    "cond_of_scan": lambda x: lax.cond(
        X.sum() > 0, lambda y: lax.scan(lambda c, z: (c, q(z)), 0, y)[1], lambda y: y, x
    ),
    "scan_of_no_length": lambda x: lax.scan(lambda c, _: (q(c), None), x, None, length=0)[0],
}


@pytest.mark.parametrize("where", ["static", "spiking"])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_a_quantizer_that_would_stay_analog_is_refused(hidden, where):
    before = q if where == "spiking" else (lambda x: x)
    with pytest.raises(ValueError, match=r"holds a quantizer: .* would silently stay analog"):
        nadaptor.spiking(lambda x: q(hidden(before(x))), X)


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda x: 2 * x, "no quantizer is left"),
        (lambda x: (q(x), x)[1], "no quantizer is left"),
        (lambda x: (), "no quantizer is left"),
        (lambda x: (q(x), {"a": x}), r"no spike reaches \[1\]\['a'\]"),
        (lambda x: (q(x), 1.0), r"no spike reaches \[1\] of the function's result"),
    ],
)
def test_outputs_without_spikes_are_refused(f, words):
    with pytest.raises(ValueError, match=words):
        nadaptor.spiking(f, X)


def test_what_no_output_needs_is_not_checked():
    out = run(lambda x: (q(x), jnp.sort(q(x)), jax.random.normal(KEY))[0], X)
    np.testing.assert_array_equal(out, run(q, X))


def mlp(params, x):
    for w in params["hidden"]:
        x = q(x @ w)
    return {"logits": x @ params["last"], "sum": (x.sum(), None)}


PARAMS = {"hidden": [dyadic(3, 4), dyadic(4, 4)], "last": dyadic(4, 2)}
ROWS = dyadic(5, 3)


def with_custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def with_custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: jax.vjp(f, *args), lambda pull, g: pull(g))
    return g


def with_custom_vmap(f):
    g = custom_vmap(f)
    g.def_vmap(lambda size, batched, *args: (jax.vmap(f)(*args), True))
    return g


WRAPPERS = {
    "jit": jax.jit,
    "nested_jit": lambda f: jax.jit(lambda *args: jax.jit(f)(*args)),
    "donating_jit": functools.partial(jax.jit, donate_argnums=1),
    "custom_jvp": with_custom_jvp,
    "custom_vjp": with_custom_vjp,
    "custom_vmap": with_custom_vmap,
    "remat": jax.checkpoint,
    "remat_policy": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "named_call": functools.partial(jax.named_call, name="net"),
    "vmap": lambda f: jax.vmap(f, in_axes=(None, 0), out_axes={"logits": 0, "sum": (0, None)}),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_calls_are_looked_through(wrap):
    out, plain = run(wrap(mlp), PARAMS, ROWS), run(mlp, PARAMS, ROWS)
    np.testing.assert_array_equal(out["logits"], plain["logits"])
    assert len(nadaptor.spiking(wrap(mlp), PARAMS, ROWS).layers) == 2


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_over_layers_is_the_loop_over_layers(reverse):
    weights = dyadic(3, 4, 4)

    def scanned(ws, x):
        def body(x, w):
            x = q(x @ w)
            return x, (x[0], x.sum())

        return lax.scan(body, x, ws, reverse=reverse)

    def looped(ws, x):
        seen = []
        for w in ws[::-1] if reverse else ws:
            x = q(x @ w)
            seen.append((x[0], x.sum()))
        ys = jax.tree.map(lambda *y: jnp.stack(y), *(seen[::-1] if reverse else seen))
        return x, ys

    args = (weights, dyadic(2, 4))
    chex.assert_trees_all_equal(run(scanned, *args), run(looped, *args))
    layers = nadaptor.spiking(scanned, *args).layers
    assert [layer.name for layer in layers] == ["layer0", "layer1", "layer2"]


def test_nested_scans_are_the_nested_loops():
    def layer(x, w):
        return q(x @ w), None

    def nested(ws, x):
        return lax.scan(lambda x, pair: lax.scan(layer, x, pair), x, ws)[0]

    ws, x = dyadic(2, 2, 4, 4), dyadic(3, 4)

    def looped(ws, x):
        for w in ws.reshape(4, 4, 4):
            x = q(x @ w)
        return x

    np.testing.assert_array_equal(run(nested, ws, x), run(looped, ws, x))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("out_axis", [0, 1, 2])
def test_vmap_with_a_scale_for_each_channel_keeps_identity_a(axis, out_axis):
    scales, v = jnp.array([0.5, 0.25, 1.0]), dyadic(3, 3, 3)

    def f(v, s):
        return jax.vmap(lambda v, s: nadaptor.lsq(v, s, 2), (axis, 0), out_axis)(v, s)

    np.testing.assert_array_equal(run(f, v, scales, num_steps=2).mean(0), f(v, scales))


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (0, 2), (None, 0), (None, 2), (0, None)])
@pytest.mark.parametrize("shape", [(3, 3, 3), (2, 3, 4)])
def test_noise_is_ignored_under_vmap_whatever_the_axes_of_key_and_input(axes, shape):
    v = dyadic(*shape)
    number = 3 if axes[1] is None else shape[axes[1]]
    keys = jax.random.key(0) if axes[0] is None else jax.random.split(jax.random.key(0), number)
    noisy = jax.vmap(lambda k, v: nadaptor.noise_adaptor(k, v, SCALE, LEVELS), axes)
    quiet = jax.vmap(lambda k, v: nadaptor.lsq(v, SCALE, LEVELS), axes)
    np.testing.assert_array_equal(run(noisy, keys, v), run(quiet, keys, v))


def test_noise_adaptor_converts_to_the_network_without_noise():
    def noisy(key, x):
        first, second = jax.random.split(key)
        x = nadaptor.noise_adaptor(first, x @ dyadic(3, 4), 0.25, 3)
        return nadaptor.noise_adaptor(second, x, 0.5, 2)

    def quiet(x):
        return nadaptor.lsq(nadaptor.lsq(x @ dyadic(3, 4), 0.25, 3), 0.5, 2)

    np.testing.assert_array_equal(run(noisy, KEY, ROWS), run(quiet, ROWS))


class StepTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_step_is_pure_and_equals_the_folded_steps(self):
        net = nadaptor.spiking(mlp, PARAMS, ROWS)
        prepared = self.variant(net.prepare)(PARAMS, ROWS)
        state = net.init(prepared)
        first = self.variant(net.step)(state, prepared)
        chex.assert_trees_all_equal(first, self.variant(net.step)(state, prepared))
        chex.assert_trees_all_equal_structs(first[1], mlp(PARAMS, ROWS))
        sim = self.variant(
            lambda p, x: nadaptor.simulate(mlp, p, x, num_steps=4, steps_per_chunk=4)
        )(PARAMS, ROWS)
        chex.assert_trees_all_equal(jax.tree.map(lambda y: y[0], sim.outputs), first[1])


def test_static_part_is_evaluated_once_by_prepare():
    def f(kernels, x):
        x = q(conv(x, kernels[0] / jnp.abs(kernels[0]).sum(), (1, 1), "SAME"))
        return conv(x, jnp.exp(kernels[1]), (1, 1), "SAME").mean((1, 2))

    kernels = [KERNEL, dyadic(3, 3, 4, 2)]
    net = nadaptor.spiking(f, kernels, X)
    prepared = net.prepare(kernels, X)
    step = str(jax.make_jaxpr(net.step)(net.init(prepared), prepared))
    assert str(jax.make_jaxpr(net.prepare)(kernels, X)).count("conv_general_dilated[") == 1
    assert step.count("conv_general_dilated[") == 1
    assert " exp " not in step
    assert " abs " not in step


def test_layers_have_the_names_levels_starts_and_places_of_their_quantizers():
    def f(x):
        with jax.named_scope("block"):
            x = nadaptor.lsq(x, 0.5, 3)
            with jax.named_scope("act"):
                x = nadaptor.lsq(x, 0.25, 1)
        with jax.named_scope("block"):
            x = jax.vmap(lambda v: nadaptor.lsq(v, 0.5, 3))(x)
        return q(x)

    layers = nadaptor.spiking(f, ROWS).layers
    assert [layer.name for layer in layers] == ["block", "block/act", "block:2", "layer3"]
    neurons = [(layer.threshold, layer.start) for layer in layers]
    assert neurons == [(3, 1.5), (1, 0.5), (3, 1.5), (2, 1.0)]
    assert {layer.shape for layer in layers} == {ROWS.shape}
    first = f.__code__.co_firstlineno
    lines = [first + 2, first + 4, first + 6, q.__code__.co_firstlineno + 1]
    assert [layer.source for layer in layers] == [f"{__file__}:{line}" for line in lines]


def test_shapes_serve_as_arguments():
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, ROWS))
    net = nadaptor.spiking(mlp, *structs)
    prepared = net.prepare(PARAMS, ROWS)
    _, out = net.step(net.init(prepared), prepared)
    np.testing.assert_array_equal(out["logits"], run(mlp, PARAMS, ROWS)["logits"][0])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((PARAMS, ROWS[:2]), r"float32\[2, 3\], but the network was traced for float32\[5, 3\]"),
        ((PARAMS, ROWS.astype(jnp.bfloat16)), r"an argument is bfloat16\[5, 3\]"),
        ((PARAMS,), "the arguments have the structure"),
        ((list(PARAMS.values()), ROWS), "call nadaptor.spiking again"),
    ],
)
def test_prepare_refuses_arguments_unlike_those_traced(args, words):
    with pytest.raises(ValueError, match=words):
        nadaptor.spiking(mlp, PARAMS, ROWS).prepare(*args)


@pytest.mark.parametrize("levels", [1, 2, 3, 7, 15, 100])
def test_current_on_the_grid_rounds_to_the_same_level_and_sums_exactly(levels):
    near = [np.arange(levels, dtype=np.float32) + np.float32(0.5)]
    for _ in range(3):
        below, above = np.float32(-np.inf), np.float32(np.inf)
        near = [np.nextafter(near[0], below), *near, np.nextafter(near[-1], above)]
    x, half = np.concatenate(near), np.float32(0.5)
    on_grid = np.asarray(summable(x, levels))
    np.testing.assert_array_equal(np.floor(on_grid + half), np.floor(x + half))
    np.testing.assert_allclose(on_grid, x, atol=levels * 2.0**-21)
    total, exact = np.zeros_like(x), np.zeros(x.shape, np.float64)
    for _ in range(1000):
        total, exact = total + on_grid, exact + on_grid
        spikes = (total >= levels).astype(np.float32)
        total, exact = total - levels * spikes, exact - levels * spikes
    np.testing.assert_array_equal(total, exact)


def test_what_is_shared_need_not_be_prepared_again():
    def f(w, b, x):
        return nadaptor.lsq(x @ jnp.exp(w) + b, 0.5, 2) @ jnp.sin(w)

    w, b, x, other = (jax.random.normal(jax.random.key(i), (3, 3)) for i in range(4))
    net = nadaptor.spiking(f, w, b, x)
    shared = net.prepare_shared((w, b, x), (False, True, True))
    chex.assert_trees_all_equal(net.prepare(w, b, other, shared=shared), net.prepare(w, b, other))
    again = jax.make_jaxpr(lambda x: net.prepare(w, b, x, shared=shared))(x)
    names = {eqn.primitive.name for eqn in again.eqns}
    assert "dot_general" in names
    assert not names & {"exp", "sin"}
