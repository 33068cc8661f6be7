"""A convolution and its two gradients by a C++ kernel of our own, for a CPU (`convolve.cc`).

XLA's convolutions run at a third to two thirds of a core's speed, ours at two thirds and more, and
the gradient in the kernel, which XLA has no good way for, as fast as the others.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor._execution.conv_plain import Conv, plain
from nadaptor._execution.kernel import load_kernel

# Channels whose sums lie side by side in two vectors.
BLOCK = 16
_NHWC, _HWIO = (0, 3, 1, 2), (3, 2, 0, 1)
_LAYOUT = jax.lax.ConvDimensionNumbers(_NHWC, _HWIO, _NHWC)


def _convolve(x: jax.Array, w: jax.Array, *, conv: Conv, alone: bool) -> jax.Array:
    shape = jax.eval_shape(lambda x, w: plain(x, w, conv=conv), x, w).shape
    return _call("NadaptorConvolve", shape, x, w, conv, alone)


def _image_gradient(g: jax.Array, w: jax.Array, *, conv: Conv, alone: bool) -> jax.Array:
    return _call("NadaptorImageGradient", conv.image, g, w, conv, alone)


def _kernel_gradient(x: jax.Array, g: jax.Array, *, conv: Conv, alone: bool) -> jax.Array:
    return _call("NadaptorKernelGradient", conv.kernel, x, g, conv, alone)


def _call(
    symbol: str, shape: tuple[int, ...], a: jax.Array, b: jax.Array, conv: Conv, alone: bool
) -> jax.Array:
    targets = load_kernel("convolve").targets
    assert targets is not None
    (down, right), ((top, _), (left, _)) = conv.strides, conv.padding
    sizes = {"down": down, "right": right, "top": top, "left": left}
    attributes = {name: np.int64(size) for name, size in sizes.items()}
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(targets[symbol], result)(a, b, alone=alone, **attributes)


# By the names of the operations that they compute, with what has to come in blocks: the output or
# the input channels.
_WAYS: dict[str, tuple[Callable[..., jax.Array], int]] = {
    "fast_convolution": (_convolve, 3),
    "image_gradient": (_image_gradient, 2),
    "kernel_gradient": (_kernel_gradient, 3),
}


def kernel_for(name: str, conv: Conv, avals: Any) -> Callable[..., jax.Array] | None:
    """The function of two arrays that calls the kernel; None where it cannot compute this one.

    Args:
        name: of the operation.
        conv: what is convolved.
        avals: the types of the operation's operands.

    Returns:
        A function of the operands, `conv`, and `alone`: whether it may use one thread only.
    """
    function, axis = _WAYS[name]
    plain_layout = conv.dims == _LAYOUT and conv.dilation == (1, 1)
    if (
        not plain_layout
        or conv.kernel[axis] % BLOCK
        # The gradient in a cropped image would have to be set to zero around.
        or (name == "image_gradient" and min(conv.padding[0][0], conv.padding[1][0]) < 0)
        or any(aval.dtype != jnp.float32 for aval in avals)
        or load_kernel("convolve").targets is None
    ):
        return None
    return function
