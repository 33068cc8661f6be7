"""Winograd's minimal filtering: a 3x3 convolution by fewer products.

By F(4x4, 3x3) each 4x4 square of outputs takes 36 products for each pair of channels in place of
144: `Y = A^T [(G g G^T) * (B^T d B)] A`, for the filter g and the 6x6 square d of inputs under it.
By F(4, 3) along the height alone it is half of the products, for less work around them. Sums come
out in another order than in the direct convolution, and a little less exact.

Source: Lavin and Gray, Fast algorithms for convolutional neural networks, 2016.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Rows for the points 0, 1, -1, 2, -2 and infinity.
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# Outputs and inputs of a square, along one axis.
_OUT, _IN = 4, 6
Grid = Sequence[Sequence[jax.Array]]


def transform_filter(w: jax.Array) -> list[jax.Array]:
    """Returns the 36 entries of G g G^T for w [3, 3, C, D], each [C, D]."""
    filters = _both_axes(_transform_filters, [list(row) for row in w])
    return [entry for row in filters for entry in row]


def transform_filter_rows(w: jax.Array) -> list[jax.Array]:
    """Returns the 6 rows of G g for w [3, 3, C, D], each a filter [1, 3, C, D]."""
    return _transform_filters([w[i : i + 1] for i in range(3)])


def convolve(
    x: jax.Array, filters: Sequence[jax.Array], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Convolves x [N, H, W, C] at stride 1 with what `transform_filter` made."""
    height, width = (size + sum(edge) - 2 for size, edge in zip(x.shape[1:3], padding, strict=True))
    rows, columns = -(-height // _OUT), -(-width // _OUT)
    squares = _both_axes(_transform_inputs, _squares(x, padding, rows, columns))
    # Else XLA would transform a square anew in each of its products.
    squares = jax.lax.optimization_barrier(squares)
    products = [square @ w for square, w in zip(itertools.chain(*squares), filters, strict=True)]
    y = _both_axes(_sum_outputs, [products[i : i + _IN] for i in range(0, _IN * _IN, _IN)])
    y = jnp.stack([jnp.stack(row, 3) for row in y], 2)  # [N, rows, 4, columns, 4, D]
    return y.reshape(x.shape[0], _OUT * rows, _OUT * columns, -1)[:, :height, :width]


def convolve_rows(
    x: jax.Array, filters: Sequence[jax.Array], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Convolves x [N, H, W, C] at stride 1 with what `transform_filter_rows` made."""
    (top, bottom), sides = padding
    height = x.shape[1] + top + bottom - 2
    rows = -(-height // _OUT)
    x = jnp.pad(x, ((0, 0), (top, _OUT * rows + 2 - x.shape[1] - top), sides, (0, 0)))
    bands = _transform_inputs([x[:, i : i + _OUT * (rows - 1) + 1 : _OUT] for i in range(_IN)])
    bands = jax.lax.optimization_barrier(bands)
    products = [
        jax.lax.conv_general_dilated(
            band, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for band, w in zip(bands, filters, strict=True)
    ]
    y = jnp.stack(_sum_outputs(products), 2)  # [N, rows, 4, W, D]
    return y.reshape(x.shape[0], _OUT * rows, *y.shape[3:])[:, :height]


def _squares(
    x: jax.Array, padding: Sequence[tuple[int, int]], rows: int, columns: int
) -> list[list[jax.Array]]:
    """The 6x6 squares under the outputs: entry [i][j] is [N, rows, columns, C]."""
    (top, _), (left, _) = padding
    # The last squares may reach beyond the padding that was asked for.
    below, right = (
        _OUT * number + 2 - size - before
        for number, size, before in zip((rows, columns), x.shape[1:3], (top, left), strict=True)
    )
    x = jnp.pad(x, ((0, 0), (top, below), (left, right), (0, 0)))
    ends = _OUT * (rows - 1) + 1, _OUT * (columns - 1) + 1
    return [
        [x[:, i : i + ends[0] : _OUT, j : j + ends[1] : _OUT] for j in range(_IN)]
        for i in range(_IN)
    ]


def _transform_filters(g: Sequence[jax.Array]) -> list[jax.Array]:
    """G along one axis."""
    rows = [[a * x for a, x in zip(row, g, strict=True) if a] for row in _G]
    return [functools.reduce(operator.add, row) for row in rows]


def _transform_inputs(d: Sequence[jax.Array]) -> list[jax.Array]:
    """B^T along one axis."""
    # Rows of 1 and -1 share an even and an odd part; so do those of 2 and -2.
    even, odd = d[4] - 4 * d[2], d[3] - 4 * d[1]
    half, double = d[4] - d[2], 2 * (d[3] - d[1])
    first, last = 4 * d[0] - 5 * d[2] + d[4], 4 * d[1] - 5 * d[3] + d[5]
    return [first, even + odd, even - odd, half + double, half - double, last]


def _sum_outputs(m: Sequence[jax.Array]) -> list[jax.Array]:
    """A^T along one axis."""
    # Row k has the kth powers of the points, and the last the point at infinity.
    near, far = m[1] + m[2], m[3] + m[4]
    near_odd, far_odd = m[1] - m[2], m[3] - m[4]
    return [
        m[0] + near + far,
        near_odd + 2 * far_odd,
        near + 4 * far,
        near_odd + 8 * far_odd + m[5],
    ]


def _both_axes(
    transform: Callable[[Sequence[jax.Array]], list[jax.Array]], grid: Grid
) -> list[list[jax.Array]]:
    columns = [transform(column) for column in zip(*grid, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]
