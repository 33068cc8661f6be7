"""`quantize(f)` is the network written by hand with quantizers, bit for bit."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor._jaxpr.trace import contains
from nadaptor.models import Lsq, start_scales
from nadaptor.quantization import project_scales

LEVELS = 2
RANDOM = np.random.default_rng(0)
W = tuple(
    jnp.asarray(RANDOM.normal(size=shape) * size, jnp.float32)
    for size, *shape in ((1, 8, 16), (1 / 4, 16, 16), (1, 16, 4))
)
X = jnp.asarray(RANDOM.normal(size=(32, 8)), jnp.float32)


def plain(w, x):
    return jax.nn.relu(jax.nn.relu(x @ w[0]) @ w[1]) @ w[2]


def by_hand(scales, w, x, activate):
    x = activate(x @ w[0], scales["layer0"], 0)
    return activate(x @ w[1], scales["layer1"], 1) @ w[2]


def lsq(v, scale, number=0):
    features = v.size / v.shape[0] / jnp.size(scale)
    return nadaptor.lsq(v, scale, LEVELS, gradient_scale=1 / np.sqrt(features * LEVELS))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


class Cnn(nn.Module):
    """The same network with ReLUs, or with quantizers in their places."""

    quantized: bool

    @nn.compact
    def __call__(self, x, train=False):
        for i, features in enumerate((4, 6)):
            x = nn.Conv(features, (3, 3), name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x)
            x = Lsq(LEVELS, name=f"act{i}")(x) if self.quantized else Relu(name=f"act{i}")(x)
            pool = nn.avg_pool if self.quantized else nn.max_pool
            x = pool(x, (3, 3), (2, 2), ("VALID", "SAME")[i])
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Relu(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


IMAGES = jnp.asarray(RANDOM.normal(size=(4, 8, 8, 2)), jnp.float32)
HAND = Cnn(quantized=True)
RELU = Cnn(quantized=False)


@pytest.fixture(scope="module")
def variables():
    """Of the network with ReLUs."""
    return jax.jit(RELU.init)(jax.random.key(0), IMAGES)


def with_scales(variables, scales):
    own = {f"act{i}": {"quant_scale": s} for i, s in enumerate(scales.values())}
    return {**variables, "params": {**variables["params"], **own}}


def loss(apply):
    def of(variables):
        logits, state = apply(variables)
        return (logits**2).mean(), state

    return jax.value_and_grad(of, has_aux=True)


def test_logits_start_gradients_and_statistics_are_those_of_the_network_by_hand(variables):
    train = functools.partial(RELU.apply, train=True, mutable=["batch_stats"])
    q, noisy = nadaptor.quantize(RELU.apply, pools=True), nadaptor.quantize(train)
    names = ["Cnn/act0", "Cnn/max_pool", "Cnn/act1", "Cnn/max_pool:2"]
    assert [layer.name for layer in q.layers(variables, IMAGES)] == names
    assert [layer.name for layer in noisy.layers(variables, IMAGES)] == names
    for rule in ("lsq", "mmse"):
        hand = HAND if rule == "lsq" else MmseCnn(quantized=True)
        scales = jax.jit(functools.partial(q.init, rule=rule, sequential=True))(variables, IMAGES)
        full = jax.jit(functools.partial(start_scales, hand))(variables, IMAGES, jax.random.key(0))
        equal(with_scales(variables, scales), full)
    equal(jax.jit(q)(scales, variables, IMAGES), jax.jit(HAND.apply)(full, IMAGES))

    def quantized(pair):
        return noisy(pair[0], pair[1], IMAGES)

    def hand(full):
        return HAND.apply(full, IMAGES, train=True, mutable=["batch_stats"])

    (got, got_state), got_grad = jax.jit(loss(quantized))((scales, variables))
    (want, want_state), want_grad = jax.jit(loss(hand))(full)
    equal((got, got_state), (want, want_state))
    equal(with_scales(got_grad[1], got_grad[0]), want_grad)


class MmseCnn(Cnn):
    """The network by hand, its scales started by MMSE."""

    @nn.compact
    def __call__(self, x, train=False):
        for i, features in enumerate((4, 6)):
            x = nn.Conv(features, (3, 3), name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x)
            x = Lsq(LEVELS, scale_init="mmse", name=f"act{i}")(x)
            x = nn.avg_pool(x, (3, 3), (2, 2), ("VALID", "SAME")[i])
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_the_simulation_and_the_layers_are_those_of_the_network_by_hand(variables):
    q = nadaptor.quantize(RELU.apply, pools=True)
    scales = jax.jit(q.init)(variables, IMAGES)
    full = with_scales(variables, scales)
    got = nadaptor.simulate(q, scales, variables, IMAGES, num_steps=5)
    want = nadaptor.simulate(HAND.apply, full, IMAGES, num_steps=5)
    equal(got, want)
    net = nadaptor.spiking(q, scales, variables, IMAGES)
    layers = [layer for layer in q.layers(variables, IMAGES) if layer.kind != "max_pool"]
    assert [layer[:1] + layer[2:4] for layer in layers] == [
        (layer.name, layer.shape, layer.source) for layer in net.layers
    ]
    assert "test_quantization.py:" in net.layers[0].source


def test_the_compiled_operations_are_those_of_the_network_by_hand(variables):
    q = nadaptor.quantize(RELU.apply, pools=True)
    scales = jax.jit(q.init)(variables, IMAGES)

    def counts(f, *args):
        text = jax.jit(jax.grad(lambda *args: (f(*args) ** 2).sum())).lower(*args).as_text()
        return collections.Counter(re.findall(r"stablehlo\.\w+", text))

    got = counts(lambda pair: q(pair[0], pair[1], IMAGES), (scales, variables))
    want = counts(lambda full: HAND.apply(full, IMAGES), with_scales(variables, scales))
    assert got["stablehlo.convolution"] > 2
    assert got == want


def test_noise_is_the_adaptors_with_the_key_of_the_layer():
    q = nadaptor.quantize(plain)
    scales = jax.jit(q.init)(W, X)

    def noisy(v, scale, number):
        own = jax.random.fold_in(jax.random.key(5), number)
        factor = 1 / np.sqrt(v.shape[-1] * LEVELS)
        return nadaptor.noise_adaptor(own, v, scale, LEVELS, gradient_scale=factor)

    def got(scales, w):
        return (q(scales, w, X, key=jax.random.key(5)) ** 2).sum()

    def want(scales, w):
        return (by_hand(scales, w, X, noisy) ** 2).sum()

    got, want = jax.jit(jax.grad(got, (0, 1))), jax.jit(jax.grad(want, (0, 1)))
    equal(got(scales, W), want(scales, W))
    assert (q(scales, W, X, key=jax.random.key(5)) != q(scales, W, X)).any()


def example_keys(start, stop):
    return jax.random.split(jax.random.key(1), len(X))[start:stop]


def test_a_key_for_each_example_makes_its_noise_its_own():
    q = nadaptor.quantize(plain)
    scales = jax.jit(functools.partial(q.init, channel_axis=-1))(W, X)
    assert scales["layer0"].shape == (1, 16)
    noisy = jax.jit(lambda x, keys: q(scales, W, x, key=keys))
    together = noisy(X, example_keys(0, 32))
    close(noisy(X[3:9], example_keys(3, 9)), together[3:9])
    first = jnp.stack([jax.random.key(1), jax.random.key(1)])
    twice = noisy(jnp.stack([X[0], X[0]]), first)
    equal(twice[0], twice[1])
    with pytest.raises(
        ValueError, match=r"keys are of shape \(5,\).*layer0 has the shape \(32, 16"
    ):
        q(scales, W, X, key=example_keys(0, 5))


def test_vmap_of_a_function_of_one_example_is_the_function_of_the_batch():
    q = nadaptor.quantize(functools.partial(plain, W), batch_axis=None)
    scales = jax.jit(q.init)(X)
    close(jax.vmap(functools.partial(q, scales))(X), q(scales, X))
    noisy = jax.vmap(lambda x, key: q(scales, x, key=key))(X, example_keys(0, 32))
    close(noisy[3], q(scales, X[3], key=example_keys(3, 4)[0]))


def test_vmap_over_models_outside_of_quantize_gives_each_its_own_scale():
    models = jnp.stack([W[0], 3 * W[0]])
    inner, outer = (
        nadaptor.quantize(f) for f in (relu_of_product, jax.vmap(relu_of_product, (0, None)))
    )
    own = jax.vmap(inner.init, (0, None))(models, X)
    assert own["layer0"].shape == (2,) and outer.init(models, X)["layer0"].shape == ()
    run = jax.vmap(inner, (0, 0, None))
    close(run(own, models, X)[1], inner({"layer0": own["layer0"][1]}, models[1], X))
    assert nadaptor.simulate(run, own, models, X, num_steps=2).outputs.shape == (2, 2, 32, 16)


def relu_of_product(w, x):
    return jax.nn.relu(x @ w)


def test_grad_of_quantize_is_the_gradient_by_hand_also_through_a_closure():
    scales = jax.jit(nadaptor.quantize(plain).init)(W, X)

    def outer(w):
        return nadaptor.quantize(lambda x: plain(w, x))(scales, X).sum()

    want = jax.jit(jax.grad(lambda w: by_hand(scales, w, X, lsq).sum()))(W)
    equal(jax.jit(jax.grad(outer))(W), want)


def test_what_a_function_closes_over_is_read_at_each_call():
    box = {"w": W}
    q = nadaptor.quantize(lambda x: plain(box["w"], x))
    scales = jax.jit(q.init)(X)
    before = q(scales, X)
    box["w"] = jax.tree.map(lambda w: 2 * w, W)
    equal(q(scales, X), nadaptor.quantize(plain)(scales, box["w"], X))
    assert (q(scales, X) != before).any()


def test_remat_stays_and_its_gradient_is_that_by_hand():
    def f(w, x):
        for _ in range(2):
            x = jax.checkpoint(lambda w, x: jax.nn.relu(jnp.sin(x @ w)))(w, x)
        return x

    def hand(w, x, scales):
        for scale in scales.values():
            x = lsq(jnp.sin(x @ w), scale)
        return x

    x, q = X @ W[0], nadaptor.quantize(f)
    scales = jax.jit(q.init)(W[1], x)
    assert list(scales) == ["layer0", "layer1"]
    jaxpr = jax.make_jaxpr(functools.partial(q, scales))(W[1], x).jaxpr
    assert contains(jaxpr, lambda eqn: eqn.primitive.name in ("remat2", "checkpoint"))
    got = jax.jit(jax.grad(lambda w: q(scales, w, x).sum()))(W[1])
    close(got, jax.jit(jax.grad(lambda w: hand(w, x, scales).sum()))(W[1]))


def turns(reverse=False):
    def f(ws, x):
        def body(x, w):
            return x + jax.nn.relu(x @ w), x.sum()

        return jax.lax.scan(body, x, ws, reverse=reverse, unroll=2)

    return f, jnp.stack([W[1], 2 * W[1], -W[1]]), X @ W[0]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_stays_with_a_scale_for_each_turn(reverse):
    f, ws, x = turns(reverse)
    q = nadaptor.quantize(f)
    (layer,) = q.layers(ws, x)
    assert layer.turns == (3,)
    scales = jax.jit(q.init)(ws, x)

    @jax.jit
    def hand(z):
        for i in (2, 1, 0) if reverse else (0, 1, 2):
            z = z + lsq(z @ ws[i], scales["layer0"][i])
        return z

    close(jax.jit(q)(scales, ws, x)[0], hand(x))
    slopes = jax.jit(jax.grad(lambda s: q(s, ws, x)[0].sum()))(scales)["layer0"]
    assert slopes.shape == (3,) and (slopes != 0).all()
    jaxpr = jax.make_jaxpr(functools.partial(q, scales))(ws, x).jaxpr
    assert contains(jaxpr, lambda eqn: eqn.primitive.name == "scan" and eqn.params["unroll"] == 2)
    net = nadaptor.spiking(lambda *args: q(*args)[0], scales, ws, x)
    assert [layer.name for layer in net.layers] == ["layer0", "layer1", "layer2"]
    wrong = {"layer0": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"layer0 .*shape \(2,\).*scan of length \(3,\)"):
        q(wrong, ws, x)


def test_nested_scans_have_a_scale_and_a_noise_for_each_pair_of_turns():
    def f(x):
        def inner(x, _):
            return x, jax.nn.relu(x @ jnp.eye(400))

        def outer(x, _):
            return x, jax.lax.scan(inner, x, None, length=3)[1]

        return jax.lax.scan(outer, x, None, length=2)[1]

    x, q = jnp.full((5, 400), 0.5), nadaptor.quantize(f)
    scales = jax.jit(functools.partial(q.init, rule="max"))(x)
    assert scales["layer0"].shape == (2, 3)
    y = q(1.0, x, key=jax.random.key(0)).reshape(6, -1)
    assert len({tuple(row.tolist()) for row in y}) == 6
    # The checker of keys takes the keys of examples, sliced by turn, for consumed ones.
    with jax.debug_key_reuse(False):
        each = q(1.0, x, key=jax.random.split(jax.random.key(0), 5)).reshape(30, -1)
    assert len({tuple(row.tolist()) for row in each}) == 30


def test_custom_derivatives_without_a_relu_are_kept():
    @jax.custom_vjp
    def reverse(x):
        return x * 1.0

    reverse.defvjp(lambda x: (x, None), lambda _, g: (-7 * g,))

    @jax.custom_jvp
    def five(x):
        return x + 0.0

    five.defjvp(lambda primals, tangents: (five(*primals), 5 * tangents[0]))
    q = nadaptor.quantize(lambda w, x: jax.nn.relu(five(reverse(x @ w))))
    got = jax.grad(lambda w: q(0.7, w, X).sum())(W[0])
    close(got, -35 * jax.grad(lambda w: lsq(X @ w, 0.7).sum())(W[0]))


def test_names_and_lines_survive_two_calls_of_one_library_function():
    def f(x):
        with jax.named_scope("first"):
            x = jnp.clip(x @ W[0], 0)
        with jax.named_scope("second"):
            return jnp.clip(x @ W[1], 0)

    q = nadaptor.quantize(f)
    layers, spiking = q.layers(X), nadaptor.spiking(q, q.init(X), X).layers
    line = f.__code__.co_firstlineno
    want = [("first", line + 2), ("second", line + 4)]
    for found in (layers, spiking):
        got = [(layer.name, int(layer.source.rpartition(":")[2])) for layer in found]
        assert got == want


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 1), (0, 1))])
def test_a_max_pool_that_spikes_reach_becomes_flaxs_average_pool(padding):
    def net(pool, activate, x):
        x = pool(x, (2, 2), (2, 2))  # no spike reaches it
        x = activate(x @ jnp.ones((2, 3)))
        return pool(x, (3, 3), (2, 2), padding) @ jnp.ones((3, 2))

    q = nadaptor.quantize(functools.partial(net, nn.max_pool, nn.relu))
    pools = [layer.kind for layer in q.layers(IMAGES)]
    assert pools == ["relu", "max_pool"]
    assert [left.why for left in q.left(IMAGES)] == ["it stands before the first neuron"]

    def mean_behind(x, *args):
        return (nn.avg_pool if x.shape[-1] == 3 else nn.max_pool)(x, *args)

    equal(q(0.5, IMAGES), net(mean_behind, functools.partial(lsq, scale=0.5), IMAGES))
    kept = nadaptor.quantize(functools.partial(net, nn.max_pool, nn.relu), pools=False)
    equal(kept(0.5, IMAGES), net(nn.max_pool, functools.partial(lsq, scale=0.5), IMAGES))


def test_init_warns_of_means_once_unless_pools_are_chosen():
    def f(x):
        return nn.max_pool(jax.nn.relu(x @ jnp.ones((2, 3))), (2, 2)) @ jnp.ones((3, 2))

    q = nadaptor.quantize(f)
    with pytest.warns(
        UserWarning, match=r"1 max-pools, the first at .*py:\d+.*pools=False"
    ) as seen:
        scales = q.init(IMAGES)
    q(scales, IMAGES)
    assert len(seen) == 1 and seen[0].filename == __file__
    for pools in (True, False):
        nadaptor.quantize(f, pools=pools).init(IMAGES)


def test_inside_shard_map_and_with_an_explicit_mesh_it_is_the_same_function():
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def f(w, x):
        v = x @ w[0]
        return jax.nn.relu(v - jax.lax.pmean(v.mean(0), "data")) @ w[2]

    def alone(w, x):
        v = x @ w[0]
        return jax.nn.relu(v - v.mean(0)) @ w[2]

    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec(), spec(), spec("data")))

    def mapped(scales, w):
        def part(scales, w, x):
            return jax.lax.pmean((nadaptor.quantize(f)(scales, w, x) ** 2).mean(), "data")

        return shard(part, out_specs=spec())(scales, w, X)

    scales = {"layer0": jnp.float32(0.7)}
    want = jax.grad(lambda s, w: (nadaptor.quantize(alone)(s, w, X) ** 2).mean(), (0, 1))
    got = jax.jit(jax.grad(mapped, (0, 1)))(scales, W)
    close(got[1], want(scales, W)[1])
    explicit = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        xs = jax.device_put(X, jax.sharding.NamedSharding(explicit, spec("data")))
        w = jax.device_put(W, jax.sharding.NamedSharding(explicit, spec()))
        q = nadaptor.quantize(plain)
        scales = jax.jit(q.init)(w, xs)
        y = jax.jit(q)(scales, w, xs)
    assert jax.typeof(y).sharding.spec[0] == "data"
    close(jax.device_get(y), q(jax.device_get(scales), W, X))


def test_half_precision_keeps_its_dtype_and_float32_scales():
    w, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (W, X))
    q = nadaptor.quantize(plain)
    scales = jax.jit(q.init)(w, x)
    assert scales["layer0"].dtype == jnp.float32
    assert q(scales, w, x).dtype == jnp.bfloat16


def test_the_rules_measure_the_network_with_relus():
    q, a = nadaptor.quantize(plain, levels=4), jax.nn.relu(X @ W[0])
    b = jax.nn.relu(a @ W[1])
    assert q.init(W, X, rule="max")["layer1"] == b.max() / 4
    close(q.init(W, X, rule="lsq")["layer1"], 2 * b.mean() / 2)
    percentile = np.percentile(b[b > 0], 90) / 4
    close(q.init(W, X, rule="percentile", percent=90)["layer1"], percentile)
    own = q.init(W, X, rule=lambda a, axes: a.mean(axes, keepdims=True), channel_axis=1)
    close(own["layer0"], a.mean(0, keepdims=True) / 4)
    scales = q.init(W, X)

    def error(scale):
        return ((b - nadaptor.lsq(b, scale, 4)) ** 2).mean()

    assert all(error(scales["layer1"]) <= error(b.max() / 4 * c) for c in (1, 0.8, 0.6, 0.4))
    behind = q.init(W, X, rule="max", sequential=True)
    first = nadaptor.lsq(X @ W[0], behind["layer0"], 4)
    assert behind["layer1"] == jax.nn.relu(first @ W[1]).max() / 4


ACTIVATIONS = {
    "lsq": lambda v, s: nadaptor.lsq(v, s, LEVELS),
    "qcfs": lambda v, s: nadaptor.qcfs(v, s * LEVELS, LEVELS),
    "slip_relu": lambda v, s: nadaptor.slip_relu(v, s * LEVELS, LEVELS),
    "clipped_relu": nadaptor.clipped_relu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_by_name_is_the_function_of_that_name(name):
    q = nadaptor.quantize(lambda x: jax.nn.relu(x @ W[0]), LEVELS, activation=name)
    equal(q(0.7, X, key=jax.random.key(0)), ACTIVATIONS[name](X @ W[0], 0.7))
    assert nadaptor.spiking(q, 0.7, X).layers


def test_an_activation_of_ones_own_gets_value_scale_levels_and_key():
    def activation(v, scale, levels, key):
        return nadaptor.lsq(v, scale, levels + (key is not None))

    q = nadaptor.quantize(lambda x: jax.nn.relu(x @ W[0]), 3, activation=activation)
    equal(q(0.7, X), nadaptor.lsq(X @ W[0], 0.7, 3))
    equal(q(0.7, X, key=jax.random.key(0)), nadaptor.lsq(X @ W[0], 0.7, 4))


def test_thresholds_of_clipped_relu_are_the_calibrations():
    q = nadaptor.quantize(plain, 8, activation="clipped_relu")
    thresholds = q.init(W, X, rule="max")
    a = jax.nn.relu(X @ W[0])
    assert thresholds["layer0"] == a.max()
    found = q.init(W, X)["layer0"]
    close(found, 8 * nadaptor.quantize(plain, 8).init(W, X)["layer0"])


def test_projection_keeps_the_scales_positive():
    q = nadaptor.quantize(plain)
    scales = project_scales({**q.init(W, X), "layer0": jnp.float32(-1)})
    assert scales["layer0"] > 0
    q(scales, W, X)


FIRST = r"the first argument .* is the scales, as q\.init"


def by_name(q, *args):
    return nadaptor.simulate(q, *args, num_steps=2)


def bad_calls():
    q, scales = nadaptor.quantize(plain), {"layer0": 0.5, "layer1": 0.5}
    q_flat = nadaptor.quantize(lambda params, x: jax.nn.relu(x @ params["w"]))
    zero = tuple(jnp.zeros_like(w) for w in W)
    key = jax.random.key(0)
    return {
        "missing": (lambda: q({"layer0": 0.5}, W, X), r"no scale for 'layer1' \(.*py:\d+\)"),
        "aux head": (lambda: q({**scales, "aux": 0.5}, W, X), "no layer for 'aux'"),
        "negative": (lambda: q({**scales, "layer1": -0.5}, W, X), r"scale of layer1 .*not .*-0.5"),
        "plain": (lambda: q({**scales, "layer1": -0.5}, W, X), r"positive, not -0\.5;"),
        "swapped": (lambda: nadaptor.simulate(q, W, scales, X, num_steps=2), FIRST),
        "nested": (lambda: q({"params": {"w": W}}, scales, X), FIRST),
        "flat": (lambda: by_name(q_flat, {"w": W[0]}, {"layer0": 0.5}, X), FIRST),
        "forgotten": (lambda: nadaptor.simulate(q, W, X, num_steps=2), FIRST),
        "forgotten flat": (lambda: by_name(q_flat, {"w": W[0]}, X), FIRST),
        "all forgotten": (lambda: nadaptor.quantize(lambda x: x @ W[0])(X), FIRST),
        "zero": (lambda: q(0.0, W, X), "scale of all layers must be finite and positive"),
        "shape": (lambda: q({**scales, "layer1": jnp.ones(3)}, W, X), r"\(3,\) does not broadcast"),
        "silent": (lambda: q.init(zero, X), r"layer0 \(.*py:\d+\) is zero on all of the data"),
        "rule": (lambda: q.init(W, X, rule="mms"), "unknown rule 'mms'; did you mean 'mmse'"),
        "percent": (lambda: q.init(W, X, rule="percentile", percent=0), "percent must be above 0"),
        "activation": (lambda: nadaptor.quantize(plain, activation="lsqq"), "did you mean 'lsq'"),
        "levels": (lambda: nadaptor.quantize(plain, 0), "levels must be a positive int"),
        "argnums": (lambda: nadaptor.quantize(plain, argnums=2)(0.5, W, X), "argnums names .* 2"),
        "no key": (lambda: q(scales, W, X, key=jnp.zeros(2, jnp.uint32)), "typed PRNG key"),
        "keys": (lambda: q(scales, W, X, key=key.reshape(1, 1)), r"not \(1, 1\) keys"),
    }


def test_an_error_of_the_function_itself_is_passed_on():
    q = nadaptor.quantize(lambda params, x: jax.nn.relu(x @ params["v"]))
    with pytest.raises(KeyError, match="v"):
        q({"layer0": 0.5}, {"w": W[0]}, X)


@pytest.mark.parametrize("case", bad_calls().keys())
def test_bad_input_is_a_value_error_that_says_what_to_do(case):
    call, match = bad_calls()[case]
    with pytest.raises(ValueError, match=match):
        call()
