"""A convolution's gradient in its kernel as dot products, for a CPU.

XLA computes it as a convolution with a window as large as the image, at a tenth of a dot's speed.
It is a sum over pixels: for each row of the kernel, `dw[i] = sum over n, y, x of
patches[n, s*y + i, x]^T g[n, y, x]`, where a patch is the kernel's width of pixels side by side.
That is a dot with a long contraction, and a few images at a time stay in the cache.
"""

import jax
import jax.numpy as jnp

from nadaptor._execution.conv_plain import Conv

# Measured with jax 0.10 on AVX2. Patches of so many values stay in the second-level cache with what
# they are multiplied by; sums over fewer pixels would not be worth adding to the whole.
TILE_VALUES = 2**15
TILE_PIXELS = 256


def kernel_gradient_by_dots(x: jax.Array, g: jax.Array, *, conv: Conv) -> jax.Array:
    """The gradient in the kernel as dots, whatever the layout."""
    dims = conv.dims
    # Specs list batch, feature, rows, columns; that of the kernel outputs, inputs, rows, columns.
    to_nhwc = [[spec[i] for i in (0, 2, 3, 1)] for spec in (dims.lhs_spec, dims.out_spec)]
    x, g = (a.transpose(order) for a, order in zip((x, g), to_nhwc, strict=True))
    dw = _in_tiles(x, g, conv)
    order = [dims.rhs_spec[i] for i in (2, 3, 1, 0)]
    return dw.transpose([order.index(i) for i in range(4)]).astype(x.dtype)


def _in_tiles(x: jax.Array, g: jax.Array, conv: Conv) -> jax.Array:
    """Sums over tiles of the batch: x [N, H, W, C] and g [N, Y, X, K] give [I, J, C, K]."""
    number, tile = len(x), _tile(x.shape, g.shape, conv)
    if number <= tile:
        return _dots(x, g, conv)

    def add(dw: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        # Slices by index: of arrays that a loop runs over, their first part would be a copy.
        some_x, some_g = (jax.lax.dynamic_slice_in_dim(a, first, tile) for a in (x, g))
        return dw + _dots(some_x, some_g, conv), None

    # The rest goes first, so that the loop has whole tiles only.
    first = number % tile or tile
    start = _dots(x[:first], g[:first], conv)
    return jax.lax.scan(add, start, jnp.arange(first, number, tile))[0]


def _tile(images: tuple[int, ...], gradients: tuple[int, ...], conv: Conv) -> int:
    """How many images to take at a time; a divisor of their number where one is near."""
    number, height, width, channels = images
    columns = conv.kernel[conv.dims.rhs_spec[3]]
    fit = TILE_VALUES // max(1, height * width * channels * columns)
    # So many images that a dot adds up TILE_PIXELS, though they may leave the cache.
    enough = -(-TILE_PIXELS // max(1, gradients[1] * gradients[2]))
    tile = max(1, min(number, max(fit, enough)))
    divisor = max(n for n in range(1, tile + 1) if number % n == 0)
    return divisor if 2 * divisor >= tile else tile


def _dots(x: jax.Array, g: jax.Array, conv: Conv) -> jax.Array:
    """One tile: a dot for each row of the kernel, with its columns side by side."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, g = x.astype(wide), g.astype(wide)
    rows, columns = (conv.kernel[i] for i in conv.dims.rhs_spec[2:])
    (down, right), (step_down, step_right) = conv.strides, conv.dilation
    channels, (_, high, broad, outputs) = x.shape[-1], g.shape
    # An edge may be negative: padding crops.
    edges = [(0, 0, 0), *((*edge, 0) for edge in conv.padding), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), wide), edges)
    reach = right * (broad - 1) + 1
    # Patches [N, H, X, J * C]: the pixels under the columns of the kernel side by side.
    shifts = [x[:, :, j * step_right : j * step_right + reach : right] for j in range(columns)]
    patches = jnp.concatenate(shifts, -1)
    below = down * (high - 1) + 1
    g = g.reshape(-1, outputs)
    products = [
        jnp.matmul(
            patches[:, i * step_down : i * step_down + below : down]
            .reshape(-1, columns * channels)
            .T,
            g,
            precision=conv.precision,
        )
        for i in range(rows)
    ]
    return jnp.stack(products).reshape(rows, columns, channels, outputs)
