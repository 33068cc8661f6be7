"""The kernel of training: a convolution and its gradients, against sums written out in NumPy."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

import nadaptor
from nadaptor._execution import conv_kernel
from nadaptor._execution.kernel import Kernel, load_kernel
from nadaptor.simulation.deployment import outputs_of_data

FOUND = load_kernel("convolve")
pytestmark = pytest.mark.skipif(FOUND.targets is None, reason=FOUND.reason)
NHWC = ("NHWC", "HWIO", "NHWC")
SYMBOLS = ("NadaptorConvolve", "NadaptorImageGradient", "NadaptorKernelGradient")
CHANNELS, SIDES, EDGES = st.sampled_from([16, 32, 48]), st.integers(1, 11), st.integers(0, 3)


def written_out(x, w, g, strides, padding):
    """The convolution and its gradients, position by position, in float64."""
    y, dx, dw = (np.zeros(a.shape) for a in (g, x, w))
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    for r, s, i, j in np.ndindex(*g.shape[1:3], *w.shape[:2]):
        at = r * strides[0] - padding[0][0] + i, s * strides[1] - padding[1][0] + j
        if 0 <= at[0] < x.shape[1] and 0 <= at[1] < x.shape[2]:
            pixel = (slice(None), *at)
            y[:, r, s] += x[pixel] @ w[i, j]
            dx[pixel] += g[:, r, s] @ w[i, j].T
            dw[i, j] += x[pixel].T @ g[:, r, s]
    return y, dx, dw


def all_three(x, w, g, strides=(1, 1), padding="SAME"):
    """The convolution and its gradients in x and w, by `jax.vjp`."""

    def convolve(x, w):
        return nadaptor.conv_general_dilated(x, w, strides, padding, dimension_numbers=NHWC)

    y, pullback = jax.vjp(convolve, x, w)
    return y, *pullback(g)


def arrays(seed, *shapes, integers=True):
    """Small integers, whose products have exact sums in any order; or floats."""
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.integers(-3, 4, s)) if integers else rng.standard_normal
    return [jnp.asarray(draw(shape), jnp.float32) for shape in shapes]


def assert_exact(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def calls_of(function, *args):
    """The kernel's functions that a program for this CPU calls."""
    text = jax.jit(function).lower(*args).as_text()
    return {name for name in SYMBOLS if re.search(rf"@{name}_", text)}


def test_a_training_step_calls_all_three():
    x, w, g = arrays(0, (2, 8, 8, 16), (3, 3, 16, 32), (2, 8, 8, 32))
    assert calls_of(all_three, x, w, g) == set(SYMBOLS)
    # Without a derivative it is lax's, which spiking and exports know.
    assert calls_of(lambda x, w: all_three(x, w, g)[0] * 0, x, w) == {SYMBOLS[0]}
    plain = nadaptor.conv_general_dilated
    assert not calls_of(lambda x, w: plain(x, w, (1, 1), "SAME", dimension_numbers=NHWC), x, w)


@given(
    number=st.integers(1, 4),
    image=st.tuples(SIDES, SIDES, CHANNELS),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4), CHANNELS),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.tuples(EDGES, EDGES), st.tuples(EDGES, EDGES)),
)
def test_any_geometry_is_exact(number, image, kernel, strides, padding):
    out = [
        (size + sum(edge) - window) // stride + 1
        for size, edge, window, stride in zip(image, padding, kernel, strides, strict=False)
    ]
    assume(min(out) > 0)
    shapes = (number, *image), (*kernel[:2], image[2], kernel[2]), (number, *out, kernel[2])
    x, w, g = arrays(number, *shapes)
    ours = jax.jit(lambda *args: all_three(*args, strides, padding))(x, w, g)
    assert_exact(ours, written_out(x, w, g, strides, padding))


@pytest.mark.parametrize(
    ("image", "kernel", "strides", "padding"),
    [
        ((2, 40, 40, 3), (7, 7, 3, 16), (2, 2), ((3, 3), (3, 3))),
        ((3, 8, 9, 16), (3, 3, 16, 16), (1, 1), ((-1, 1), (2, -1))),
        ((1, 7, 6, 16), (1, 1, 16, 16), (3, 2), ((0, 0), (0, 0))),
        ((70, 2, 2, 16), (3, 3, 16, 32), (1, 1), ((1, 1), (1, 1))),
        ((3, 5, 5, 24), (3, 3, 24, 16), (2, 2), ((0, 1), (0, 1))),
        ((0, 5, 5, 16), (3, 3, 16, 16), (1, 1), ((1, 1), (1, 1))),
    ],
    ids=["stem", "cropped", "stride beyond kernel", "many small", "24 channels", "no image"],
)
def test_edges_of_what_fits_are_exact(image, kernel, strides, padding):
    y = jax.eval_shape(
        lambda x, w: jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=NHWC),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel)),
    )
    x, w, g = arrays(1, image, kernel, y.shape)
    assert SYMBOLS[0] in calls_of(lambda *args: all_three(*args, strides, padding), x, w, g)
    ours = jax.jit(lambda *args: all_three(*args, strides, padding))(x, w, g)
    assert_exact(ours, written_out(x, w, g, strides, padding))


def test_an_examples_sums_do_not_depend_on_the_batch_or_the_threads():
    x, w, g = arrays(2, (5, 9, 9, 16), (3, 3, 16, 16), (5, 9, 9, 16), integers=False)
    y, dx, dw = jax.jit(all_three)(x, w, g)
    for i in range(5):
        alone = jax.jit(all_three)(x[i : i + 1], w, g[i : i + 1])
        assert_exact([y[i], dx[i]], [alone[0][0], alone[1][0]])
    # A device of several is one thread; a program of one device has the threads of the machine.
    mapped = jax.pmap(all_three, devices=jax.devices()[:1])(x[None], w[None], g[None])
    assert_exact([y, dx, dw], [a[0] for a in mapped])


def test_devices_in_shard_map_have_the_gradient_of_the_whole():
    x, w, g = arrays(3, (4, 8, 8, 16), (3, 3, 16, 16), (4, 8, 8, 16))
    mesh, batch = Mesh(np.array(jax.devices()[:2]), ("batch",)), PartitionSpec("batch")

    def local(x, w, g):
        return all_three(x, w, g)

    specs = {
        "in_specs": (batch, PartitionSpec(), batch),
        "out_specs": (batch, batch, PartitionSpec()),
    }
    mapped = jax.shard_map(local, mesh=mesh, **specs)
    assert calls_of(mapped, x, w, g) == set(SYMBOLS)
    assert_exact(jax.jit(mapped)(x, w, g), written_out(x, w, g, (1, 1), ((1, 1), (1, 1))))


@pytest.mark.parametrize(
    ("image", "kernel", "dtype"),
    [
        ((2, 8, 8, 8), (3, 3, 8, 8), jnp.float32),
        ((2, 8, 8, 16), (3, 3, 16, 16), jnp.bfloat16),
    ],
    ids=["8 channels", "half precision"],
)
def test_what_does_not_fit_is_left_to_others(image, kernel, dtype):
    x, w, g = (a.astype(dtype) for a in arrays(4, image, kernel, (*image[:3], kernel[3])))
    assert not calls_of(all_three, x, w, g)


def test_an_export_holds_nothing_of_this_machine():
    x, w, g = arrays(5, (2, 8, 8, 16), (3, 3, 16, 16), (2, 8, 8, 16))
    exported = jax.export.export(jax.jit(all_three))(x, w, g)
    assert_exact(exported.call(x, w, g), jax.jit(all_three)(x, w, g))


def test_without_a_compiler_the_numbers_are_the_same(monkeypatch):
    x, w, g = arrays(6, (2, 8, 8, 16), (3, 3, 16, 16), (2, 8, 8, 16))
    ours = jax.jit(all_three)(x, w, g)
    monkeypatch.setattr(conv_kernel, "load_kernel", lambda _: Kernel(None, "no compiler"))
    assert not calls_of(lambda *args: all_three(*args), x, w, g)
    assert_exact(ours, jax.jit(lambda *args: all_three(*args))(x, w, g))


def spiking_layer(dims, strides=(1, 1), groups=1):
    """A convolution of spikes."""

    def f(w, x):
        z = nadaptor.lsq(x, 0.5, 2)
        return jax.lax.conv_general_dilated(
            z, w, strides, "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    return f


def ways(f, w, x):
    """The convolutions of a step of the simulation, by name."""
    names = [op.primitive.name for op in nadaptor.spiking(f, w, x)._plan.stepwise]
    return [name for name in names if "convolution" in name or "conv_" in name]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_chunk": 2},
        {"in_axes": (None, 0), "tile_size": 2},
        {"in_axes": (None, 0), "devices": jax.devices()[:2]},
    ],
    ids=["alone", "chunks", "tiles", "devices"],
)
@pytest.mark.parametrize("dims", [NHWC, ("NCHW", "OIHW", "NCHW")], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_a_simulation_has_the_spikes_of_laxs_convolution(dims, strides, options, monkeypatch):
    # Halves, quarters: the sums are exact in whatever order.
    w, x = (a / 4 for a in arrays(7, (3, 3, 16, 32), (4, 9, 8, 16)))
    if dims != NHWC:
        w, x = w.transpose(3, 2, 0, 1), x.transpose(0, 3, 1, 2)
    f = spiking_layer(dims, strides)
    assert ways(f, w, x) == ["fast_convolution"]
    by_kernel = nadaptor.simulate(f, w, x, num_steps=5, **options)
    monkeypatch.setattr("nadaptor.transformation.faster_convolution", lambda *_: None)
    assert ways(f, w, x) == ["conv_general_dilated"]
    direct = nadaptor.simulate(f, w, x, num_steps=5, **options)
    jax.tree.map(np.testing.assert_array_equal, by_kernel, direct)


def test_networks_and_images_may_be_mapped():
    w, x = arrays(8, (2, 3, 3, 16, 16), (2, 3, 8, 8, 16))
    f = spiking_layer(NHWC)

    def outputs(w, x):
        return nadaptor.simulate(f, w, x, num_steps=3).outputs

    each = jnp.stack([outputs(*both) for both in zip(w, x, strict=True)])
    np.testing.assert_array_equal(jax.vmap(outputs)(w, x), each)
    images = jnp.stack([outputs(w[0], a) for a in x])
    mapped = jax.jit(jax.vmap(outputs, (None, 0)))
    np.testing.assert_array_equal(mapped(w[0], x), images)
    assert "NadaptorConvolve" in mapped.lower(w[0], x).as_text()


def test_groups_and_half_precision_stay_with_lax():
    for (w, x), groups in (
        (arrays(9, (3, 3, 16, 32), (2, 8, 8, 32)), 2),
        ([a.astype(jnp.bfloat16) for a in arrays(9, (3, 3, 16, 32), (2, 8, 8, 16))], 1),
    ):
        assert ways(spiking_layer(NHWC, groups=groups), w, x) == ["conv_general_dilated"]


def test_what_is_written_for_others_holds_operations_of_jax_alone():
    w, x = arrays(10, (3, 3, 16, 32), (2, 8, 8, 16))
    f = spiking_layer(NHWC)
    ours = str(jax.make_jaxpr(lambda w, x: nadaptor.simulate(f, w, x, num_steps=2))(w, x))
    written = outputs_of_data(f, (w, x), 1, num_steps=2)
    assert "fast_convolution" in ours
    assert "fast_convolution" not in str(jax.make_jaxpr(written)(x))
    np.testing.assert_array_equal(written(x), nadaptor.simulate(f, w, x, num_steps=2).outputs)
