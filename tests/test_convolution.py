"""The faster convolutions against the direct one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor import _winograd
from nadaptor._winograd import convolve, transform_filter

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
LAYOUTS = pytest.mark.parametrize(
    ("dims", "padding", "size"),
    [
        (NHWC, ((1, 1), (1, 1)), (8, 8)),
        (NHWC, ((2, 0), (1, 2)), (9, 9)),
        (NCHW, ((0, 0), (0, 0)), (11, 12)),
        (("NHWC", "OIHW", "NCHW"), ((1, 1), (0, 2)), (9, 10)),
    ],
)


def network(dims, padding, stride=1, groups=1):
    def f(w, x):
        z = nadaptor.lsq(x, 0.5, 2)
        return jax.lax.conv_general_dilated(
            z, w, (stride, stride), padding, dimension_numbers=dims, feature_group_count=groups
        )

    return f


def arguments(dims, size, inputs, outputs):
    """Weights and images of that layout."""
    shape = {"N": 2, "H": size[0], "W": size[1], "C": inputs}
    x = jax.random.normal(jax.random.key(0), [shape[c] for c in dims[0]])
    kernel = {"H": 3, "W": 3, "I": inputs, "O": outputs}
    return jax.random.normal(jax.random.key(1), [kernel[c] for c in dims[1]]), x


def operations(f, *args, name="conv_general_dilated", **options):
    net = nadaptor.spiking(f, *args, **options)
    return [op for op in net._spiking if op.primitive.name == name]


@LAYOUTS
def test_winograd_equals_the_direct_convolution(dims, padding, size):
    w, x = arguments(dims, size, 128, 128)
    f = network(dims, padding)
    assert not operations(f, w, x, fast_convolution=True)
    assert len(operations(f, w, x)) == 1
    run = functools.partial(nadaptor.simulate, f, w, x, num_steps=3, steps_per_chunk=2)
    np.testing.assert_allclose(
        run(fast_convolution=True).outputs, run().outputs, rtol=1e-4, atol=1e-3
    )


@LAYOUTS
def test_pairs_of_columns_equal_the_direct_convolution(dims, padding, size, monkeypatch):
    # Halves, quarters: the sums are exact in whatever order.
    w, x = (jnp.round(4 * a) / 4 for a in arguments(dims, size, 8, 16))
    f = network(dims, padding)
    (paired,) = operations(f, w, x)
    assert paired.params["window_strides"] == (1, 2)
    fast = nadaptor.simulate(f, w, x, num_steps=3, steps_per_chunk=2)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    (plain,) = operations(f, w, x)
    assert plain.params["window_strides"] == (1, 1)
    direct = nadaptor.simulate(f, w, x, num_steps=3, steps_per_chunk=2)
    np.testing.assert_array_equal(fast.outputs, direct.outputs)


@pytest.mark.parametrize("block", [0, 8000, 10**6], ids=["by one", "by two", "all together"])
@pytest.mark.parametrize("least", [1, 1000], ids=["one by one", "stacked"])
def test_winograd_is_exact_where_its_fractions_are(monkeypatch, block, least):
    """G has sixths and 24ths: with weights that are multiples of 576, all sums are integers."""
    rng = np.random.default_rng(0)
    w = 576.0 * rng.integers(-2, 3, (3, 3, 2, 3)).astype(np.float32)
    x = rng.integers(0, 2, (4, 9, 6, 2)).astype(np.float32)
    monkeypatch.setattr(_winograd, "BLOCK_BYTES", block)
    monkeypatch.setattr(_winograd, "LEAST_SQUARES", least)
    direct = jax.lax.conv_general_dilated(
        x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    filters = jnp.round(transform_filter(jnp.asarray(w)))
    np.testing.assert_array_equal(convolve(jnp.asarray(x), filters, ((1, 1), (1, 1))), direct)


def test_filters_are_transformed_once():
    x, w = jnp.ones((1, 8, 8, 128)), jnp.ones((3, 3, 128, 128))
    f = network(NHWC, ((1, 1), (1, 1)))
    net = nadaptor.spiking(f, w, x, fast_convolution=True)
    assert any(p.shape == (36, 128, 128) for p in net.prepare(w, x))
    # The products of all squares, and no transform of a filter.
    assert len(operations(f, w, x, name="dot_general", fast_convolution=True)) == 1


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 16, 16), {"stride": 2}),
        ((3, 3, 128, 128), {"stride": 2}),
        ((3, 3, 8, 16), {"groups": 2}),
        ((3, 3, 128, 256), {"groups": 2}),
        ((1, 1, 128, 128), {}),
        ((5, 5, 16, 16), {}),
        ((3, 3, 16, 24), {}),
        ((3, 3, 128, 48), {}),
        ((3, 3, 128, 128), {"size": 7}),
        ((3, 3, 128, 128), {"dtype": jnp.bfloat16}),
        ((3, 3, 16, 16), {"dtype": jnp.bfloat16}),
    ],
)
def test_other_convolutions_stay_direct(kernel, options):
    options = {"stride": 1, "groups": 1, "size": 8, "dtype": jnp.float32, **options}
    shape = (1, options["size"], options["size"], kernel[2] * options["groups"])
    x, w = (jnp.ones(s, options["dtype"]) for s in (shape, kernel))
    f = network(NHWC, ((1, 1), (1, 1)), options["stride"], options["groups"])
    (kept,) = operations(f, w, x, fast_convolution=True)
    assert kept.params["window_strides"] == (options["stride"],) * 2
