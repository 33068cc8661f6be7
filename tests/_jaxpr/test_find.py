"""Which maxima become quantizers: every spelling of a ReLU, and nothing else."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nadaptor

W, V, X = (
    jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    for shape in ((8, 16), (16, 16), (6, 8))
)
LABELS = jnp.arange(6) % 16
ONE_HOT = jax.nn.one_hot(LABELS, 16)


def replaced(f, *args, **options):
    return nadaptor.quantize(f, **options).layers(*args)


@jax.custom_vjp
def own_derivative(x):
    return jnp.maximum(x, 0)


own_derivative.defvjp(lambda x: (own_derivative(x), x), lambda x, g: (g * (x > 0),))

RELUS = {
    "jax.nn.relu": jax.nn.relu,
    "maximum(x, 0)": lambda x: jnp.maximum(x, 0),
    "maximum(0, x)": lambda x: jnp.maximum(0.0, x),
    "maximum(x, zeros)": lambda x: jnp.maximum(x, jnp.zeros_like(x)),
    "where(x > 0, x, 0)": lambda x: jnp.where(x > 0, x, 0),
    "where(x >= 0, x, 0)": lambda x: jnp.where(x >= 0, x, 0),
    "where(0 < x, x, 0)": lambda x: jnp.where(x > 0, x, 0),
    "where(x < 0, 0, x)": lambda x: jnp.where(x < 0, 0, x),
    "x * (x > 0)": lambda x: x * (x > 0),
    "(x > 0) * x": lambda x: (x > 0).astype(x.dtype) * x,
    "clip(x, 0)": lambda x: jnp.clip(x, 0),
    "clip(x, min=0)": lambda x: jnp.clip(x, min=0),
    "remat": jax.checkpoint(jax.nn.relu),
    "vmap": jax.vmap(lambda x: jnp.maximum(x, 0), in_axes=1, out_axes=1),
    "jit": jax.jit(lambda x: jnp.maximum(x, 0)),
    "scan": lambda x: jax.lax.scan(lambda c, x: (c, jax.nn.relu(x)), 0, x)[1],
    "custom_vjp": own_derivative,
}
ZEROS = jnp.zeros((6, 16))
# Operations of several results, each of which is the operand at its own place.
TOGETHER = {"device_put": jax.device_put, "barrier": jax.lax.optimization_barrier}
BOUNDED = {
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, 0, 6),
    "min(max)": lambda x: jnp.minimum(jnp.maximum(x, 0), 6),
    "max(min)": lambda x: jnp.maximum(jnp.minimum(x, 6), 0),
    "clamp": lambda x: jax.lax.clamp(0.0, x, 6.0),
}


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS.keys())
def test_each_spelling_of_a_relu_becomes_lsq(relu):
    q = nadaptor.quantize(lambda x: relu(x @ W))
    (layer,) = q.layers(X)
    assert (layer.kind, layer.bound) == ("relu", None) and not q.left(X)
    want = nadaptor.lsq(X @ W, 0.7, 2)
    np.testing.assert_array_equal(q(0.7, X), want)


@pytest.mark.parametrize("pass_on", TOGETHER.values(), ids=TOGETHER.keys())
def test_each_result_of_what_passes_several_values_on_is_its_own_operand(pass_on):
    def relu(x):
        zeros, h = pass_on((ZEROS, x @ W))
        return jnp.maximum(h, zeros)

    def second_zero(x):
        h, zeros = pass_on((x @ W, ZEROS))
        return jnp.maximum(h, zeros)

    for f in (relu, second_zero):
        np.testing.assert_array_equal(nadaptor.quantize(f)(0.7, X), nadaptor.lsq(X @ W, 0.7, 2))

    def of_two(x):
        _, h = pass_on((ZEROS, jax.nn.relu(x @ W) @ V))
        return jnp.maximum(h, h[::-1])

    assert [layer.name for layer in replaced(of_two, X)] == ["layer0"]

    def derivative(x):
        _, h = pass_on((ZEROS, v := x @ W))
        return jax.nn.relu(v) * (h > 0)

    with pytest.raises(ValueError, match="stands its derivative"):
        replaced(derivative, X)


@pytest.mark.parametrize("relu", BOUNDED.values(), ids=BOUNDED.keys())
@pytest.mark.parametrize(("scale", "kept"), [(0.7, 0.7), (5.0, 3.0)])
def test_a_bounded_relu_becomes_lsq_with_the_threshold_at_most_its_bound(relu, scale, kept):
    q = nadaptor.quantize(lambda x: relu(4 * x @ W))
    (layer,) = q.layers(X)
    assert (layer.kind, layer.bound) == ("bounded_relu", 6.0) and not q.left(X)
    np.testing.assert_array_equal(q(scale, X), nadaptor.lsq(4 * X @ W, kept, 2))
    assert float(q.init(X, rule="max")[layer.name]) <= 3.0
    slope = jax.grad(lambda s: q({layer.name: s}, X).sum())(5.0)
    assert slope != 0  # a step above the bound can be undone


def linen(module, shape=(6, 16), **options):
    variables = jax.jit(lambda x: module.init(jax.random.key(0), x, **options))(jnp.ones(shape))
    return lambda x: module.apply(variables, x.reshape(shape), mutable=["batch_stats"], **options)[
        0
    ]


def haiku(make):
    net = hk.without_apply_rng(hk.transform_with_state(make))
    params, state = jax.jit(net.init)(jax.random.key(0), jnp.ones((6, 16)))
    return lambda x: net.apply(params, state, x)[0]


NO_RELUS = {
    "linen BatchNorm": lambda: linen(nn.BatchNorm(use_running_average=False)),
    "linen BatchNorm, slow": lambda: linen(
        nn.BatchNorm(use_running_average=False, use_fast_variance=False)
    ),
    "linen LayerNorm": lambda: linen(nn.LayerNorm()),
    "linen RMSNorm": lambda: linen(nn.RMSNorm()),
    "linen GroupNorm": lambda: linen(nn.GroupNorm(4)),
    "linen InstanceNorm": lambda: linen(nn.InstanceNorm(), (6, 2, 2, 4)),
    "linen SpectralNorm": lambda: linen(nn.SpectralNorm(nn.Dense(16)), update_stats=True),
    "linen PReLU": lambda: linen(nn.PReLU()),
    "linen attention": lambda: linen(nn.MultiHeadDotProductAttention(4)),
    "nnx BatchNorm": lambda: lambda x: nnx.BatchNorm(16, rngs=nnx.Rngs(0))(x),
    "nnx LayerNorm": lambda: nnx.LayerNorm(16, rngs=nnx.Rngs(0)),
    "nnx GroupNorm": lambda: nnx.GroupNorm(16, 4, rngs=nnx.Rngs(0)),
    "equinox LayerNorm": lambda: jax.vmap(eqx.nn.LayerNorm(16)),
    "equinox GroupNorm": lambda: jax.vmap(eqx.nn.GroupNorm(4, 16)),
    "haiku BatchNorm": lambda: haiku(lambda x: hk.BatchNorm(True, True, 0.9)(x, True)),
    "haiku LayerNorm": lambda: haiku(lambda x: hk.LayerNorm(-1, True, True)(x)),
    "haiku GroupNorm": lambda: haiku(lambda x: hk.GroupNorm(4)(x)),
    "standardize": lambda: jax.nn.standardize,
    "var": lambda: lambda x: x.var(0),
    "norm": lambda: lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 0),
    "root of a relu": lambda: lambda x: jnp.sqrt(jnp.maximum(x - 1, 0) + 1e-6),
    "log of a relu": lambda: lambda x: jnp.log(jnp.maximum(x - 1, 0) + 1),
    "1 / relu": lambda: lambda x: 1 / (1 + jax.nn.relu(x - 1)),
    "softmax": lambda: jax.nn.softmax,
    "logsumexp": lambda: lambda x: jax.nn.logsumexp(x, -1),
    "cross entropy": lambda: lambda x: optax.softmax_cross_entropy_with_integer_labels(x, LABELS),
    "sigmoid entropy": lambda: lambda x: optax.sigmoid_binary_cross_entropy(x, ONE_HOT),
    "huber": lambda: lambda x: optax.huber_loss(x, ONE_HOT),
    "hinge": lambda: lambda x: optax.hinge_loss(x, 2 * ONE_HOT - 1),
    "attention": lambda: lambda x: jax.nn.dot_product_attention(*[x.reshape(1, 6, 4, 4)] * 3),
    "resize": lambda: lambda x: jax.image.resize(x.reshape(6, 4, 4), (6, 8, 8), "bilinear"),
    "interp": lambda: lambda x: jnp.interp(x, jnp.arange(4.0), jnp.arange(4.0) ** 2),
    "clip(-1, 1)": lambda: lambda x: jnp.clip(x, -1, 1),
    "clip(0.5, 1)": lambda: lambda x: jnp.clip(x, 0.5, 1),
    "max(x, 1)": lambda: lambda x: jnp.maximum(x, 1),
    "where(x > 1, x, 0)": lambda: lambda x: jnp.where(x > 1, x, 0),
    "where(x > 0, x + 1, 0)": lambda: lambda x: jnp.where(x > 0, x + 1, 0),
    "min(x, 0)": lambda: lambda x: jnp.where(x < 0, x, 0),
    "abs": lambda: jnp.abs,
    "max(x, y)": lambda: lambda x: jnp.maximum(x, x[::-1]),
    "maxout": lambda: lambda x: x.reshape(6, 8, 2).max(-1),
    "global max": lambda: lambda x: x.max(0),
    "top_k": lambda: lambda x: jax.lax.top_k(x, 3)[0],
    "sort": lambda: jnp.sort,
    "argmax": lambda: lambda x: jax.nn.one_hot(x.argmax(-1), 16),
    "integers": lambda: lambda x: x[jnp.maximum(jnp.arange(6) - 1, 0)],
    "gumbel": lambda: lambda x: x + jax.random.gumbel(jax.random.key(0), x.shape),
    "mask": lambda: lambda x: jnp.where(jnp.tri(6, 16) > 0, x, 0),
    "softplus": lambda: jax.nn.softplus,
    "log_sigmoid": lambda: jax.nn.log_sigmoid,
    "mish": lambda: jax.nn.mish,
    "celu": lambda: jax.nn.celu,
    "elu": lambda: jax.nn.elu,
    "selu": lambda: jax.nn.selu,
    "gelu": lambda: jax.nn.gelu,
    "silu": lambda: jax.nn.silu,
    "glu": lambda: jax.nn.glu,
    "leaky_relu": lambda: jax.nn.leaky_relu,
    "squareplus": lambda: jax.nn.squareplus,
    "hard_swish": lambda: jax.nn.hard_swish,
    "hard_sigmoid": lambda: jax.nn.hard_sigmoid,
    "hard_tanh": lambda: jax.nn.hard_tanh,
    "sparse_plus": lambda: jax.nn.sparse_plus,
    "sparse_sigmoid": lambda: jax.nn.sparse_sigmoid,
    "linen hard_swish": lambda: nn.hard_swish,
}


@pytest.mark.parametrize("make", NO_RELUS.values(), ids=NO_RELUS.keys())
def test_what_is_no_relu_stays(make):
    g = make()
    layers = replaced(lambda x: g(jax.nn.relu(x @ W) @ V), X)
    assert [layer.kind for layer in layers] == ["relu"]


def test_only_what_data_reaches_behind_weights_is_replaced():
    def f(w, x):
        x = jnp.clip(x, 0, 1)
        return jax.nn.relu(x @ jnp.maximum(w, 0))

    q = nadaptor.quantize(f)
    assert [layer.kind for layer in q.layers(W, X)] == ["relu"]
    whys = [left.why for left in q.left(W, X)]
    assert whys == ["it stands before the first product with weights", "no data reaches it"]


def test_what_spikes_reach_and_is_no_neuron_is_named_with_its_line():
    q = nadaptor.quantize(lambda x: jax.nn.softmax(jax.nn.relu(x @ W)))
    left = q.left(X)
    assert {entry.kind for entry in left} == {"softmax"}
    assert all("test_find.py:" in entry.source for entry in left)


@pytest.mark.parametrize("options", [{}, {"argnums": (0, 1)}, {"argnums": None}])
def test_argnums_names_the_data(options):
    def f(x, w):
        return jax.nn.relu(x @ w)

    if options:
        assert len(replaced(f, X, W, **options)) == 1
    else:
        assert len(replaced(lambda x, w: f(x, w @ w.T @ w), X, W)) == 1


def test_a_relu_in_a_branch_or_a_loop_is_refused_with_its_line():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def relu(x):
        return jnp.where(x > 0, x, 0)

    def loop(x):
        state = (0, x @ W @ W.T)
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, relu(c[1])), state)[1]

    def branch(x):
        return jax.lax.cond(x.sum() > 0, relu, lambda x: x, x @ W)

    def mapped(x):
        return jax.shard_map(lambda x: relu(x @ W), mesh=mesh, in_specs=spec, out_specs=spec)(x)

    for f, name in ((loop, "while"), (branch, "cond"), (mapped, "shard_map")):
        with pytest.raises(ValueError, match=rf"cannot quantize: {name} at .*test_find.py:\d+ hol"):
            replaced(f, X)


def test_a_branch_without_a_relu_stays():
    def f(x):
        x = jax.lax.cond(x.sum() > 0, jax.nn.softplus, jnp.abs, jax.nn.relu(x @ W))
        return jax.lax.fori_loop(0, jnp.int32(2), lambda i, x: x / x.std(), x)

    assert len(replaced(f, X)) == 1


def nets():
    return {
        "relu": jax.nn.relu,
        "maximum": lambda x: jnp.maximum(x, 0),
        "where": lambda x: jnp.where(x > 0, x, 0),
        "product": lambda x: x * (x > 0),
        "clip": lambda x: jnp.clip(x, 0, 6),
        "clamp": lambda x: jax.lax.clamp(0.0, x, 6.0),
        "remat": jax.checkpoint(lambda x: jax.nn.relu(x) * 2),
        "scan": lambda x: jax.lax.scan(lambda c, w: (jax.nn.relu(c * w), 0), x, jnp.ones(3))[0],
    }


@pytest.mark.parametrize("relu", nets().values(), ids=nets().keys())
@pytest.mark.parametrize("derivative", ["grad", "jvp"])
def test_the_derivative_of_a_relu_is_refused(relu, derivative):
    def loss(w, x):
        return (relu(x @ w) ** 2).sum()

    def jvp(w, x):
        return jax.jvp(lambda w: relu(x @ w), (w,), (w,))

    f = jax.grad(loss) if derivative == "grad" else jvp
    with pytest.raises(ValueError, match=r"its derivative.*jax\.grad\(nadaptor\.quantize\(f\)\)"):
        replaced(f, W, X)


def test_a_count_of_active_features_is_no_derivative():
    def f(x):
        v = x @ W
        return jax.nn.relu(v) @ W.T, (v > 0).mean()

    assert len(replaced(f, X)) == 1


def test_a_hinge_loss_in_the_function_is_refused():
    def f(x):
        return jnp.maximum(0, 1 - jax.nn.relu(x @ W) @ W.T).mean()

    with pytest.raises(ValueError, match="leave the loss outside"):
        replaced(f, X)


def test_a_custom_derivative_around_more_than_a_relu_is_refused():
    @jax.custom_vjp
    def block(w, x):
        return jax.nn.relu(x @ w)

    block.defvjp(lambda w, x: (block(w, x), (w, x)), lambda saved, g: saved)
    q = nadaptor.quantize(lambda x: block(W, x) @ W.T)
    with pytest.raises(ValueError, match=r"custom_vjp of .* holds a ReLU .*test_find.py:\d+"):
        q.init(X)


def test_nothing_to_quantize_names_what_was_left_and_why():
    q = nadaptor.quantize(lambda x: jnp.maximum(x, 0) @ W)
    with pytest.raises(
        ValueError, match=r"no ReLU.*data, the last argument,.*relu at .*before the first"
    ):
        q.init(X)
    with pytest.raises(ValueError, match="it is of integers"):
        nadaptor.quantize(lambda x: jnp.maximum(x @ jnp.ones((8, 4), int), 0)).init(X.astype(int))


OTHERS = {
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_without_relus_is_told_which_functions_it_has_and_where(name):
    q = nadaptor.quantize(lambda w, x: OTHERS[name](x @ w) @ w.T)
    with pytest.raises(ValueError, match=rf"no ReLU, but {name} at .*test_find.py:\d+: replace"):
        q.init(W, X)


@pytest.mark.parametrize(
    ("argnums", "words"),
    [((0, 1), "argument 0 and argument 1"), (None, "all arguments"), (1, "argument 1")],
)
def test_the_data_are_named_in_words(argnums, words):
    q = nadaptor.quantize(lambda x, y: x @ W + y @ W, argnums=argnums)
    with pytest.raises(ValueError, match=f"its data, {words}, by"):
        q.init(X, X)


SPELT_OTHERWISE = {
    "fmax": lambda v: jnp.fmax(v, 0),
    "-minimum": lambda v: -jnp.minimum(-v, 0),
    "(abs + v) / 2": lambda v: (jnp.abs(v) + v) / 2,
    "clip from -1": lambda v: jnp.clip(v - 1, -1, 3) + 1,
}


@pytest.mark.parametrize("name", SPELT_OTHERWISE)
def test_a_spelling_that_is_not_known_is_left_and_listed(name):
    q = nadaptor.quantize(lambda x: jax.nn.relu(SPELT_OTHERWISE[name](jax.nn.relu(x @ W) @ V) @ V))
    assert len(q.layers(X)) == 2
    assert any("test_find.py:" in entry.source for entry in q.left(X))


def test_select_keeps_what_it_does_not_select():
    def f(x):
        return jax.nn.relu(jax.nn.relu(x @ W) @ W.T)

    q = nadaptor.quantize(f, select=lambda layer: layer.shape[-1] == 8)
    assert [layer.shape for layer in q.layers(X)] == [(6, 8)]
    assert [left.why for left in q.left(X)] == ["it is not selected"]
    np.testing.assert_array_equal(q(0.5, X), nadaptor.lsq(jax.nn.relu(X @ W) @ W.T, 0.5, 2))


def test_a_quantizer_that_is_there_already_stays():
    q = nadaptor.quantize(lambda x: jax.nn.relu(nadaptor.lsq(x @ W, 0.5, 2) @ W.T))
    assert [layer.shape for layer in q.layers(X)] == [(6, 8)] and not q.left(X)


class Unnamed(nn.Module):
    """Its ReLUs stand in the scope of the module itself."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.relu(nn.Dense(16, name=f"fc{i}")(x))
        return x


def three(x):
    for w in (W, V, V):
        x = jax.nn.relu(x @ w)
    return x


def scoped(x):
    return Unnamed().apply(Unnamed().init(jax.random.key(0), X), x)


@pytest.mark.parametrize("f", [three, scoped])
def test_select_is_shown_the_names_that_layers_lists_and_left_lists_what_it_drops(f):
    names = [layer.name for layer in replaced(f, X)]
    assert names == (["layer0", "layer1", "layer2"] if f is three else list(SCOPES))
    for dropped in names:
        shown = []

        def select(layer, dropped=dropped, shown=shown):
            shown.append(layer.name)
            return layer.name != dropped

        q = nadaptor.quantize(f, select=select)
        kept = [name for name in names if name != dropped]
        assert [layer.name for layer in q.layers(X)] == kept == list(q.init(X))
        assert shown[:3] == names
        assert (dropped, "it is not selected") in [(e.name, e.why) for e in q.left(X)]
        only = nadaptor.quantize(f, select=lambda layer, name=dropped: layer.name == name)
        assert [layer.name for layer in only.layers(X)] == [dropped]
        assert [e.name for e in only.left(X) if e.why == "it is not selected"] == kept


SCOPES = ("Unnamed", "Unnamed:2", "Unnamed:3")


def test_a_pools_name_does_not_depend_on_select():
    def f(x):
        for w in (W, V, V):
            x = jax.nn.relu(x @ w)
            x = nn.max_pool(x[..., None], (1,), (1,))[..., 0]
        return x

    names = ["layer0", "max_pool", "layer1", "max_pool:2", "layer2", "max_pool:3"]
    assert [layer.name for layer in replaced(f, X)] == names
    kept = replaced(f, X, select=lambda layer: layer.name not in ("layer0", "max_pool:2"))
    assert [layer.name for layer in kept] == ["layer1", "layer2", "max_pool:3"]


def test_where_select_rejects_all_the_error_says_so_and_names_them():
    q = nadaptor.quantize(three, select=lambda layer: False)
    with pytest.raises(
        ValueError, match=r"^cannot quantize: select rejects .* 3 layers .*'layer0' \(.*:\d+\), 'l"
    ):
        q.init(X)
