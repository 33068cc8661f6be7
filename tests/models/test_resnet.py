import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor.models import MODELS, Lsq, NoiseAdaptor, batch_norm, create, start_scales

KEY = jax.random.key(0)


def shapes(name, num_classes, image, **options):
    model = create(name, num_classes, **options)
    return jax.eval_shape(model.init_with_output, KEY, jnp.zeros((2, *image)))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
    ],
)
def test_the_large_networks_have_torchvisions_parameter_counts(name, parameters):
    _, variables = shapes(name, 1000, (224, 224, 3))
    assert count(variables["params"]) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar_resnet20", 269_722),
        ("cifar_resnet32", 464_154),
        ("cifar_resnet44", 658_586),
        ("cifar_resnet56", 853_018),
    ],
)
def test_the_small_networks_have_the_parameter_counts_of_option_a(name, parameters):
    _, variables = shapes(name, 10, (32, 32, 3))
    assert count(variables["params"]) == parameters


@functools.cache
def quantized(name):
    """The shapes of a network that computes in bfloat16; to trace it takes a second."""
    image = (8, 8, 1) if name.startswith("digits") else (32, 32, 3)
    activation = functools.partial(Lsq, levels=2)
    return shapes(name, 7, image, dtype=jnp.bfloat16, activation=activation)


@pytest.mark.parametrize("name", MODELS)
def test_logits_parameters_and_statistics_are_float32(name):
    logits, variables = quantized(name)
    chex.assert_shape(logits, (2, 7))
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, variables))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "activations"), [("resnet18", 17), ("resnet50", 49), ("cifar_resnet20", 19)]
)
def test_every_layer_but_the_last_has_its_activation(name, activations):
    _, variables = quantized(name)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])]
    assert sum(path[-1].key == "quant_scale" for path in paths) == activations


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_named_by_hand(name):
    """Flax's own names end in a count, as Conv_0; a renamed layer would lose its weights."""
    _, variables = quantized(name)
    names = {
        key.key
        for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])
        for key in path[:-1]
    }
    assert not {name for name in names if name[0].isupper()}


def intermediates(model, variables, x, **kwargs):
    """The output of every module."""
    mutable = ["intermediates", "batch_stats"]
    _, state = model.apply(variables, x, capture_intermediates=True, mutable=mutable, **kwargs)
    return state["intermediates"]


def features(name, image, **options):
    """The shape of every stage's output."""
    model, x = create(name, 10, **options), jnp.zeros((1, *image))
    outputs = jax.eval_shape(lambda: intermediates(model, model.init(KEY, x), x))
    return [outputs[key]["__call__"][0].shape[1:] for key in sorted(outputs) if "layer" in key]


def test_the_imagenet_stem_divides_by_four_and_the_cifar_stem_by_one():
    sizes = {"stage_sizes": (1, 1, 1, 1)}
    large = features("resnet18", (224, 224, 3), **sizes)
    assert large == [(56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512)]
    small = features("cifar_resnet18", (32, 32, 3), **sizes)
    assert small == [(32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512)]
    assert features("resnet50", (64, 64, 3), **sizes)[-1] == (2, 2, 2048)


def test_the_stems_pool_counts_its_padding():
    """A constant image: corner windows hold 4 pixels of 9, as in torch's AvgPool2d(3, 2, 1)."""
    image, window = jnp.ones((1, 4, 4, 1)), np.array([[4, 6], [6, 9]]) / 9
    seen = {}

    class Probe(nn.Module):
        @nn.compact
        def __call__(self, v):
            return jnp.ones_like(v)

    class Record(nn.Module):
        features: int
        stride: int
        shortcut: str
        layers: tuple

        @nn.compact
        def __call__(self, x, train):
            seen["x"] = x
            return x

    model = create("resnet18", 2, width=1, stage_sizes=(1,), block=Record, activation=Probe)
    image = jnp.ones((1, 8, 8, 1))
    model.apply(jax.jit(model.init)(KEY, image), image)
    np.testing.assert_allclose(seen["x"][0, :, :, 0], window, rtol=1e-6)


def test_padding_is_torchs_at_stride_two():
    """torch pads both sides: output 0 of a 3x3 convolution at stride 2 is centred on pixel 0."""
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0)
    model = create("digits_resnet8", 2, width=1, stage_sizes=(0, 1), norm=None)
    params = jax.jit(model.init)(KEY, x)["params"]
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    params["conv1"] = {"kernel": kernel, "bias": jnp.zeros(1)}
    params["layer2_0"]["conv1"] = {"kernel": jnp.tile(kernel, (1, 1, 1, 2)), "bias": jnp.zeros(2)}
    _, state = model.apply(
        {"params": params}, x, capture_intermediates=True, mutable=["intermediates"]
    )
    y = state["intermediates"]["layer2_0"]["conv1"]["__call__"][0]
    expected = np.zeros((2, 2))
    expected[0, 0] = 1
    np.testing.assert_array_equal(y[0, :, :, 0], expected)


def test_a_padded_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    x = jax.random.normal(jax.random.key(2), (1, 4, 4, 2))
    identity = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
    model = create(
        "digits_resnet8", 2, width=2, stage_sizes=(0, 1), norm=None, shortcut="pad",
        activation=lambda name: lambda v: v,
    )  # fmt: skip
    params = jax.tree.map(jnp.zeros_like, jax.jit(model.init)(KEY, x)["params"])
    params["conv1"]["kernel"] = identity
    _, state = model.apply(
        {"params": params}, x, capture_intermediates=True, mutable=["intermediates"]
    )
    y = state["intermediates"]["layer2_0"]["__call__"][0]
    np.testing.assert_array_equal(y, jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1))))


def test_initial_weights_follow_torchs_rules():
    model = create("resnet18", 1000, stage_sizes=(1,))
    params = jax.jit(model.init)(KEY, jnp.zeros((1, 8, 8, 3)))["params"]
    kernel, dense = params["layer1_0"]["conv1"]["kernel"], params["fc"]["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)
    assert jnp.abs(dense).max() <= 1 / 8
    np.testing.assert_allclose(dense.std(), 1 / 8 / 3**0.5, rtol=0.02)
    assert not params["fc"]["bias"].any()


def test_training_mode_updates_statistics_towards_the_batch():
    model = create("digits_resnet8", 10, width=4, stage_sizes=())
    x = jax.random.normal(jax.random.key(2), (16, 8, 8, 1))
    variables = jax.jit(model.init)(KEY, x)
    _, updated = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(
        variables, x
    )
    v = nn.Conv(4, (3, 3), padding=1, use_bias=False).apply(
        {"params": variables["params"]["conv1"]}, x
    )
    got = updated["batch_stats"]["conv1_norm"]
    np.testing.assert_allclose(got["mean"], 0.1 * v.mean((0, 1, 2)), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(got["var"], 0.9 + 0.1 * v.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.reuses_keys
def test_a_split_batch_trains_like_the_whole_one():
    """Moments, scale starts and noise: nothing depends on the device count."""
    x = jax.random.normal(jax.random.key(2), (8, 8, 8, 1))

    def run(axis_name):
        activation = functools.partial(NoiseAdaptor, levels=2, axis_name=axis_name)
        norm = functools.partial(batch_norm, axis_name=axis_name)
        model = create(
            "digits_resnet8", 10, width=4, activation=activation, norm=norm, stage_sizes=(1,)
        )
        weights = without_scales(model.init(KEY, x))

        def step(part):
            variables = start_scales(model, weights, part, KEY, train=True)
            noise = {"noise": jax.random.key(1)}
            return model.apply(variables, part, train=True, rngs=noise, mutable=["batch_stats"])

        return step

    logits, updated = jax.jit(run(None))(x)
    split, split_updated = jax.jit(jax.vmap(run("batch"), axis_name="batch"))(
        x.reshape(4, 2, 8, 8, 1)
    )
    # A float sum in another order may carry a few values over a rounding edge.
    assert jnp.median(jnp.abs(split.reshape(8, 10) - logits)) < 1e-4
    first = jax.tree.map(lambda leaf: leaf[0], split_updated)["batch_stats"]["conv1_norm"]
    chex.assert_trees_all_close(first, updated["batch_stats"]["conv1_norm"], rtol=1e-4, atol=1e-6)


def without_scales(variables):
    """The variables as a full-precision network has them."""

    def prune(tree):
        kept = {k: prune(v) if isinstance(v, dict) else v for k, v in tree.items()}
        return {k: v for k, v in kept.items() if k != "quant_scale" and (k[:3] != "act" or v)}

    return {**variables, "params": prune(variables["params"])}


@pytest.mark.reuses_keys
def test_scales_start_on_pretrained_weights():
    x = jax.random.normal(jax.random.key(2), (8, 8, 8, 1))
    build = functools.partial(create, "digits_resnet8", 10, width=4, stage_sizes=(1,))
    variables = jax.jit(build().init)(KEY, x)
    model = build(activation=functools.partial(Lsq, levels=2))
    full = jax.jit(functools.partial(start_scales, model))(variables, x, KEY)
    chex.assert_trees_all_equal_structs(full, jax.eval_shape(model.init, KEY, x))
    chex.assert_trees_all_equal(without_scales(full), variables)
    assert all((leaf > 0).all() for leaf in jax.tree.leaves(full["params"]["act1"]))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.reuses_keys
def test_no_layer_is_silent_in_the_mode_of_init(train):
    x = jax.random.normal(jax.random.key(2), (16, 8, 8, 1))
    activation = functools.partial(Lsq, levels=2)
    model = create("digits_resnet8", 10, width=4, stage_sizes=(1, 1), activation=activation)

    @jax.jit
    def rates():
        outputs = intermediates(model, model.init(KEY, x, train=train), x, train=train)
        paths = jax.tree_util.tree_leaves_with_path(outputs)
        return [(y > 0).mean() for path, y in paths if "act" in jax.tree_util.keystr(path)]

    assert len(rates()) == 5
    assert min(rates()) > 0.1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("resnet81", 10), {}, "unknown model 'resnet81'; did you mean 'resnet18'"),
        (("resnet18", 0), {}, "num_classes must be at least 1, not 0"),
        (("resnet18", 10), {"activations": Lsq}, "did you mean 'activation'"),
        (("transformer", 10), {}, "there are cifar_resnet101"),
    ],
)
def test_bad_names_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        create(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        ({"stem": "cifar10"}, jnp.zeros((1, 8, 8, 1)), "stem must be 'imagenet' or 'cifar'"),
        ({"shortcut": "A"}, jnp.zeros((1, 8, 8, 1)), "shortcut must be 'conv' or 'pad', not 'A'"),
        ({}, jnp.zeros((8, 8, 1)), "a single image gets its batch axis"),
        ({}, jnp.zeros((1, 8, 8, 1), jnp.uint8), "images must be floating point, not uint8"),
    ],
)
def test_bad_options_and_images_are_refused(options, images, message):
    model = create("digits_resnet8", 10, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, images)
