"""The faster convolutions against the direct one, as they are where no compiler is there."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor._execution import convolution
from nadaptor._execution.convolution import _spans, kn2row
from nadaptor._execution.kernel import Kernel
from nadaptor._execution.winograd import (
    convolve,
    convolve_rows,
    transform_filter,
    transform_filter_rows,
)

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


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    monkeypatch.setattr(convolution, "load_kernel", lambda _: Kernel(None, "no compiler"))


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


def simulated(f, w, x, **options):
    """The simulation as one program."""
    options = {"num_steps": 3, "steps_per_chunk": 2, **options}
    return jax.jit(lambda w, x: nadaptor.simulate(f, w, x, **options))(w, x)


def operations(f, *args, name="conv_general_dilated", **options):
    net = nadaptor.spiking(f, *args, **options)
    return [op for op in net._plan.stepwise if op.primitive.name == name]


@pytest.mark.parametrize("channels", [32, 128], ids=["along the height", "along both"])
@LAYOUTS
def test_winograd_equals_the_direct_convolution(dims, padding, size, channels):
    w, x = arguments(dims, size, channels, channels)
    f = network(dims, padding)
    # F(4, 3) along the height leaves six convolutions of three columns.
    assert len(operations(f, w, x, fast_convolution=True)) == (6 if channels == 32 else 0)
    assert len(operations(f, w, x)) == 1
    fast, direct = simulated(f, w, x, fast_convolution=True), simulated(f, w, x)
    np.testing.assert_allclose(fast.outputs, direct.outputs, rtol=1e-4, atol=1e-3)


@LAYOUTS
def test_pairs_of_columns_equal_the_direct_convolution(dims, padding, size, monkeypatch):
    # Halves, quarters: the sums are exact in whatever order.
    w, x = (jnp.round(4 * a) / 4 for a in arguments(dims, size, 8, 16))
    f = network(dims, padding)
    (paired,) = operations(f, w, x)
    assert paired.params["window_strides"] == (1, 2)
    fast = simulated(f, w, x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    (plain,) = operations(f, w, x)
    assert plain.params["window_strides"] == (1, 1)
    direct = simulated(f, w, x)
    np.testing.assert_array_equal(fast.outputs, direct.outputs)


@pytest.mark.parametrize(
    ("dims", "padding", "size"),
    [
        (NHWC, ((1, 1), (1, 1)), (4, 4)),
        (NHWC, ((2, 0), (1, 2)), (3, 4)),
        (NCHW, ((1, 1), (1, 1)), (1, 1)),
        (("NHWC", "OIHW", "NCHW"), ((2, 2), (0, 3)), (2, 5)),
    ],
)
def test_small_images_by_position_equal_the_direct_convolution(dims, padding, size, monkeypatch):
    # Halves, quarters: the sums are exact in whatever order.
    w, x = (jnp.round(4 * a) / 4 for a in arguments(dims, size, 128, 128))
    f = network(dims, padding)
    assert len(operations(f, w, x, name="dot_general")) == 9
    fast = simulated(f, w, x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert len(operations(f, w, x)) == 1
    direct = simulated(f, w, x)
    np.testing.assert_array_equal(fast.outputs, direct.outputs)


@pytest.mark.parametrize(
    ("run", "transform"),
    [(convolve, transform_filter), (convolve_rows, transform_filter_rows)],
    ids=["along both", "along the height"],
)
def test_winograd_is_exact_where_its_fractions_are(run, transform):
    """G has sixths and 24ths: with weights that are multiples of 576, all sums are integers."""
    rng = np.random.default_rng(0)
    w = 576.0 * rng.integers(-2, 3, (3, 3, 2, 3)).astype(np.float32)
    x = rng.integers(0, 2, (4, 9, 6, 2)).astype(np.float32)
    direct = jax.lax.conv_general_dilated(
        x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    filters = [jnp.round(entry) for entry in transform(jnp.asarray(w))]
    np.testing.assert_array_equal(run(jnp.asarray(x), filters, ((1, 1), (1, 1))), direct)


@pytest.mark.parametrize(("size", "channels"), [(8, 64), (8, 128), (4, 128)])
def test_gradients_pass_through_the_faster_convolutions(size, channels, monkeypatch):
    w, x = arguments(NHWC, (size, size), channels, channels)
    f = network(NHWC, ((1, 1), (1, 1)))
    neuron = nadaptor.IntegrateAndFire(surrogate=lambda distance: jnp.exp(-(distance**2)))

    def loss(w, x):
        sim = nadaptor.simulate(f, w, x, num_steps=2, neuron=neuron, fast_convolution=True)
        return (sim.outputs**2).mean()

    fast = jax.jit(jax.grad(loss, (0, 1)))(w, x)
    monkeypatch.setattr("nadaptor.transformation.faster_convolution", lambda *_: None)
    direct = jax.jit(jax.grad(lambda *args: loss(*args), (0, 1)))(w, x)
    for a, b in zip(fast, direct, strict=True):
        assert jnp.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-4 * jnp.abs(b).max())


def test_filters_are_transformed_once():
    x, w = jnp.ones((1, 8, 8, 128)), jnp.ones((3, 3, 128, 128))
    f = network(NHWC, ((1, 1), (1, 1)))
    net = nadaptor.spiking(f, w, x, fast_convolution=True)
    assert sum(p.shape == (128, 128) for p in net.prepare(w, x)) == 36
    # The products of the squares, and no transform of a filter.
    assert len(operations(f, w, x, name="dot_general", fast_convolution=True)) == 36


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
        ((3, 3, 128, 24), {}),
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


def test_every_position_meets_the_pixels_that_it_has():
    """Brute force: sizes 1-7, paddings 0-4 at both ends."""
    for size, before, after in itertools.product(range(1, 8), range(5), range(5)):
        outputs = size + before + after - 2
        for i, (start, end) in enumerate(_spans(outputs, (before, after)) if outputs > 0 else ()):
            met = [o for o in range(outputs) if 0 <= o + i - before < size]
            assert list(range(start, end)) == met


@pytest.mark.parametrize("padding", [((2, 0), (1, 1)), ((0, 4), (1, 1)), ((1, 1), (2, 0))])
@pytest.mark.parametrize("size", [(1, 4), (4, 1), (2, 3)])
def test_one_sided_padding_of_a_small_image_is_that_of_the_direct_convolution(size, padding):
    w = jnp.asarray(np.arange(9).reshape(3, 3, 1, 1) - 4, jnp.float32)
    x = jnp.arange(1.0, 1 + size[0] * size[1]).reshape(1, *size, 1)
    if any(n + sum(edge) < 3 for n, edge in zip(size, padding, strict=True)):
        pytest.skip("the filter does not fit")
    expected = jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=NHWC)
    np.testing.assert_array_equal(kn2row(x, w, padding), expected)
