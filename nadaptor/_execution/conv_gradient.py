"""A convolution whose weight gradient is fast on a CPU, too.

XLA computes the gradient of a convolution in its kernel as a convolution with a window as large as
the image, on a CPU at a tenth of a dot's speed. It is a sum over pixels: for each row of the
kernel, `dw[i] = sum over n, y, x of patches[n, s*y + i, x]^T g[n, y, x]`, where a patch is the
kernel's width of pixels side by side. That is a dot with a long contraction, and a few images at a
time stay in the cache.

The choice is made where a program is lowered: for a CPU the dots, for every other platform the
operations that JAX itself would have. A derivative in the kernel is therefore an operation of its
own until then, `kernel_tangent` forward and `kernel_gradient` backward; both are bilinear, so that
derivatives of every order and mode are right. The convolution itself is `lax`'s, behind
`jax.custom_jvp`, which `nadaptor.spiking` opens: it knows the function by its name.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

# Measured with jax 0.10 on AVX2. Patches of so many values stay in the second-level cache with what
# they are multiplied by; sums over fewer pixels would not be worth adding to the whole.
TILE_VALUES = 2**15
TILE_PIXELS = 256
_FLOATS = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)


class _Conv(NamedTuple):
    """All of a convolution but its operands; hashable."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]  # of the kernel
    dims: jax.lax.ConvDimensionNumbers
    precision: Any
    kernel: tuple[int, ...]  # its shape

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


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """Convolves as `jax.lax.conv_general_dilated`, with a fast weight gradient on a CPU.

    The gradient is that of `jax.lax`, its sums in another order and in float32 where the operands
    are of half precision. Programs for other platforms hold the operations that they hold with
    `jax.lax`, and so does, on every platform, whatever is not a convolution of two spatial
    dimensions and one group with an undilated input, and a gradient under `vmap` or partitioned by
    the compiler among several devices (`pmap` and `shard_map` leave each device its own).

    Args:
        lhs: input, of rank 4 for the fast gradient.
        rhs: kernel.
        window_strides: as in `jax.lax`, like all that follow.
        padding: "SAME", "VALID" or pairs.
        lhs_dilation: of the input.
        rhs_dilation: of the kernel.
        dimension_numbers: the layout.
        feature_group_count: groups of features.
        batch_group_count: groups of the batch.
        precision: of the products.
        preferred_element_type: of the result.
        **kwargs: what newer versions of JAX add.

    Returns:
        The convolution.

    Raises:
        TypeError: as `jax.lax.conv_general_dilated`.
        ValueError: as `jax.lax.conv_general_dilated`.

    Example:
        >>> import flax.linen as nn
        >>> layer = nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 3)))[0].shape
        (1, 8, 8, 4)

    Source: this project.
    """
    special = {
        "feature_group_count": (feature_group_count, 1),
        "batch_group_count": (batch_group_count, 1),
        "preferred_element_type": (preferred_element_type, None),
        **{name: (value, None) for name, value in kwargs.items()},
    }
    # Only what is not its default is passed on: older versions of JAX do not know the newer names.
    special = {name: given for name, (given, default) in special.items() if given != default}
    dilations = tuple(lhs_dilation or (1, 1)), tuple(rhs_dilation or (1, 1))
    dtype, floats = jnp.result_type(lhs), map(jnp.dtype, _FLOATS)
    if (
        special
        or jnp.ndim(lhs) != 4
        or jnp.ndim(rhs) != 4
        or dilations[0] != (1, 1)
        or dtype not in floats
        or dtype != jnp.result_type(rhs)
    ):
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            precision=precision,
            **special,
        )
    dims = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    # As pairs of ints: compiled functions are kept by them, and the dots slice by them.
    if isinstance(padding, str):
        sizes = (rhs.shape[i] for i in dims.rhs_spec[2:])
        window = [(size - 1) * d + 1 for size, d in zip(sizes, dilations[1], strict=True)]
        image = [lhs.shape[i] for i in dims.lhs_spec[2:]]
        padding = jax.lax.padtype_to_pads(image, window, window_strides, padding)
    pairs = tuple((int(before), int(after)) for before, after in padding)
    conv = _Conv(tuple(window_strides), pairs, dilations[1], dims, precision, rhs.shape)
    return nadaptor_convolution(conv, lhs, rhs)


def _plain(x: jax.Array, w: jax.Array, *, conv: _Conv) -> jax.Array:
    return jax.lax.conv_general_dilated(x, w, **conv.options)


def _plain_gradient(x: jax.Array, g: jax.Array, *, conv: _Conv) -> jax.Array:
    """The gradient in the kernel as JAX has it."""
    aval = jax.typeof(x)
    mesh, varies = aval.sharding.mesh, aval.manual_axis_type
    # On an explicit mesh the kernel lies whole on each device; in shard_map it varies as x does.
    whole = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
    kernel = jax.ShapeDtypeStruct(conv.kernel, x.dtype, sharding=whole, manual_axis_type=varies)
    return jax.linear_transpose(lambda w: _plain(x, w, conv=conv), kernel)(g)[0]


def _input_gradient(x: Any, w: jax.Array, g: jax.Array, conv: _Conv) -> jax.Array:
    return jax.linear_transpose(lambda x: _plain(x, w, conv=conv), x)(g)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def nadaptor_convolution(conv: _Conv, x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution of `lax`, with a derivative of ours; `_jaxpr/trace.py` knows the name."""
    return _plain(x, w, conv=conv)


def _convolve_jvp(conv: _Conv, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> Any:
    (x, w), (dx, dw) = primals, tangents
    # Of a fixed input or kernel the tangent is a symbol, and nothing is computed for it.
    parts = []
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        parts.append(_plain(dx, w, conv=conv))
    if not isinstance(dw, jax.custom_derivatives.SymbolicZero):
        parts.append(_kernel_tangent.bind(*_on_same_axes(x, dw), conv=conv))
    y = _plain(x, w, conv=conv)
    return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)


nadaptor_convolution.defjvp(_convolve_jvp, symbolic_zeros=True)


def _on_same_axes(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Marks both as varying along the axes of `shard_map` along which one of them varies."""
    axes = [jax.typeof(a).manual_axis_type.varying for a in (x, w)]
    missing = [tuple(axes[1 - i] - axes[i]) for i in range(2)]
    x, w = (
        jax.lax.pcast(a, names, to="varying") if names else a
        for a, names in zip((x, w), missing, strict=True)
    )
    return x, w


def _kernel_gradient_on_cpu(x: jax.Array, g: jax.Array, *, conv: _Conv) -> jax.Array:
    """The gradient in the kernel as dots, whatever the layout."""
    dims = conv.dims
    # Specs list batch, feature, rows, columns; that of the kernel outputs, inputs, rows, columns.
    to_nhwc = [[spec[i] for i in (0, 2, 3, 1)] for spec in (dims.lhs_spec, dims.out_spec)]
    x, g = (a.transpose(order) for a, order in zip((x, g), to_nhwc, strict=True))
    dw = _in_tiles(x, g, conv)
    order = [dims.rhs_spec[i] for i in (2, 3, 1, 0)]
    return dw.transpose([order.index(i) for i in range(4)]).astype(x.dtype)


def _in_tiles(x: jax.Array, g: jax.Array, conv: _Conv) -> jax.Array:
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


def _tile(images: tuple[int, ...], gradients: tuple[int, ...], conv: _Conv) -> int:
    """How many images to take at a time; a divisor of their number where one is near."""
    number, height, width, channels = images
    columns = conv.kernel[conv.dims.rhs_spec[3]]
    fit = TILE_VALUES // max(1, height * width * channels * columns)
    # So many images that a dot adds up TILE_PIXELS, though they may leave the cache.
    enough = -(-TILE_PIXELS // max(1, gradients[1] * gradients[2]))
    tile = max(1, min(number, max(fit, enough)))
    divisor = max(n for n in range(1, tile + 1) if number % n == 0)
    return divisor if 2 * divisor >= tile else tile


def _dots(x: jax.Array, g: jax.Array, conv: _Conv) -> jax.Array:
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


def _bilinear(name: str, function: Any) -> Primitive:
    """An operation of two arrays that is lowered, batched and typed as `function` is."""
    operation = Primitive(name)

    @functools.lru_cache(maxsize=None)
    def compiled(conv: _Conv) -> Any:
        return jax.jit(functools.partial(operation.bind, conv=conv))

    def typed(*avals: Any, conv: _Conv) -> Any:
        return jax.make_jaxpr(functools.partial(function, conv=conv))(*avals).out_avals[0]

    def batched(args: Any, axes: Any, *, conv: _Conv) -> tuple[jax.Array, int]:
        return jax.vmap(functools.partial(function, conv=conv), in_axes=tuple(axes))(*args), 0

    # Outside of jit, too: only a program that is lowered knows its platform.
    operation.def_impl(lambda *args, conv: compiled(conv)(*args))
    operation.def_abstract_eval(typed)
    batching.primitive_batchers[operation] = batched
    mlir.register_lowering(operation, mlir.lower_fun(function, multiple_results=False))
    return operation


_kernel_tangent = _bilinear("kernel_tangent", _plain)
_kernel_gradient = _bilinear("kernel_gradient", _plain_gradient)
# Each is the other's transpose in its second operand, and so every derivative is one of the two
# or a convolution of `lax`.
ad.defbilinear(
    _kernel_tangent,
    lambda g, x, w, conv: _input_gradient(x.aval, w, g, conv),
    lambda g, x, w, conv: _kernel_gradient.bind(x, g, conv=conv),
)
ad.defbilinear(
    _kernel_gradient,
    lambda dw, x, g, conv: _input_gradient(x.aval, dw, g, conv),
    lambda dw, x, g, conv: _kernel_tangent.bind(x, dw, conv=conv),
)


def _lower_on_cpu(ctx: Any, *operands: Any, conv: _Conv) -> Any:
    # Where the compiler partitions the program, a loop over the batch would gather it.
    partitioned = (getattr(ctx.module_context.axis_context, "num_devices", 1) or 1) > 1
    # In an export sizes may be symbols.
    fixed = all(isinstance(size, int) for aval in ctx.avals_in for size in aval.shape)
    function = _kernel_gradient_on_cpu if fixed and not partitioned else _plain_gradient
    return mlir.lower_fun(function, multiple_results=False)(ctx, *operands, conv=conv)


mlir.register_lowering(_kernel_gradient, _lower_on_cpu, platform="cpu")
