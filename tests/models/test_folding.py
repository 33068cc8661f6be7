import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor.models import Lsq, Relu, create, fold_batch_norm


def shaken(shapes, seed=0):
    """Variables of those shapes, with gains and statistics of an eventful training behind them."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))

    def draw(path, leaf):
        noise = jax.random.normal(next(keys), leaf.shape)
        name = path[-1].key
        if name == "kernel":
            return noise / np.sqrt(leaf.size / leaf.shape[-1])
        return jnp.exp(0.5 * noise) if name in ("var", "scale", "quant_scale") else 0.3 * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Dense(nn.Module):
    """A dense layer and its norm, under the given names, with or without biases and gains."""

    names: tuple[str, str]
    bias: bool = True
    gain: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=self.bias, name=self.names[0])(x)
        norm = nn.BatchNorm(
            True, epsilon=1e-3, use_scale=self.gain, use_bias=self.gain, name=self.names[1]
        )
        return norm(x)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits_resnet8", {"stage_sizes": (1, 1), "width": 4}),
        ("resnet50", {"stage_sizes": (1,), "width": 4, "shortcut": "pad"}),
    ],
)
@pytest.mark.parametrize("activation", [Relu, functools.partial(Lsq, levels=4)])
def test_folding_changes_nothing(name, options, activation):
    build = functools.partial(create, name, 10, activation=activation, **options)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = shaken(jax.eval_shape(build().init, jax.random.key(0), x))
    folded = fold_batch_norm(variables)
    template = jax.eval_shape(build(norm=None).init, jax.random.key(0), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(folded, template)
    before, after = jax.jit(build().apply)(variables, x), jax.jit(build(norm=None).apply)(folded, x)
    if activation is Relu:
        np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    else:
        # Folding regroups sums: a value on a rounding edge may go the other way.
        assert jnp.median(jnp.abs(before - after)) < 1e-4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gain", [False, True])
def test_folding_a_dense_layer_changes_nothing_with_or_without_bias_and_gain(bias, gain):
    model, x = Dense(("fc", "fc_norm"), bias, gain), jax.random.normal(jax.random.key(1), (5, 3))
    variables = shaken(model.init(jax.random.key(0), x))
    folded = fold_batch_norm(variables, epsilon=1e-3)
    after = nn.Dense(4).apply({"params": folded["params"]["fc"]}, x)
    np.testing.assert_allclose(model.apply(variables, x), after, rtol=1e-5, atol=1e-6)


def test_pairs_names_layers_of_another_convention():
    x = jax.random.normal(jax.random.key(1), (5, 3))
    variables = shaken(Dense(("fc", "bn")).init(jax.random.key(0), x))
    renamed = {
        name: {key.replace("bn", "fc_norm"): leaf for key, leaf in tree.items()}
        for name, tree in variables.items()
    }
    chex.assert_trees_all_equal(
        fold_batch_norm(variables, pairs={"bn": "fc"}), fold_batch_norm(renamed)
    )


def test_folding_is_the_closed_form():
    params = {"fc": {"kernel": jnp.full((1, 2), 2.0)}, "fc_norm": {"bias": jnp.array([1.0, -1.0])}}
    stats = {"fc_norm": {"mean": jnp.array([3.0, 0.0]), "var": jnp.array([3.0, 0.0])}}
    folded = fold_batch_norm({"params": params, "batch_stats": stats}, epsilon=1.0)
    expected = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([-0.5, -1.0])}
    chex.assert_trees_all_close(folded, {"params": {"fc": expected}})


def test_folded_leaves_are_float32_and_others_untouched():
    variables = Dense(("fc", "fc_norm")).init(jax.random.key(0), jnp.ones((1, 3)))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    half["params"]["act1"] = {"quant_scale": jnp.array(0.5, jnp.bfloat16)}
    half["calibration"] = {"act1": jnp.array(1)}
    folded = fold_batch_norm(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded["params"]["fc"])} == {
        jnp.dtype("float32")
    }
    assert folded["params"]["act1"]["quant_scale"] is half["params"]["act1"]["quant_scale"]
    assert folded["calibration"] is half["calibration"]
    assert folded.keys() == {"params", "calibration"}


def test_folding_twice_is_folding_once():
    variables = shaken(Dense(("fc", "fc_norm")).init(jax.random.key(0), jnp.ones((1, 3))))
    once = fold_batch_norm(variables)
    chex.assert_trees_all_equal(fold_batch_norm(once), once)


def test_folding_works_under_jit():
    variables = shaken(Dense(("fc", "fc_norm")).init(jax.random.key(0), jnp.ones((1, 3))))
    chex.assert_trees_all_close(jax.jit(fold_batch_norm)(variables), fold_batch_norm(variables))


STATS = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
KERNEL = {"kernel": jnp.ones((3, 2))}


@pytest.mark.parametrize(
    ("params", "stats", "pairs", "message"),
    [
        ({"a": {"fc": KERNEL}}, {"a": {"bn": STATS}}, None, "batch norm a/bn has no layer"),
        ({"a": {"fc": KERNEL}}, {"b": {"fc_norm": STATS}}, None, "kernel at b/fc"),
        ({"fc": KERNEL}, STATS, None, "has no layer"),
        ({"fc": KERNEL}, {"fc_norm": STATS, "bn": STATS}, {"bn": "fc"}, "two batch norms claim fc"),
        ({"fc": KERNEL, "fc_norm": {"scale": jnp.ones(2)}}, {}, None, "fc_norm has no running"),
        ({"fc": KERNEL}, {"fc_norm": {"mean": jnp.zeros(2)}}, None, "fc_norm has no running"),
        ({"fc": {"kernel": jnp.ones((2, 3))}}, {"fc_norm": STATS}, None, "fc_norm has 2 channels"),
        ({"fc": KERNEL}, {"fc_norm": STATS}, {"typo": "fc"}, "pairs names typo"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(params, stats, pairs, message):
    with pytest.raises(ValueError, match=message):
        fold_batch_norm({"params": params, "batch_stats": stats}, pairs=pairs)
