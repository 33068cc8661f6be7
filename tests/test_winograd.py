"""Winograd's convolution against the direct one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor


def network(dims, padding, stride=1, groups=1):
    def f(w, x):
        z = nadaptor.lsq(x, 0.5, 2)
        return jax.lax.conv_general_dilated(
            z, w, (stride, stride), padding, dimension_numbers=dims, feature_group_count=groups
        )

    return f


def convolutions(net):
    return [op for op in net._spiking if op.primitive.name == "conv_general_dilated"]


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


@pytest.mark.parametrize(
    ("dims", "padding", "size"),
    [
        (NHWC, ((1, 1), (1, 1)), (6, 6)),
        (NHWC, ((2, 0), (1, 3)), (7, 5)),
        (NCHW, ((0, 0), (0, 0)), (7, 5)),
        (("NHWC", "OIHW", "NCHW"), ((1, 1), (0, 2)), (5, 6)),
    ],
)
def test_equals_the_direct_convolution(dims, padding, size):
    shape = {"N": 2, "H": size[0], "W": size[1], "C": 3}
    x = jax.random.normal(jax.random.key(0), [shape[c] for c in dims[0]])
    kernel = {"H": 3, "W": 3, "I": 3, "O": 4}
    w = jax.random.normal(jax.random.key(1), [kernel[c] for c in dims[1]])
    f = network(dims, padding)
    fast = nadaptor.spiking(f, w, x, fast_convolution=True)
    assert not convolutions(fast)
    assert len(convolutions(nadaptor.spiking(f, w, x))) == 1
    run = functools.partial(nadaptor.simulate, f, w, x, num_steps=3, steps_per_chunk=2)
    np.testing.assert_allclose(
        run(fast_convolution=True).outputs, run().outputs, rtol=1e-4, atol=1e-5
    )


def test_filters_are_transformed_once():
    x, w = jnp.ones((1, 6, 6, 3)), jnp.ones((3, 3, 3, 4))
    net = nadaptor.spiking(network(NHWC, ((1, 1), (1, 1))), w, x, fast_convolution=True)
    prepared = net.prepare(w, x)
    assert any(p.shape == (3, 4) or p.shape == (4, 4, 3, 4) for p in prepared)
    dots = [op for op in net._spiking if op.primitive.name == "dot_general"]
    assert len(dots) == 16  # the products, and no transform of a filter


@pytest.mark.parametrize(
    ("options", "kernel", "dtype"),
    [
        ({"stride": 2}, (3, 3, 4, 4), jnp.float32),
        ({"groups": 2}, (3, 3, 2, 4), jnp.float32),
        ({}, (1, 1, 4, 4), jnp.float32),
        ({}, (5, 5, 4, 4), jnp.float32),
        ({}, (3, 3, 4, 4), jnp.bfloat16),
    ],
)
def test_other_convolutions_stay_direct(options, kernel, dtype):
    x, w = jnp.ones((1, 6, 6, 4), dtype), jnp.ones(kernel, dtype)
    f = network(NHWC, ((1, 1), (1, 1)), **options)
    assert len(convolutions(nadaptor.spiking(f, w, x, fast_convolution=True))) == 1
