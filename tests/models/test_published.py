"""VGG and MobileNetV2 against what torch computes, written out here in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.configs.build import build_model
from nadaptor.configs.config import replace
from nadaptor.configs.named import get_config
from nadaptor.interop import from_torch
from nadaptor.models import Lsq, create, fold_batch_norm, mobilenet
from nadaptor.models.layers import pool_images

LAYERS = ("weight", "bias", "running_mean", "running_var")


def convolve(x, weight, stride=1, groups=1, bias=None):
    """torch's conv2d with padding size // 2 on NCHW."""
    around = weight.shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (around, around), (around, around)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))
    parts = zip(
        np.split(windows[:, :, ::stride, ::stride], groups, 1),
        np.split(weight, groups),
        strict=True,
    )
    y = np.concatenate([np.einsum("bchwij,ocij->bohw", a, w) for a, w in parts], 1)
    return y if bias is None else y + bias[:, None, None]


def normalise(x, state, name):
    gain, offset, mean, var = (state[f"{name}.{leaf}"][:, None, None] for leaf in LAYERS)
    return (x - mean) / np.sqrt(var + 1e-5) * gain + offset


def random_state(shapes):
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if name.endswith("running_var"):
            return rng.uniform(0.5, 2, shape)
        return rng.normal(size=shape) * (2 / max(1, np.prod(shape[1:]))) ** 0.5

    return {name: draw(name, shape).astype("f4") for name, shape in shapes.items()}


def norm(name, features):
    return {f"{name}.{leaf}": (features,) for leaf in LAYERS}


def torch_shapes(name, **options):
    """The names and shapes of one of our networks, by a way of its own: torch's source."""
    shapes, into, index = {}, 3, 0
    for stage, size in enumerate(options["stage_sizes"]):
        for _ in range(size):
            out = min(4 * 2**stage, 32)
            shapes[f"features.{index}.weight"] = (out, into, 3, 3)
            shapes[f"features.{index}.bias"] = (out,)
            if name.endswith("_bn"):
                shapes |= norm(f"features.{index + 1}", out)
            index += 3 if name.endswith("_bn") else 2
            into = out
        index += 1
    for place, (out, inputs) in {0: (16, 49 * into), 3: (16, 16), 6: (5, 16)}.items():
        shapes |= {f"classifier.{place}.weight": (out, inputs), f"classifier.{place}.bias": (out,)}
    return shapes


def torch_vgg(state, x, stage_sizes, normalized, pool):
    index = 0
    for size in stage_sizes:
        for _ in range(size):
            name = f"features.{index}"
            x = convolve(x, state[f"{name}.weight"], bias=state[f"{name}.bias"])
            x = normalise(x, state, f"features.{index + 1}") if normalized else x
            x, index = np.maximum(x, 0), index + (3 if normalized else 2)
        b, c, h, w = x.shape
        x, index = pool(x.reshape(b, c, h // 2, 2, w // 2, 2), (3, 5)), index + 1

    def starts(side):
        return [(i * side // 7, -(-(i + 1) * side // 7)) for i in range(7)]

    x = np.stack(
        [
            np.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in starts(x.shape[3])], -1)
            for a, b in starts(x.shape[2])
        ],
        -2,
    )
    x = x.reshape(len(x), -1)  # [C, H, W], as torch flattens
    for place in (0, 3, 6):
        x = x @ state[f"classifier.{place}.weight"].T + state[f"classifier.{place}.bias"]
        x = np.maximum(x, 0) if place < 6 else x
    return x


@pytest.mark.parametrize("side", [(64, 96), (224, 256)])
@pytest.mark.parametrize(("name", "pool"), [("vgg11_bn", "mean"), ("vgg11", "max")])
def test_a_vgg_with_torchs_weights_computes_what_torch_computes(name, pool, side):
    sizes = {"stage_sizes": (1, 1, 1, 1, 1)}
    model = create(name, 5, width=4, hidden=16, pool=pool, **sizes)
    state = random_state(torch_shapes(name, **sizes))
    x = np.random.default_rng(1).normal(size=(2, 3, *side)).astype("f4")
    images = x.transpose(0, 2, 3, 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    got = jax.jit(model.apply)(from_torch(state, shapes), images)
    pools = {"mean": np.mean, "max": np.max}
    expected = torch_vgg(state, x, (1,) * 5, name.endswith("_bn"), pools[pool])
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


BLOCKS = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def torch_mobilenet(width):
    """The layers in order: name, norm, kernel, stride, groups, bounded; and where blocks add."""

    def round_to(v):
        new = max(8, int(v + 4) // 8 * 8)
        return new + 8 if new < 0.9 * v else new

    into = round_to(32 * width)
    layers, index, blocks = [("features.0.0", "features.0.1", (into, 3, 3, 3), 2, 1, True)], 1, []
    for expansion, features, count, stride in BLOCKS:
        for place in range(count):
            out, wide, step = round_to(features * width), into * expansion, stride
            step, name = stride if place == 0 else 1, f"features.{index}.conv"
            first = len(layers)
            if expansion > 1:
                layers.append((f"{name}.0.0", f"{name}.0.1", (wide, into, 1, 1), 1, 1, True))
            n = int(expansion > 1)
            layers.append((f"{name}.{n}.0", f"{name}.{n}.1", (wide, 1, 3, 3), step, wide, True))
            shape = (out, wide, 1, 1)
            layers.append((f"{name}.{n + 1}", f"{name}.{n + 2}", shape, 1, 1, False))
            blocks.append((first, len(layers), step == 1 and into == out))
            into, index = out, index + 1
    layers.append((f"features.{index}.0", f"features.{index}.1", (1280, into, 1, 1), 1, 1, True))
    return layers, blocks


@functools.cache
def small_mobilenet():
    layers, _ = torch_mobilenet(0.25)
    shapes = {"classifier.1.weight": (5, 1280), "classifier.1.bias": (5,)}
    for name, bn, shape, *_ in layers:
        shapes |= {f"{name}.weight": shape, **norm(bn, shape[0])}
    return random_state(shapes)


def test_a_mobilenet_with_torchs_weights_computes_what_torch_computes():
    state, (layers, blocks) = small_mobilenet(), torch_mobilenet(0.25)
    x = np.random.default_rng(1).normal(size=(2, 3, 32, 48)).astype("f4")
    images = x.transpose(0, 2, 3, 1)
    adds = {last - 1: first for first, last, add in blocks if add}
    inputs, reached = [], 0
    for place, (name, bn, _, stride, groups, bounded) in enumerate(layers):
        inputs.append(x)
        x = normalise(convolve(x, state[f"{name}.weight"], stride, groups), state, bn)
        reached += bounded and bool((x > 6).any())
        x = np.clip(x, 0, 6) if bounded else x
        x = x + inputs[adds[place]] if place in adds else x
    assert reached > 0
    expected = x.mean((2, 3)) @ state["classifier.1.weight"].T + state["classifier.1.bias"]
    model = create("mobilenet_v2", 5, width=0.25)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    got = jax.jit(model.apply)(from_torch(state, shapes), images)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "options"),
    [("cifar_vgg11_bn", {"width": 4}), ("mobilenet_v2", {"width": 0.25})],
)
def test_each_folds_to_the_same_function_and_converts_layer_by_layer(name, options, monkeypatch):
    # Every kind of block once: without expansion, with a stride, and with its input added.
    monkeypatch.setattr(mobilenet, "_STAGES", ((1, 16, 1, 1), (6, 24, 2, 2)))
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    make = functools.partial(create, name, 5, activation=functools.partial(Lsq, levels=2))
    model, folded = make(**options), make(**options, norm=None)
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(0), images)
    small = fold_batch_norm(variables)
    quantized = jax.jit(folded.apply)(small, images)
    np.testing.assert_allclose(
        quantized, jax.jit(model.apply)(variables, images), rtol=1e-3, atol=1e-4
    )
    layers = nadaptor.spiking(folded.apply, small, images).layers
    assert len(layers) == {"cifar_vgg11_bn": 8, "mobilenet_v2": 7}[name]
    assert all(layer.threshold == 2 for layer in layers)


def test_the_pools_are_torchs():
    x = -jnp.arange(1.0, 17).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(pool_images(x, "max", 3, 2, 1).ravel(), [-1, -2, -5, -6])
    np.testing.assert_allclose(pool_images(x, "mean", 3, 2, 1)[0, 0, 0, 0], -14 / 9, rtol=1e-6)
    with pytest.raises(ValueError, match="'mean' or 'max', not 'avg'"):
        pool_images(x, "avg", 2, 2)


def test_the_stem_keeps_its_own_pool_where_asked():
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    models = [
        create("resnet18", 3, stage_sizes=(1,), width=4, pool=pool) for pool in ("max", "mean")
    ]
    variables = jax.eval_shape(models[0].init, jax.random.key(0), x)
    text = [str(jax.make_jaxpr(model.apply)(variables, x)) for model in models]
    assert ["reduce_window_max" in t for t in text] == [True, False]


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_a_config_chooses_the_pools_of_a_network_that_has_some(name):
    config = replace(get_config("imagenet_resnet18"), model=name, width=4)
    pools = {
        pool: build_model(replace(config, pool=pool), num_classes=3).pool
        for pool in (None, "mean", "max")
    }
    assert pools == {None: "mean", "mean": "mean", "max": "max"}


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet18", "mobilenet_v2"])
def test_a_pool_is_refused_where_there_is_none(name):
    config = replace(get_config("cifar10_resnet20"), model=name, pool="max")
    with pytest.raises(ValueError, match=f"pool 'max' cannot be had: {name} has no pool"):
        build_model(config)


def test_dense_weights_after_a_flattened_map_are_put_in_its_order_or_refused():
    rng = np.random.default_rng(0)
    state = {
        "conv.weight": rng.normal(size=(3, 1, 1, 1)),
        "fc.weight": rng.normal(size=(3, 12)),
        "fc.bias": np.zeros(3),
    }
    variables = {
        "params": {
            "conv": {"kernel": jnp.zeros((1, 1, 1, 3))},
            "fc": {"kernel": jnp.zeros((12, 3)), "bias": jnp.zeros(3)},
        }
    }
    x = rng.normal(size=(4, 3, 2, 2)).astype("f4")  # a map [B, C, H, W]
    expected = x.reshape(4, -1) @ state["fc.weight"].T
    for shape, laid in (((3, 2, 2), x.transpose(0, 2, 3, 1)), (None, x)):
        loaded = from_torch(state, variables, flattened={"fc": shape})
        kernel = loaded["params"]["fc"]["kernel"]
        np.testing.assert_allclose(laid.reshape(4, -1) @ kernel, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'?fc'? reads 12 values, as no layer puts out"):
        from_torch(state, variables)
    with pytest.raises(ValueError, match=r"reads 12 values, and not a map of \(2, 2, 2\)"):
        from_torch(state, variables, flattened={"fc": (2, 2, 2)})
    with pytest.raises(ValueError, match="'head', which has no dense weights"):
        from_torch(state, variables, flattened={"fc": None, "head": None})


def test_a_new_head_is_kept_whatever_it_is_called():
    model = create("mobilenet_v2", 3, width=0.25)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), shapes)
    got = from_torch(small_mobilenet(), variables, new_head=True)
    chex.assert_trees_all_equal(got["params"]["classifier_1"], variables["params"]["classifier_1"])
