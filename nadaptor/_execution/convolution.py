"""Faster ways to compute a convolution of spikes on a CPU, put in its place.

A kernel of ours (`conv_kernel.py`) convolves faster than XLA, where there is a compiler for it. Of
a small image, much of what is multiplied is the zeros around: each position of the filter takes a
product of its own, with the pixels it meets. Into few channels, XLA convolves at less than half its
speed: without the kernel, two neighbouring columns of outputs are computed as one with twice the
channels, the same products and some with 0 more. Between many channels, Winograd's algorithm takes
a quarter or half of the products, and is less exact: it is left to the user, as is the kernel of
`events`. What depends on the filter alone is static, and so is made once by `prepare`.
"""

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from nadaptor._execution.conv_gradient import convolve_nhwc
from nadaptor._execution.conv_kernel import BLOCK
from nadaptor._execution.events import convolve_events, is_fit
from nadaptor._execution.kernel import load_kernel
from nadaptor._execution.winograd import (
    convolve,
    convolve_rows,
    transform_filter,
    transform_filter_rows,
)

# Measured with jax 0.10 on AVX-512: into at most so many channels XLA's convolution is slow; and
# from and into so many at least, Winograd's transforms cost less than they save, along the height
# or along both axes.
MOST_NARROW, LEAST_NARROW_INPUTS, LEAST_WINOGRAD, LEAST_WINOGRAD_BOTH = 16, 8, 32, 128
# In smaller images each transformed filter, four times as large, serves too few squares.
LEAST_WINOGRAD_SIZE = 8
# Channels from which on, and the share of a filter's products with pixels up to which, it pays not
# to multiply the zeros around an image. At 4x4 pixels, a border wide, the share is 0.69.
LEAST_SMALL, MOST_IN_IMAGE = 128, 0.75
Padding = Sequence[tuple[int, int]]
# Which way of computing a convolution of spikes the user asks for, beside those that change no more
# than the order of sums.
Way = Literal["direct", "winograd", "events"]


_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it only operations of JAX's own are put in place, which other programs can read."""
    before = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(before)


def choose_way(fast_convolution: bool, events: bool) -> Way:
    """Returns what two options stand for, of which there can be but one.

    Raises:
        ValueError: both are set.
    """
    if fast_convolution and events:
        raise ValueError(
            "fast_convolution and events are two ways to do the same; set only one of them"
        )
    return "winograd" if fast_convolution else "events" if events else "direct"


def no_events(backend: str) -> str:
    """Says why there is no convolution by events, where a network has none."""
    if backend != "cpu":
        return f"its kernel is for a CPU, and the default device is a {backend}"
    # 455 and 4096 inputs are MOST_WEIGHTS, over 32 outputs and 9 positions or 1.
    return load_kernel("events").reason or (
        "no convolution of spikes is 3x3 or 1x1, in float32, of one group and undilated, from "
        "8 to 455 channels (1x1: 4096) into 16 or more"
    )


def faster_convolution(
    eqn: Any, spiking: Sequence[bool], backend: str, way: Way = "direct"
) -> ClosedJaxpr | None:
    """The body to put in place of a convolution; None to keep it.

    Args:
        eqn: an equation of a jaxpr.
        spiking: for each operand, whether spikes reach it.
        backend: of `jax.default_backend`: off the CPU, only what the user asks for is replaced.
        way: what the user asks for: Winograd's algorithm where it is faster, events where the
            kernel can do them, or neither.
    """
    if not _is_plain(eqn, spiking):
        return None
    dims, padding = eqn.params["dimension_numbers"], eqn.params["padding"]
    image, kernel = (var.aval for var in eqn.invars)
    strides = eqn.params["window_strides"]
    outputs, inputs, *window = (kernel.shape[i] for i in dims.rhs_spec)
    height, width = (eqn.outvars[0].aval.shape[i] for i in dims.out_spec[2:])
    plain_3x3 = (window, strides) == ([3, 3], (1, 1))
    if (
        way == "events"
        and backend == "cpu"
        and is_fit(image, kernel, dims)
        and load_kernel("events").targets is not None
    ):
        body = functools.partial(convolve_events, strides=strides)
    elif (
        way == "winograd"
        and plain_3x3
        and min(inputs, outputs) >= LEAST_WINOGRAD
        and min(height, width) >= LEAST_WINOGRAD_SIZE
    ):
        both = min(inputs, outputs) >= LEAST_WINOGRAD_BOTH
        body = _by_winograd if both else _by_winograd_rows
    elif backend != "cpu":
        return None
    elif (
        plain_3x3
        and min(inputs, outputs) >= LEAST_SMALL
        and _share_in_image((height, width), padding) <= MOST_IN_IMAGE
    ):
        body = kn2row
    elif (
        outputs % BLOCK == 0 and not _PORTABLE.get() and load_kernel("convolve").targets is not None
    ):
        body = functools.partial(convolve_nhwc, strides=strides)
    elif plain_3x3 and outputs <= MOST_NARROW and inputs >= LEAST_NARROW_INPUTS and width % 2 == 0:
        body = in_pairs
    else:
        return None
    return jax.make_jaxpr(functools.partial(_as_nhwc, body, dims, padding))(image, kernel)


def _is_plain(eqn: Any, spiking: Sequence[bool]) -> bool:
    """Whether this is a 2-D convolution of spikes with static weights, undilated, in float32."""
    # A filter that spikes reach is another at every step, and cannot be transformed once.
    if eqn.primitive.name != "conv_general_dilated" or tuple(spiking) != (True, False):
        return False
    image, kernel = (var.aval for var in eqn.invars)
    params = eqn.params
    return (
        image.ndim == 4
        # Of an image that an explicit mesh spreads, XLA would have to be told where each part goes.
        and not any(image.sharding.spec)
        and {*params["lhs_dilation"], *params["rhs_dilation"]} == {1}
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


def _by_winograd_rows(x: jax.Array, w: jax.Array, padding: Padding) -> jax.Array:
    return convolve_rows(x, transform_filter_rows(w), padding)


def in_pairs(x: jax.Array, w: jax.Array, padding: Padding) -> jax.Array:
    """Two columns of outputs at a time: a 3x4 filter at every second column."""
    # The filter of the left output has a column of zeros on its right, and the other on its left.
    left, right = (jnp.pad(w, ((0, 0), edge, (0, 0), (0, 0))) for edge in ((0, 1), (1, 0)))
    y = jax.lax.conv_general_dilated(
        x,
        jnp.concatenate([left, right], -1),
        window_strides=(1, 2),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # [N, H, W/2, 2 * D] in memory is [N, H, W, D] already.
    return y.reshape(*y.shape[:2], 2 * y.shape[2], w.shape[-1])


def kn2row(x: jax.Array, w: jax.Array, padding: Padding) -> jax.Array:
    """A product for each of the filter's nine positions, with the pixels that it meets alone."""
    outputs = [size + sum(edge) - 2 for size, edge in zip(x.shape[1:3], padding, strict=True)]
    rows, columns = (_spans(*both) for both in zip(outputs, padding, strict=True))
    (top, _), (left, _) = padding
    # Under position (i, j) of the filter, output (r, s) meets pixel (r + i - top, s + j - left).
    products = [
        jnp.pad(
            x[:, i + a - top : i + b - top, j + c - left : j + d - left] @ w[i, j],
            ((0, 0), (a, outputs[0] - b), (c, outputs[1] - d), (0, 0)),
        )
        for i, (a, b) in enumerate(rows)
        for j, (c, d) in enumerate(columns)
    ]
    return functools.reduce(operator.add, products)


def _spans(outputs: int, edge: tuple[int, int]) -> list[tuple[int, int]]:
    """For each of the filter's three positions along an axis, the outputs it has a pixel for."""
    before, after = edge
    starts = [min(outputs, max(0, before - i)) for i in range(3)]
    # A position may lie in the padding alone, and then meets no pixel.
    ends = [max(start, min(outputs, outputs + 2 - after - i)) for i, start in enumerate(starts)]
    return list(zip(starts, ends, strict=True))


def _share_in_image(outputs: Sequence[int], padding: Padding) -> float:
    """Of a filter's products, the share that is with pixels, not with the zeros around them."""
    spans = [_spans(*both) for both in zip(outputs, padding, strict=True)]
    met = [sum(b - a for a, b in along) / (3 * n) for along, n in zip(spans, outputs, strict=True)]
    return met[0] * met[1]
