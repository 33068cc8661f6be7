"""Convolutions of spikes by events: what is multiplied is the spikes, and not the zeros.

Where a value in ten is a spike, nine tenths of a dense convolution are products with zero. A kernel
of our own (`events.cc`) lists the spikes of each image and adds the weights that they meet; an
image with more of them than pays it convolves densely, to the same bits. It is an operation of its
own until a program is lowered: for a CPU the kernel, everywhere else, and in every derivative, the
convolution of `jax.lax`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from nadaptor._execution.kernel import load_kernel

# Outputs side by side whose sums stay in registers; the smaller block is for the narrowest layers.
WIDE, NARROW = 32, 16
# Up to which share of an image's values spikes pay, by block, measured with jax 0.10 on AVX2: the
# sums of narrow layers lie in memory.
MOST_SPIKES = {NARROW: 0.25, WIDE: 0.4}
# Into or from fewer channels, vectors would be half empty.
LEAST_OUTPUTS, LEAST_INPUTS = 16, 8
# A block of weights that leaves the second-level cache is read anew for every few pixels.
MOST_WEIGHTS = 2**17
# An event is a column and a channel in 16 bits each.
MOST = 2**16
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Padding = Sequence[tuple[int, int]]


class _Conv(NamedTuple):
    """A convolution of NHWC and HWIO but its operands; hashable."""

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]


def is_fit(image: Any, kernel: Any, dims: Any) -> bool:
    """Says whether the kernel can do a plain convolution of arrays of these types."""
    outputs, inputs, *window = (kernel.shape[i] for i in dims.rhs_spec)
    return (
        window in ([1, 1], [3, 3])
        and outputs >= LEAST_OUTPUTS
        and inputs >= LEAST_INPUTS
        and WIDE * inputs * window[0] * window[1] <= MOST_WEIGHTS
        and all(isinstance(size, int) and size <= MOST for size in image.shape)
    )


def convolve_events(
    x: jax.Array, w: jax.Array, padding: Padding, strides: Sequence[int]
) -> jax.Array:
    """Convolves x [N, H, W, C], mostly zeros, with w [3, 3, C, D] or [1, 1, C, D].

    What is made of w alone comes first, for `prepare` to do once.

    Args:
        x: spikes, float32, of any amplitudes and signs.
        w: kernel, float32.
        padding: pairs, none negative.
        strides: along height and width.

    Returns:
        The convolution, float32; its sums are in an order of their own, the same for each example
        whatever the others are.
    """
    (down, right), ((top, bottom), (left, after)) = strides, padding
    conv = _Conv((down, right), ((top, bottom), (left, after)))
    # A weight that is not finite makes NaN of a zero, which is then no event to be left out.
    blocks = _in_blocks(w, right)
    most = jnp.where(jnp.isfinite(w).all(), MOST_SPIKES[blocks.shape[-1]], -1.0)
    return event_convolution.bind(x, w, blocks, most.astype(jnp.float32), conv=conv)


def _in_blocks(w: jax.Array, stride: int) -> jax.Array:
    """The kernel [D/block, rows, columns, C, block], with zeros where these do not divide.

    A pixel meets every `stride`-th column, of which there are as many for every pixel.
    """
    rows, columns, inputs, outputs = w.shape
    block = NARROW if outputs <= NARROW else WIDE
    blocks, wide = -(-outputs // block), -(-columns // stride) * stride
    w = jnp.pad(w, ((0, 0), (0, wide - columns), (0, 0), (0, blocks * block - outputs)))
    return w.reshape(rows, wide, inputs, blocks, block).transpose(3, 0, 1, 2, 4)


def _dense(x: jax.Array, w: jax.Array, conv: _Conv) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, w, conv.strides, conv.padding, dimension_numbers=_DIMENSIONS
    )


# What the kernel was given beside the operands is left unread, and XLA drops it.
def _plain(x: jax.Array, w: jax.Array, blocks: Any, most: Any, *, conv: _Conv) -> jax.Array:
    return _dense(x, w, conv)


def _by_kernel(
    x: jax.Array, w: jax.Array, blocks: jax.Array, most: jax.Array, *, conv: _Conv
) -> jax.Array:
    targets = load_kernel("events").targets
    assert targets is not None
    out = jax.eval_shape(lambda x, w: _dense(x, w, conv), x, w)
    (top, _), (left, _) = conv.padding
    sizes = {"columns": w.shape[1], "down": conv.strides[0], "right": conv.strides[1]}
    attributes = {name: np.int64(n) for name, n in {**sizes, "top": top, "left": left}.items()}
    return jax.ffi.ffi_call(targets["NadaptorEvents"], jax.ShapeDtypeStruct(out.shape, out.dtype))(
        x, blocks, most, **attributes
    )


def _typed(*avals: Any, conv: _Conv) -> Any:
    return jax.make_jaxpr(lambda x, w: _dense(x, w, conv))(*avals[:2]).out_avals[0]


def _batched(args: Any, axes: Any, *, conv: _Conv) -> tuple[jax.Array, int]:
    x, w, blocks, most = args
    if axes[0] is None or any(axis is not None for axis in axes[1:]):
        # Another kernel for each example: the one thing that the kernel cannot do at once.
        return jax.vmap(lambda x, w: _dense(x, w, conv), axes[:2])(x, w), 0
    # Steps and examples are one batch to the kernel.
    x = jnp.moveaxis(x, axes[0], 0)
    y = event_convolution.bind(x.reshape(-1, *x.shape[2:]), w, blocks, most, conv=conv)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


def _jvp(primals: Any, tangents: Any, *, conv: _Conv) -> tuple[jax.Array, Any]:
    # `blocks` and `most` are made of w, and its own tangent stands for theirs.
    (x, w, *_), (dx, dw, *_) = primals, tangents
    out = event_convolution.bind(*primals, conv=conv)
    parts = [
        _dense(a, b, conv)
        for a, b, tangent in ((dx, w, dx), (x, dw, dw))
        if not isinstance(tangent, ad.Zero)
    ]
    return out, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(out)


def _lower_on_cpu(ctx: Any, *operands: Any, conv: _Conv) -> Any:
    # Where the compiler partitions the program, it would gather the operands of a call.
    partitioned = (getattr(ctx.module_context.axis_context, "num_devices", 1) or 1) > 1
    function = _plain if partitioned or load_kernel("events").targets is None else _by_kernel
    return mlir.lower_fun(function, multiple_results=False)(ctx, *operands, conv=conv)


event_convolution = Primitive("event_convolution")
# Outside of jit, too: only a program that is lowered knows its platform.
event_convolution.def_impl(
    lambda *args, conv: jax.jit(lambda *args: event_convolution.bind(*args, conv=conv))(*args)
)
event_convolution.def_abstract_eval(_typed)
batching.primitive_batchers[event_convolution] = _batched
ad.primitive_jvps[event_convolution] = _jvp
mlir.register_lowering(event_convolution, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(event_convolution, _lower_on_cpu, platform="cpu")
