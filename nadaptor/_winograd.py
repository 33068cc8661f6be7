"""Winograd's minimal filtering F(4x4, 3x3): a 3x3 convolution by fewer products.

Each 4x4 square of outputs takes 36 products for each pair of channels in place of 144:
`Y = A^T [(G g G^T) * (B^T d B)] A`, for the filter g and the 6x6 square d of inputs under it. Sums
come out in another order than in the direct convolution, and a little less exact.

Source: Lavin and Gray, Fast algorithms for convolutional neural networks, 2016.
"""

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

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
# Of the transformed squares of the images that are convolved together: they fit in a core's cache.
BLOCK_BYTES = 5 * 2**19
# Squares from which on each of the 36 products is a call of its own, and nothing has to be stacked.
LEAST_SQUARES = 128
Grid = Sequence[Sequence[jax.Array]]


def transform_filter(w: jax.Array) -> jax.Array:
    """Returns G g G^T for w [3, 3, C, D], as [36, C, D]."""
    filters = _both_axes(_transform_filters, [list(row) for row in w])
    return jnp.stack([entry for row in filters for entry in row])


def convolve(x: jax.Array, filters: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """Convolves x [N, H, W, C] at stride 1 with what `transform_filter` made, [36, C, D]."""
    height, width = (size + sum(edge) - 2 for size, edge in zip(x.shape[1:3], padding, strict=True))
    rows, columns = -(-height // _OUT), -(-width // _OUT)
    together = _images_together(x.shape[0], 4 * _IN * _IN * rows * columns * x.shape[3])
    convolve_block = functools.partial(_convolve, filters, padding, rows, columns)
    y = jax.lax.map(convolve_block, x.reshape(-1, together, *x.shape[1:]))
    return y.reshape(x.shape[0], *y.shape[2:])[:, :height, :width]


def _images_together(number: int, image_bytes: int) -> int:
    """The largest divisor of the number of images that keeps a block in the cache."""
    fit = max(1, BLOCK_BYTES // image_bytes)
    return next(n for n in range(min(fit, number), 0, -1) if number % n == 0)


def _convolve(
    filters: jax.Array,
    padding: Sequence[tuple[int, int]],
    rows: int,
    columns: int,
    x: jax.Array,
) -> jax.Array:
    """All whole squares of outputs of some images, [N, 4*rows, 4*columns, D]."""
    squares = _both_axes(_transform_inputs, _squares(x, padding, rows, columns))
    shape = x.shape[0], rows, columns, filters.shape[-1]
    products = _products([square for row in squares for square in row], filters)
    y = _both_axes(_sum_outputs, [products[i : i + _IN] for i in range(0, _IN * _IN, _IN)])
    y = jnp.stack([jnp.stack(row, 3) for row in y], 2)  # [N, rows, 4, columns, 4, D]
    return y.reshape(x.shape[0], _OUT * rows, _OUT * columns, shape[-1])


def _products(squares: Sequence[jax.Array], filters: jax.Array) -> list[jax.Array]:
    """The 36 products with the filters, one by one where each is large enough for a call."""
    if squares[0][..., 0].size >= LEAST_SQUARES:
        return [square @ w for square, w in zip(squares, filters, strict=True)]
    stacked = jnp.stack([square.reshape(-1, square.shape[-1]) for square in squares])
    return [y.reshape(*squares[0].shape[:-1], -1) for y in stacked @ filters]


def _squares(
    x: jax.Array, padding: Sequence[tuple[int, int]], rows: int, columns: int
) -> list[list[jax.Array]]:
    """The 6x6 squares under the outputs: entry [i][j] is [N, rows, columns, C]."""
    (top, _), (left, _) = padding
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
    even, odd = d[4] - 4 * d[2], d[3] - 4 * d[1]
    half, double = d[4] - d[2], 2 * (d[3] - d[1])
    first, last = 4 * d[0] - 5 * d[2] + d[4], 4 * d[1] - 5 * d[3] + d[5]
    return [first, even + odd, even - odd, half + double, half - double, last]


def _sum_outputs(m: Sequence[jax.Array]) -> list[jax.Array]:
    """A^T along one axis."""
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
