"""Faster ways to compute a 3x3 convolution of spikes on a CPU, put in its place.

Into few channels, XLA convolves at less than half its speed: two neighbouring columns of outputs
are computed as one with twice the channels, the same products and some with 0 more. Between many
channels, Winograd's algorithm takes a quarter of the products, and is less exact: it is left to
the user. What depends on the filter alone is static, and so is made once by `prepare`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from nadaptor._winograd import convolve, transform_filter

# Measured with jax 0.10 on AVX-512: into at most so many channels XLA's convolution is slow; and
# from and into so many at least, Winograd's transforms cost less than they save.
MOST_NARROW, LEAST_NARROW_INPUTS, LEAST_WINOGRAD = 16, 8, 64
# In smaller images each transformed filter, four times as large, serves too few squares.
LEAST_WINOGRAD_SIZE = 8
Padding = Sequence[tuple[int, int]]


def faster(
    eqn: Any, spiking: Sequence[bool], backend: str, winograd: bool = False
) -> ClosedJaxpr | None:
    """The body to put in place of a convolution; None to keep it.

    Args:
        eqn: an equation of a jaxpr.
        spiking: for each operand, whether spikes reach it.
        backend: of `jax.default_backend`: off the CPU, only what the user asks for is replaced.
        winograd: whether to use Winograd's algorithm, where it is faster.
    """
    if not _is_plain(eqn, spiking):
        return None
    dims, padding = eqn.params["dimension_numbers"], eqn.params["padding"]
    image, kernel = (var.aval for var in eqn.invars)
    outputs, inputs = (kernel.shape[i] for i in dims.rhs_spec[:2])
    height, width = (eqn.outvars[0].aval.shape[i] for i in dims.out_spec[2:])
    if (
        winograd
        and min(inputs, outputs) >= LEAST_WINOGRAD
        and min(height, width) >= LEAST_WINOGRAD_SIZE
    ):
        body = _by_winograd
    elif (
        backend == "cpu"
        and outputs <= MOST_NARROW
        and inputs >= LEAST_NARROW_INPUTS
        and width % 2 == 0
    ):
        body = in_pairs
    else:
        return None
    return jax.make_jaxpr(functools.partial(_as_nhwc, body, dims, padding))(image, kernel)


def _is_plain(eqn: Any, spiking: Sequence[bool]) -> bool:
    """Whether this is a 3x3 convolution of spikes with static weights, stride 1, in float32."""
    if eqn.primitive.name != "conv_general_dilated" or tuple(spiking) != (True, False):
        return False
    image, kernel = (var.aval for var in eqn.invars)
    params = eqn.params
    return (
        image.ndim == 4
        and [kernel.shape[i] for i in params["dimension_numbers"].rhs_spec[2:]] == [3, 3]
        and {*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"]} == {1}
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and min(min(edge) for edge in params["padding"]) >= 0
        # Half precision would lose digits in the transforms.
        and image.dtype == kernel.dtype == eqn.outvars[0].aval.dtype == jnp.float32
    )


def _as_nhwc(
    body: Callable[[jax.Array, jax.Array, Padding], jax.Array],
    dims: Any,
    padding: Padding,
    x: jax.Array,
    w: jax.Array,
) -> list[jax.Array]:
    """Runs `body` on NHWC and HWIO, whatever the layout."""
    x = x.transpose(_order(dims.lhs_spec, "NHWC"))
    w = w.transpose([dims.rhs_spec[i] for i in (2, 3, 1, 0)])
    back = _order(dims.out_spec, "NHWC")
    return [body(x, w, padding).transpose([back.index(i) for i in range(4)])]


def _order(spec: Sequence[int], names: str) -> list[int]:
    """The axes N, H, W, C of an operand whose spec gives them as batch, feature, space."""
    at = dict(zip("NCHW", spec, strict=True))
    return [at[name] for name in names]


def _by_winograd(x: jax.Array, w: jax.Array, padding: Padding) -> jax.Array:
    return convolve(x, transform_filter(w), padding)


def in_pairs(x: jax.Array, w: jax.Array, padding: Padding) -> jax.Array:
    """Two columns of outputs at a time: a 3x4 filter at every second column."""
    left, right = (jnp.pad(w, ((0, 0), edge, (0, 0), (0, 0))) for edge in ((0, 1), (1, 0)))
    y = jax.lax.conv_general_dilated(
        x,
        jnp.concatenate([left, right], -1),
        window_strides=(1, 2),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*y.shape[:2], 2 * y.shape[2], w.shape[-1])
