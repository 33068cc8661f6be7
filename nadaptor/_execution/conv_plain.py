"""A convolution but its operands, and what JAX itself computes of it and of its gradients."""

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec


class Conv(NamedTuple):
    """All of a convolution but its operands; hashable."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]  # of the kernel
    dims: jax.lax.ConvDimensionNumbers
    precision: Any
    image: tuple[int, ...]  # the shape of the input
    kernel: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        """What `jax.lax.conv_general_dilated` takes beside the operands."""
        return {
            "window_strides": self.strides,
            "padding": self.padding,
            "rhs_dilation": self.dilation,
            "dimension_numbers": self.dims,
            "precision": self.precision,
        }


def plain(x: jax.Array, w: jax.Array, *, conv: Conv) -> jax.Array:
    """The convolution of an image x with a kernel w."""
    return jax.lax.conv_general_dilated(x, w, **conv.options)


def plain_image_gradient(g: jax.Array, w: jax.Array, *, conv: Conv) -> jax.Array:
    """What a gradient g of the result is in the image."""
    return jax.linear_transpose(lambda x: plain(x, w, conv=conv), _beside(g, conv.image))(g)[0]


def plain_kernel_gradient(x: jax.Array, g: jax.Array, *, conv: Conv) -> jax.Array:
    """What a gradient g of the result is in the kernel."""
    return jax.linear_transpose(lambda w: plain(x, w, conv=conv), _beside(x, conv.kernel))(g)[0]


def _beside(a: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The type of an array of another shape where a is."""
    aval = jax.typeof(a)
    mesh, varies = aval.sharding.mesh, aval.manual_axis_type
    # On an explicit mesh it lies whole on each device; in shard_map it varies as a does.
    whole = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, a.dtype, sharding=whole, manual_axis_type=varies)
