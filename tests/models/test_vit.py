"""The vision transformer against NumPy under timm's names, and as a spiking network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.interop import from_torch
from nadaptor.models import Lsq, create, start_scales

D, HEADS, BLOCKS, CLASSES = 12, 3, 2, 5
IMAGES = np.asarray(jax.random.normal(jax.random.key(0), (3, 8, 8, 3)))
NET = functools.partial(
    create, "cifar_vit", CLASSES, width=D, depth=BLOCKS, heads=HEADS, patch_size=4
)


def timm_state():
    """A state dict as timm's VisionTransformer has it, of random numbers."""
    shapes = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 5, D),
        "patch_embed.proj.weight": (D, 3, 4, 4),
        "patch_embed.proj.bias": (D,),
        "head.weight": (CLASSES, D),
        "head.bias": (CLASSES,),
    }
    for layer, out, into in (
        ("attn.qkv", 3 * D, D),
        ("attn.proj", D, D),
        ("mlp.fc1", 4 * D, D),
        ("mlp.fc2", D, 4 * D),
    ):
        for i in range(BLOCKS):
            name = f"blocks.{i}.{layer}"
            shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    for norm in ("norm", *(f"blocks.{i}.norm{n}" for i in range(BLOCKS) for n in (1, 2))):
        shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
    rng = np.random.default_rng(1)
    return {
        name: rng.normal(size=shape, scale=shape[-1] ** -0.5).astype("f4")
        for name, shape in shapes.items()
    }


def layer_norm(x, state, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def dense(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attend(x, state, name):
    """One head at a time, as the paper writes it."""
    queries, keys, values = np.split(dense(x, state, f"{name}.qkv"), 3, -1)
    size, mixed = D // HEADS, []
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        scores = queries[..., own] @ keys[..., own].swapaxes(1, 2) / np.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ values[..., own])
    return dense(np.concatenate(mixed, -1), state, f"{name}.proj")


def reference(images, state):
    kernel = state["patch_embed.proj.weight"]
    tokens = [
        np.einsum("bhwc,dchw->bd", images[:, i : i + 4, j : j + 4], kernel)
        + state["patch_embed.proj.bias"]
        for i in (0, 4)
        for j in (0, 4)
    ]
    first = np.broadcast_to(state["cls_token"][0], (len(images), D))
    x = np.stack([first, *tokens], 1) + state["pos_embed"]
    for i in range(BLOCKS):
        block = f"blocks.{i}"
        x = x + attend(layer_norm(x, state, f"{block}.norm1"), state, f"{block}.attn")
        hidden = np.maximum(
            dense(layer_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1"), 0
        )
        x = x + dense(hidden, state, f"{block}.mlp.fc2")
    return dense(layer_norm(x, state, "norm")[:, 0], state, "head")


@pytest.fixture(scope="module")
def loaded():
    return from_torch(timm_state(), jax.eval_shape(NET().init, jax.random.key(0), IMAGES))


def test_network_with_timms_weights_is_the_formula_written_out(loaded):
    logits = jax.jit(NET().apply)(loaded, IMAGES)
    np.testing.assert_allclose(logits, reference(IMAGES, timm_state()), rtol=1e-4, atol=1e-5)


def test_relu_network_becomes_a_spiking_one_in_both_codings(loaded):
    q = nadaptor.quantize(NET().apply, levels=1)

    @jax.jit
    def run(variables):
        scales = q.init(variables, IMAGES)
        simulate = functools.partial(nadaptor.simulate, q, scales, variables, IMAGES)
        rate = simulate(num_steps=1, nonaffine="running_mean")
        return q(scales, variables, IMAGES), rate, simulate(num_steps=16, coding="sum")

    quantized, rate, total = run(loaded)
    np.testing.assert_allclose(rate.outputs[-1], quantized, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(total.outputs[-1], quantized, rtol=1e-4, atol=1e-4)
    assert total.settled < 16
    assert all(count.sum() > 0 for count in total.spike_counts)


def test_rates_alone_are_refused_by_the_name_of_the_operation(loaded):
    q = nadaptor.quantize(NET().apply, levels=2)
    with pytest.raises(ValueError, match=r"(?s)cannot convert.*running_mean"):
        nadaptor.spiking(q, 0.5, loaded, IMAGES)


def test_quantizer_in_the_slot_has_a_scale_for_each_mlp(loaded):
    model = NET(activation=functools.partial(Lsq, levels=2, scale_init="mmse_relu"))
    variables = start_scales(model, loaded, IMAGES, key=jax.random.key(2))
    scales = [p for p, _ in jax.tree.leaves_with_path(variables) if "quant_scale" in str(p)]
    assert len(scales) == BLOCKS
    layers = nadaptor.spiking(model.apply, variables, IMAGES, coding="sum").layers
    assert [layer.name for layer in layers] == [f"Vit/blocks_{i}/mlp/act" for i in range(BLOCKS)]


@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        ({"patch_size": 3}, IMAGES, "8x8 pixels are not made of patches of 3x3"),
        ({"patch_size": 0}, IMAGES, "patch_size"),
        ({"heads": 5}, IMAGES, "width 12 is not a multiple of the 5 heads"),
        ({}, IMAGES[0], "must be .batch, height, width, channels."),
    ],
)
def test_what_does_not_fit_is_refused(options, images, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(NET(**options).init, jax.random.key(0), images)


def test_tokens_are_of_the_compute_dtype_and_logits_are_not(loaded):
    half = NET(dtype=jnp.bfloat16)
    logits = jax.jit(half.apply)(loaded, IMAGES)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference(IMAGES, timm_state()), atol=0.1)
