"""The convolution with its own weight gradient: that of jax.lax, under every transformation."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import nadaptor
from nadaptor._execution import conv_dots
from nadaptor._jaxpr.trace import trace
from nadaptor.models import ResNet

NHWC = ("NHWC", "HWIO", "NHWC")
IMAGES, KERNEL = (5, 8, 9, 3), (3, 3, 3, 4)


def _integers(seed, shape, dtype=jnp.float32):
    """Small integers: their products have exact sums, in whatever order."""
    return jax.random.randint(jax.random.key(seed), shape, -3, 4).astype(dtype)


def _loss(convolve, strides=(1, 1), padding="SAME", dims=NHWC, **kwargs):
    def loss(x, w):
        y = convolve(x, w, strides, padding, dimension_numbers=dims, **kwargs)
        return (y.astype(jnp.float32) ** 2).sum()

    return loss


def _both(make, *args):
    """What `make(convolve)` gives of our convolution and of that of jax.lax, compiled."""
    return [
        jax.jit(make(convolve))(*args)
        for convolve in (nadaptor.conv_general_dilated, jax.lax.conv_general_dilated)
    ]


def _assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of two images of 8x9 pixels, so that five are two tiles and a rest."""
    monkeypatch.setattr(conv_dots, "TILE_VALUES", 2 * 8 * 9 * 3 * 3)
    monkeypatch.setattr(conv_dots, "TILE_PIXELS", 1)


@pytest.mark.parametrize(
    ("images", "kernel", "options"),
    [
        (IMAGES, KERNEL, {}),
        ((4, 8, 9, 3), KERNEL, {}),
        ((0, 8, 9, 3), KERNEL, {}),
        ((2, 0, 9, 3), KERNEL, {}),
        ((1, 8, 9, 3), KERNEL, {"padding": "VALID"}),
        (IMAGES, KERNEL, {"strides": (2, 2)}),
        (IMAGES, KERNEL, {"strides": (2, 1), "padding": ((1, 1), (0, 2))}),
        (IMAGES, KERNEL, {"padding": ((-1, 1), (2, -1))}),
        (IMAGES, KERNEL, {"rhs_dilation": (2, 1)}),
        (IMAGES, (1, 1, 3, 4), {"strides": (2, 2), "padding": "VALID"}),
        ((3, 15, 15, 3), (7, 7, 3, 4), {"strides": (2, 2), "padding": ((3, 3), (3, 3))}),
        ((5, 3, 8, 9), (4, 3, 3, 2), {"dims": ("NCHW", "OIHW", "NCHW")}),
        # Left to jax.lax: groups, a dilated input, one spatial dimension.
        ((5, 8, 9, 4), (3, 3, 2, 4), {"feature_group_count": 2}),
        (IMAGES, KERNEL, {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))}),
        ((5, 8, 3), (3, 3, 4), {"strides": (1,), "dims": ("NWC", "WIO", "NWC")}),
    ],
)
def test_gradient_is_that_of_lax_for_every_geometry(images, kernel, options):
    x, w = _integers(0, images), _integers(1, kernel)
    _assert_equal(*_both(lambda c: jax.grad(_loss(c, **options), (0, 1)), x, w))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradient_in_half_precision_is_that_of_float32_rounded_once(dtype):
    # A linear loss: every g is an integer below 4, and so each sum is exact in float32.
    x, w, g = (_integers(i, s) for i, s in enumerate((IMAGES, KERNEL, (*IMAGES[:3], 4))))

    def gradient(convolve, dtype):
        def loss(w):
            y = convolve(x.astype(dtype), w, (1, 1), "SAME", dimension_numbers=NHWC)
            return (y * g.astype(dtype)).sum()

        return jax.jit(jax.grad(loss))(w.astype(dtype))

    ours = gradient(nadaptor.conv_general_dilated, dtype)
    theirs = gradient(jax.lax.conv_general_dilated, jnp.float32)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, theirs.astype(dtype))


def _operations(function, args, platform):
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return collections.Counter(re.findall(r'= "?(stablehlo\.\w+|call)', text))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_run_the_operations_that_they_run_with_lax(platform):
    images = jnp.ones((2, 8, 8, 3))

    def gradient(conv):
        model = ResNet(3, (1, 1), stem="cifar", width=4, conv=conv)
        variables = jax.jit(model.init)(jax.random.key(0), images)

        def loss(params):
            state = {**variables, "params": params}
            return model.apply(state, images, train=True, mutable=["batch_stats"])[0].sum()

        return _operations(jax.grad(loss), [variables["params"]], platform)

    ours = gradient(functools.partial(nn.Conv, conv_general_dilated=nadaptor.conv_general_dilated))
    assert ours == gradient(nn.Conv)
    assert ours["stablehlo.convolution"] > 15


def test_a_cpu_runs_dots_in_place_of_the_kernels_convolution():
    args = _integers(0, IMAGES), _integers(1, KERNEL)
    ours, theirs = (
        _operations(jax.grad(_loss(c), 1), args, "cpu")
        for c in (nadaptor.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    assert (ours["stablehlo.convolution"], theirs["stablehlo.convolution"]) == (1, 2)
    assert ours["stablehlo.dot_general"] > 0


@pytest.mark.parametrize(
    "twice",
    [
        lambda f, x, w: jax.jvp(jax.grad(f, (0, 1)), (x, w), (w[:1, :1, :, :1].sum() * x, w)),
        lambda f, x, w: jax.grad(lambda x, w: jax.jvp(f, (x, w), (x, w))[1], (0, 1))(x, w),
        lambda f, x, w: jax.grad(
            lambda x, w: sum((g**2).sum() for g in jax.grad(f, (0, 1))(x, w)), (0, 1)
        )(x, w),
    ],
    ids=["forward over reverse", "reverse over forward", "reverse over reverse"],
)
def test_second_derivatives_are_those_of_lax_in_every_mode(twice):
    x, w = _integers(0, (3, 4, 4, 2)), _integers(1, (3, 3, 2, 2))
    ours, theirs = _both(lambda c: functools.partial(twice, _loss(c)), x, w)
    # Sums beyond 2**24 are rounded in both.
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
        lambda f: lambda x, w: jax.vmap(jax.grad(f, 1), (0, None))(x[:, None], w),
        lambda f: lambda x, w: jax.vmap(jax.grad(f, (0, 1)))(x[None], w[None]),
        lambda f: jax.grad(
            lambda x, w: jax.lax.scan(lambda s, _: (s + f(x, w), 0), 0.0, None, 2)[0], 1
        ),
        lambda f: lambda x, w: jax.jvp(f, (x, w), (x, w)),
    ],
    ids=["remat", "example gradients", "ensemble", "scan", "forward mode"],
)
def test_transformations_give_what_they_give_with_lax(transform):
    _assert_equal(*_both(lambda c: transform(_loss(c)), _integers(0, IMAGES), _integers(1, KERNEL)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_the_batch_gives_the_gradient_of_the_whole(check_vma):
    x, w = _integers(0, (4, *IMAGES[1:])), _integers(1, KERNEL)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))

    def gradient(convolve):
        def local(x, w):
            dw = jax.grad(_loss(convolve), 1)(x, w)
            # Checked, the transpose of the weight's broadcast to the devices is their sum.
            return dw if check_vma else jax.lax.psum(dw, "batch")

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec("batch"), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )

    ours, theirs = _both(gradient, x, w)
    _assert_equal(ours, theirs)
    _assert_equal(ours, jax.jit(jax.grad(_loss(jax.lax.conv_general_dilated), 1))(x, w))


def test_pmap_over_the_batch_gives_the_gradient_of_the_whole():
    x, w = _integers(0, (4, *IMAGES[1:])), _integers(1, KERNEL)
    gradient = jax.grad(_loss(nadaptor.conv_general_dilated), 1)
    mapped = jax.pmap(
        lambda x, w: jax.lax.psum(gradient(x, w), "batch"),
        axis_name="batch",
        in_axes=(0, None),
        devices=jax.devices()[:2],
    )
    whole = jax.jit(jax.grad(_loss(jax.lax.conv_general_dilated), 1))(x, w)
    _assert_equal(mapped(x.reshape(2, 2, *x.shape[1:]), w)[0], whole)


def test_the_compiler_may_partition_the_batch():
    x, w = _integers(0, (4, *IMAGES[1:])), _integers(1, KERNEL)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec("batch")))
    ours, theirs = _both(lambda c: jax.grad(_loss(c), 1), split, w)
    _assert_equal(ours, theirs)


def test_an_export_may_leave_the_batch_open():
    gradient = jax.jit(jax.grad(_loss(nadaptor.conv_general_dilated), 1))
    batch = jax.export.symbolic_shape("batch")[0]
    x, w = _integers(0, IMAGES), _integers(1, KERNEL)
    shapes = jax.ShapeDtypeStruct((batch, *IMAGES[1:]), x.dtype), w
    exported = jax.export.export(gradient, platforms=["cpu", "tpu"])(*shapes)
    _assert_equal(exported.call(x, w), gradient(x, w))


def test_the_gradient_of_a_fixed_input_or_kernel_computes_nothing_for_it():
    args = _integers(0, IMAGES), _integers(1, KERNEL)
    for argument in (0, 1):
        ours, theirs = (
            _operations(jax.grad(_loss(c), argument), args, "tpu")
            for c in (nadaptor.conv_general_dilated, jax.lax.conv_general_dilated)
        )
        assert ours == theirs


def test_a_spiking_network_sees_the_convolution_of_lax():
    def network(x, w):
        y = nadaptor.lsq(x, jnp.float32(0.5), levels=2)
        return nadaptor.conv_general_dilated(y, w, (1, 1), "SAME", dimension_numbers=NHWC)

    traced = trace(jax.make_jaxpr(network)(_integers(0, IMAGES), _integers(1, KERNEL)))
    assert [op.primitive.name for op in traced.ops][-1] == "conv_general_dilated"


def test_the_simulators_faster_convolution_takes_its_place():
    def network(convolve):
        def f(x, w):
            y = nadaptor.lsq(x, jnp.float32(0.5), levels=2)
            return convolve(y, w, (1, 1), "SAME", dimension_numbers=NHWC)

        return f

    x, w = _integers(0, (2, 8, 8, 8)), _integers(1, (3, 3, 8, 16))
    ours, theirs = (
        [op.primitive.name for op in nadaptor.spiking(network(convolve), x, w)._plan.stepwise]
        for convolve in (nadaptor.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    assert ours == theirs
    # By the kernel; without a compiler in pairs of columns, taken apart by a reshape.
    assert ("fast_convolution" in ours) or ("reshape" in ours)
