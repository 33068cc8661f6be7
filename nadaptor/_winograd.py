"""A faster convolution of spikes: Winograd's minimal filtering F(2x2, 3x3) in plain JAX.

Each 2x2 square of outputs takes 16 products for each pair of channels in place of 36:
`Y = A^T [(G g G^T) * (B^T d B)] A`, for the filter g and the 4x4 square d of inputs under it. The
filter's transform is static, and so is made once by `prepare`. Sums come out in another order
than in the direct convolution: float rounding may flip a few spikes.

Source: Lavin and Gray, Fast algorithms for convolutional neural networks, 2016.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def winograd(eqn: Any, spiking: Sequence[bool]) -> ClosedJaxpr | None:
    """The body to put in place of a 3x3 convolution of spikes at stride 1; None for any other.

    Args:
        eqn: an equation of a jaxpr.
        spiking: for each operand, whether spikes reach it.
    """
    if eqn.primitive.name != "conv_general_dilated" or tuple(spiking) != (True, False):
        return None
    image, kernel = (var.aval for var in eqn.invars)
    dims, params = eqn.params["dimension_numbers"], eqn.params
    plain = (
        image.ndim == 4
        and [kernel.shape[i] for i in dims.rhs_spec[2:]] == [3, 3]
        and {*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"]} == {1}
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and min(min(edge) for edge in params["padding"]) >= 0
        # Half precision would lose digits in the transforms.
        and image.dtype == kernel.dtype == eqn.outvars[0].aval.dtype == jnp.float32
    )
    if not plain:
        return None

    def body(x: jax.Array, w: jax.Array) -> list[jax.Array]:
        x = x.transpose(_order(dims.lhs_spec, "NHWC"))
        w = w.transpose([dims.rhs_spec[i] for i in (2, 3, 1, 0)])
        y = _convolve(x, w, params["padding"])
        back = _order(dims.out_spec, "NHWC")
        return [y.transpose([back.index(i) for i in range(4)])]

    return jax.make_jaxpr(body)(image, kernel)


def _order(spec: Sequence[int], names: str) -> list[int]:
    """The axes N, H, W, C of an operand whose spec gives them as batch, feature, space."""
    at = dict(zip("NCHW", spec, strict=True))
    return [at[name] for name in names]


def _convolve(x: jax.Array, w: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """Convolves x [N, H, W, C] with w [3, 3, C, D], stride 1."""
    height, width = (size + sum(edge) - 2 for size, edge in zip(x.shape[1:3], padding, strict=True))
    rows, columns = -(-height // 2), -(-width // 2)
    squares = _squares(x, padding, rows, columns)
    g = jnp.array(_G, w.dtype)
    filters = jnp.einsum("ai,bj,ijcd->abcd", g, g, w, precision="highest")
    products = [[squares[i][j] @ filters[i, j] for j in range(4)] for i in range(4)]
    y = _both_axes(_sum_outputs, products)
    y = jnp.stack([jnp.stack(row, 3) for row in y], 2)  # [N, rows, 2, columns, 2, D]
    y = y.reshape(x.shape[0], 2 * rows, 2 * columns, w.shape[-1])
    return y[:, :height, :width]


def _squares(
    x: jax.Array, padding: Sequence[tuple[int, int]], rows: int, columns: int
) -> list[list[jax.Array]]:
    """B^T d B for all squares at once: 4x4 arrays [N, rows, columns, C]."""
    (top, _), (left, _) = padding
    below, right = 2 * rows + 2 - x.shape[1] - top, 2 * columns + 2 - x.shape[2] - left
    x = jnp.pad(x, ((0, 0), (top, below), (left, right), (0, 0)))
    ends = 2 * rows - 1, 2 * columns - 1
    d = [[x[:, i : i + ends[0] : 2, j : j + ends[1] : 2] for j in range(4)] for i in range(4)]
    return _both_axes(_differences, d)


def _differences(d: Sequence[jax.Array]) -> list[jax.Array]:
    """B^T along one axis."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _sum_outputs(m: Sequence[jax.Array]) -> list[jax.Array]:
    """A^T along one axis."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _both_axes(transform: Any, grid: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
    columns = [transform(column) for column in zip(*grid, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]
