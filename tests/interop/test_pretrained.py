import functools
import json
import os
import struct
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nadaptor.interop import from_torch, load_pretrained, read_state_dict
from nadaptor.models import Lsq, create, start_scales

KEY = jax.random.key(0)
DATA = Path(os.environ.get("NADAPTOR_DATA_DIR", "no-data"))
WEIGHTS = DATA / "weights" / "resnet20-12fca82f.th"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason="needs weights/resnet20-12fca82f.th under NADAPTOR_DATA_DIR"
)


def template(name, num_classes=10, **options):
    model = create(name, num_classes, **options)
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)))


def torchvision_shapes(blocks, bottleneck, classes=1000):
    """The state dict of a torchvision ResNet, written out from its source."""
    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    inside = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        outside = 4 * width if bottleneck else width
        for index in range(count):
            block = f"layer{stage + 1}.{index}"
            convs = (
                [(width, inside, 1), (width, width, 3), (outside, width, 1)]
                if bottleneck
                else [(width, inside, 3), (width, width, 3)]
            )
            for number, (out, into, size) in enumerate(convs, 1):
                shapes[f"{block}.conv{number}.weight"] = (out, into, size, size)
                shapes |= norm(f"{block}.bn{number}", out)
            if index == 0 and (stage > 0 or inside != outside):
                shapes[f"{block}.downsample.0.weight"] = (outside, inside, 1, 1)
                shapes |= norm(f"{block}.downsample.1", outside)
            inside = outside
    return {**shapes, "fc.weight": (classes, inside), "fc.bias": (classes,)}


def norm(name, features):
    names = ("weight", "bias", "running_mean", "running_var")
    vectors = {f"{name}.{leaf}": (features,) for leaf in names}
    return {**vectors, f"{name}.num_batches_tracked": ()}


def zeros(shapes):
    """Arrays of those shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def small_state(seed=0):
    """A state dict for `digits_resnet8` with one block a stage, three input channels, width 4."""
    rng = np.random.default_rng(seed)
    shapes = {"conv1.weight": (4, 3, 3, 3), **norm("bn1", 4)}
    shapes |= {"layer1.0.conv1.weight": (4, 4, 3, 3), "layer1.0.conv2.weight": (4, 4, 3, 3)}
    shapes |= {**norm("layer1.0.bn1", 4), **norm("layer1.0.bn2", 4)}
    shapes |= {"layer2.0.conv1.weight": (8, 4, 3, 3), "layer2.0.conv2.weight": (8, 8, 3, 3)}
    shapes |= {**norm("layer2.0.bn1", 8), **norm("layer2.0.bn2", 8)}
    shapes |= {"layer2.0.downsample.0.weight": (8, 4, 1, 1), **norm("layer2.0.downsample.1", 8)}
    shapes |= {"fc.weight": (10, 8), "fc.bias": (10,)}
    return {name: rng.uniform(0.1, 1, shape).astype("f4") for name, shape in shapes.items()}


SMALL = functools.partial(create, "digits_resnet8", 10, stage_sizes=(1, 1), width=4)
SMALL_SHAPES = functools.partial(template, "digits_resnet8", 10, stage_sizes=(1, 1), width=4)


@pytest.mark.parametrize(
    ("name", "blocks", "bottleneck"),
    [
        ("resnet18", (2, 2, 2, 2), False),
        ("resnet34", (3, 4, 6, 3), False),
        ("resnet50", (3, 4, 6, 3), True),
        ("resnet101", (3, 4, 23, 3), True),
    ],
)
def test_torchvision_names_fit(name, blocks, bottleneck):
    expected = template(name, 1000)
    state = zeros(torchvision_shapes(blocks, bottleneck))
    got = jax.eval_shape(lambda: from_torch(state, expected))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)


def test_each_array_lands_in_its_place():
    state = small_state()
    got = from_torch(state, SMALL_SHAPES())
    params, stats = got["params"], got["batch_stats"]
    conv, dense = state["layer2.0.conv1.weight"], state["fc.weight"]
    chex.assert_trees_all_equal(params["layer2_0"]["conv1"]["kernel"], conv.transpose(2, 3, 1, 0))
    chex.assert_trees_all_equal(params["fc"]["kernel"], dense.T)
    chex.assert_trees_all_equal(
        params["layer1_0"]["conv2_norm"]["scale"], state["layer1.0.bn2.weight"]
    )
    shortcut = stats["layer2_0"]["downsample_norm"]
    chex.assert_trees_all_equal(shortcut["var"], state["layer2.0.downsample.1.running_var"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))


def convolve(x, weight, stride):
    """torch's conv2d with padding size // 2, NCHW and OIHW, as plain sums."""
    size = weight.shape[-1]
    x = np.pad(x, ((0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
    return np.einsum("bchwij,ocij->bohw", windows[:, :, ::stride, ::stride], weight)


def normalise(x, state, name):
    columns = {k: state[f"{name}.{k}"][:, None, None] for k in ("weight", "bias")}
    mean, var = (state[f"{name}.running_{k}"][:, None, None] for k in ("mean", "var"))
    return (x - mean) / np.sqrt(var + 1e-5) * columns["weight"] + columns["bias"]


def torch_forward(state, x):
    """The small network as torch computes it, in numpy."""

    def layer(x, conv, bn, stride=1):
        return normalise(convolve(x, state[f"{conv}.weight"], stride), state, bn)

    x = np.maximum(layer(x, "conv1", "bn1"), 0)
    for name, stride in (("layer1.0", 1), ("layer2.0", 2)):
        y = np.maximum(layer(x, f"{name}.conv1", f"{name}.bn1", stride), 0)
        y = layer(y, f"{name}.conv2", f"{name}.bn2")
        if stride == 2:
            x = layer(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        x = np.maximum(x + y, 0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_the_loaded_network_computes_what_torch_computes():
    state = {name: array - 0.5 * (array.ndim == 4) for name, array in small_state().items()}
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype("f4")
    got = jax.jit(SMALL().apply)(from_torch(state, SMALL_SHAPES()), x.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, torch_forward(state, x), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("fc.", "linear.").replace("downsample", "shortcut"),
    ],
)
def test_wrapped_and_cifar_names_are_the_same(rename):
    state = small_state()
    renamed = {rename(name): array for name, array in state.items()}
    chex.assert_trees_all_equal(
        from_torch(renamed, SMALL_SHAPES()), from_torch(state, SMALL_SHAPES())
    )


@pytest.mark.parametrize("dtype", ["f8", "f2", ml_dtypes.bfloat16])
def test_other_precisions_become_float32(dtype):
    state = {name: array.astype(dtype) for name, array in small_state().items()}
    got = from_torch(state, SMALL_SHAPES())["params"]["fc"]["kernel"]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, small_state()["fc.weight"].T, rtol=1e-2)


def test_a_quantized_network_gets_its_weights_here_and_its_scales_from_data():
    x = jax.random.normal(KEY, (4, 8, 8, 3))
    model = SMALL(activation=functools.partial(Lsq, levels=2))
    shapes = jax.eval_shape(model.init, KEY, x)
    loaded = from_torch(small_state(), shapes)
    chex.assert_trees_all_equal(loaded, from_torch(small_state(), SMALL_SHAPES()))
    full = jax.jit(functools.partial(start_scales, model))(loaded, x, KEY)
    chex.assert_trees_all_equal_shapes(full, shapes)


def test_everything_that_does_not_fit_is_listed():
    state = small_state()
    del state["bn1.weight"]
    state["layer3.0.conv1.weight"] = np.zeros((1, 1, 3, 3), "f4")
    state["conv1.weight"] = np.zeros((4, 3, 7, 7), "f4")
    with pytest.raises(ValueError, match="do not fit") as caught:
        from_torch(state, SMALL_SHAPES())
    text = str(caught.value)
    assert "missing: bn1.weight;" in text
    assert "unexpected: layer3.0.conv1.weight;" in text
    assert "of another shape: conv1.weight (4, 3, 7, 7) instead of (4, 3, 3, 3)" in text
    assert "new_head" not in text


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"missing: bn1\.bias, .* and 23 more$"):
        from_torch({"conv1.weight": np.zeros((4, 3, 3, 3))}, SMALL_SHAPES())


def test_another_class_count_is_refused_with_the_remedy():
    shapes = template("digits_resnet8", 7, stage_sizes=(1, 1), width=4)
    with pytest.raises(ValueError, match=r"fc\.bias \(10,\) instead of \(7,\).*new_head=True"):
        from_torch(small_state(), shapes)


@pytest.mark.parametrize("classes", [7, 10])
def test_a_new_head_is_the_one_of_the_variables(classes):
    shapes = template("digits_resnet8", classes, stage_sizes=(1, 1), width=4)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), shapes)
    got = from_torch(small_state(), variables, new_head=True)
    chex.assert_trees_all_equal(got["params"]["fc"], variables["params"]["fc"])
    same = from_torch(small_state(), SMALL_SHAPES())
    chex.assert_trees_all_equal(got["params"]["layer1_0"], same["params"]["layer1_0"])


def test_a_new_head_needs_values():
    with pytest.raises(ValueError, match=r"pass the result of model\.init"):
        from_torch(small_state(), SMALL_SHAPES(), new_head=True)


def test_two_names_for_one_array_are_refused():
    state = small_state() | {"linear.bias": np.zeros(10)}
    with pytest.raises(ValueError, match=r"two arrays for fc\.bias"):
        from_torch(state, SMALL_SHAPES())


def safetensors(path, arrays):
    """The format by hand: header length, JSON header, data."""
    names = {"float32": "F32", "bfloat16": "BF16", "int64": "I64"}
    header, data = {}, b""
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        kind = names[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_are_read(tmp_path):
    state = small_state()
    state["fc.bias"] = state["fc.bias"].astype(ml_dtypes.bfloat16)
    path = safetensors(tmp_path / "net.safetensors", state)
    chex.assert_trees_all_equal(read_state_dict(path), state)
    chex.assert_trees_all_equal(
        load_pretrained(path, SMALL_SHAPES()), from_torch(state, SMALL_SHAPES())
    )


@pytest.mark.parametrize("end", [0, 5, 40, -1])
def test_truncated_safetensors_are_refused(tmp_path, end):
    path = safetensors(tmp_path / "net.safetensors", small_state())
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"cannot read .*net\.safetensors: truncated or damaged"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("name", "message"), [("net.zip", "the name must end in"), ("net.pth", "there is no such file")]
)
def test_other_paths_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / name)


@needs_weights
def test_the_published_resnet20_is_read_whole():
    state = read_state_dict(WEIGHTS)
    assert sum(a.size for name, a in state.items() if "running" not in name) == 269_722
    chex.assert_trees_all_equal_shapes(
        from_torch(state, template("cifar_resnet20")), template("cifar_resnet20")
    )


@needs_weights
@pytest.mark.skipif(
    not (DATA / "tfds" / "cifar10").is_dir(), reason="needs tfds/cifar10 under NADAPTOR_DATA_DIR"
)
@pytest.mark.filterwarnings("ignore")
def test_the_published_resnet20_classifies_cifar10():
    """9173 of the 10000 test images, of which 452 are among the first 500."""
    tfds = pytest.importorskip("tensorflow_datasets")
    source = tfds.data_source("cifar10", split="test", data_dir=DATA / "tfds")
    examples = [source[index] for index in range(500)]
    images = np.stack([example["image"] for example in examples]).astype("f4") / 255
    mean, std = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], "f4")
    model = create("cifar_resnet20", 10)
    variables = load_pretrained(WEIGHTS, template("cifar_resnet20"))
    logits = jax.jit(model.apply)(variables, (images - mean) / std)
    labels = np.array([example["label"] for example in examples])
    assert abs((logits.argmax(-1) == labels).sum() - 452) <= 1


def test_a_file_of_another_network_is_told_by_its_names_before_its_flattened_map():
    arrays = {"features.0.weight": zeros({"x": (4, 3, 3, 3)})["x"],
              "classifier.0.weight": zeros({"x": (6, 4 * 49)})["x"]}  # fmt: skip
    with pytest.raises(ValueError, match=r"missing: bn1\.bias.*; unexpected: classifier\.0\.weig"):
        from_torch(arrays, template("cifar_resnet20"))
