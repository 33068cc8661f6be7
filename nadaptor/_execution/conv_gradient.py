"""A convolution that is fast on a CPU, and its gradients with it.

XLA convolves well forward, on a CPU at up to two thirds of its speed, and has no good way for the
gradient in the kernel, which has a window as large as the image. On a CPU all three are computed by
a C++ kernel of ours (`conv_kernel.py`) where there is a compiler and the sizes fit, and otherwise
the gradient in the kernel by dot products (`conv_dots.py`).

The choice is made where a program is lowered: every other platform has the operations that JAX
itself would have. Until then each of the three is an operation of its own. They are bilinear, and
each is the transpose of another, so that derivatives of every order and mode are right. A function
that is not differentiated keeps `lax`'s convolution, behind `jax.custom_jvp`, which
`nadaptor.spiking` opens: it knows the function by its name.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from nadaptor._execution.conv_dots import kernel_gradient_by_dots
from nadaptor._execution.conv_kernel import kernel_for
from nadaptor._execution.conv_plain import (
    Conv,
    plain,
    plain_image_gradient,
    plain_kernel_gradient,
)

_FLOATS = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)


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
    """Convolves as `jax.lax.conv_general_dilated`, with fast gradients on a CPU.

    A function that is differentiated runs on a CPU in a C++ kernel, forward and backward, which is
    made with the system's compiler at its first use: in float32, NHWC and HWIO, undilated, from or
    into multiples of 16 channels. What does not fit, or without a compiler, has the gradient in the
    kernel by dot products, in float32 where the operands are of half precision. The numbers are
    those of `jax.lax`, their sums in another order. Programs for other platforms hold the
    operations that they hold with `jax.lax`, and so does, on every platform, whatever is not a
    convolution of two spatial dimensions and one group with an undilated input, what is exported,
    and a gradient that the compiler partitions among several devices (`pmap` and `shard_map` leave
    each device its own) or for which `vmap` maps over kernels.

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
    conv = Conv(tuple(window_strides), pairs, dilations[1], dims, precision, lhs.shape, rhs.shape)
    return nadaptor_convolution(conv, lhs, rhs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def nadaptor_convolution(conv: Conv, x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution of `lax`, with a derivative of ours; `_jaxpr/trace.py` knows the name."""
    return plain(x, w, conv=conv)


def _convolve_jvp(conv: Conv, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> Any:
    (x, w), (dx, dw) = primals, tangents
    y = _convolution.bind(*_on_same_axes(x, w), conv=conv)
    # Of a fixed input or kernel the tangent is a symbol, and nothing is computed for it.
    parts = [
        _convolution.bind(*_on_same_axes(a, b), conv=conv)
        for a, b, tangent in ((dx, w, dx), (x, dw, dw))
        if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    ]
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


def _bilinear(name: str, function: Any, on_cpu: Any) -> Primitive:
    """An operation of two arrays that is typed, batched and lowered as `function` is.

    On a CPU it is lowered as the kernel of its name, or else as `on_cpu`.
    """
    operation = Primitive(name)

    @functools.lru_cache(maxsize=None)
    def compiled(conv: Conv) -> Any:
        return jax.jit(functools.partial(operation.bind, conv=conv))

    def typed(*avals: Any, conv: Conv) -> Any:
        return jax.make_jaxpr(functools.partial(function, conv=conv))(*avals).out_avals[0]

    def batched(args: Any, axes: Any, *, conv: Conv) -> tuple[jax.Array, int]:
        a, b = args
        if name == "kernel_gradient" or axes[1] is not None or conv.dims.lhs_spec[0] != 0:
            return jax.vmap(functools.partial(function, conv=conv), in_axes=tuple(axes))(a, b), 0
        # With one kernel for all, what is mapped is more images.
        a = jnp.moveaxis(a, axes[0], 0)
        image = (a.shape[0] * conv.image[0], *conv.image[1:])
        y = operation.bind(a.reshape(-1, *a.shape[2:]), b, conv=conv._replace(image=image))
        return y.reshape(*a.shape[:2], *y.shape[1:]), 0

    def lower_on_cpu(ctx: Any, *operands: Any, conv: Conv) -> Any:
        chosen = _on_cpu(ctx, name, conv, function, on_cpu)
        return mlir.lower_fun(chosen, multiple_results=False)(ctx, *operands, conv=conv)

    # Outside of jit, too: only a program that is lowered knows its platform.
    operation.def_impl(lambda *args, conv: compiled(conv)(*args))
    operation.def_abstract_eval(typed)
    batching.primitive_batchers[operation] = batched
    mlir.register_lowering(operation, mlir.lower_fun(function, multiple_results=False))
    mlir.register_lowering(operation, lower_on_cpu, platform="cpu")
    return operation


def _on_cpu(ctx: Any, name: str, conv: Conv, function: Any, otherwise: Any) -> Any:
    """Chooses how a program for a CPU computes an operation."""
    module = ctx.module_context
    # Of a program that each device has for itself, in `pmap` and `shard_map`, there is no number.
    devices = getattr(module.axis_context, "num_devices", None)
    # In an export sizes may be symbols.
    fixed = all(isinstance(size, int) for aval in ctx.avals_in for size in aval.shape)
    # Where the compiler partitions the program, it would gather the batch for a loop or a call.
    if not fixed or (devices or 1) > 1:
        return function
    # An export outlives this process, and the kernel is of this machine.
    exported = getattr(module.lowering_parameters, "for_export", False)
    kernel = None if exported else kernel_for(name, conv, ctx.avals_in)
    return otherwise if kernel is None else functools.partial(kernel, alone=devices is None)


_convolution = _bilinear("fast_convolution", plain, plain)
_image_gradient = _bilinear("image_gradient", plain_image_gradient, plain_image_gradient)
_kernel_gradient = _bilinear("kernel_gradient", plain_kernel_gradient, kernel_gradient_by_dots)


def _gradient_in(x: Any, w: jax.Array, g: jax.Array, conv: Conv) -> jax.Array:
    """The gradient in an image of the type of x."""
    if not x.sharding.mesh.explicit_axes:
        return _image_gradient.bind(g, w, conv=conv)
    # On an explicit mesh it lies as the image does.
    return jax.linear_transpose(lambda x: plain(x, w, conv=conv), x)(g)[0]


def convolve_nhwc(
    x: jax.Array, w: jax.Array, padding: Sequence[tuple[int, int]], strides: Sequence[int]
) -> jax.Array:
    """Convolves x [N, H, W, C] with w [I, J, C, D], on a CPU by the kernel where it fits."""
    dims = jax.lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))
    conv = Conv(tuple(strides), tuple(padding), (1, 1), dims, None, x.shape, w.shape)
    return _convolution.bind(x, w, conv=conv)


# Each of the three is a transpose of the two others, in its first operand and in its second.
ad.defbilinear(
    _convolution,
    lambda g, x, w, conv: _gradient_in(x.aval, w, g, conv),
    lambda g, x, w, conv: _kernel_gradient.bind(x, g, conv=conv),
)
ad.defbilinear(
    _image_gradient,
    lambda dx, g, w, conv: _convolution.bind(dx, w, conv=conv),
    lambda dx, g, w, conv: _kernel_gradient.bind(dx, g, conv=conv),
)
ad.defbilinear(
    _kernel_gradient,
    lambda dw, x, g, conv: _gradient_in(x.aval, dw, g, conv),
    lambda dw, x, g, conv: _convolution.bind(x, dw, conv=conv),
)
