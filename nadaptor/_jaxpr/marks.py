"""The mark of a quantized activation, and what all activations with one have in common.

An activation is `scale * q(v / scale)`, where `q` is a unary elementwise function of
`x = v / scale` kept inside a *mark*: a `jax.jit` with a reserved name that holds the neuron's
levels and start potential. The mark changes no value. It survives grad, vmap, remat and jit, and
`nadaptor.spiking` finds it in the traced function and puts a neuron in its place.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nadaptor._checks import check_floating, check_positive, check_scale
from nadaptor._execution.placement import shard_like, vary_like

# Bound once: what replaces `jax.jit` for a while, to debug, would leave marks that are none.
_jit = jax.jit
_MARK = re.compile(r"nadaptor_spike\[levels=(\d+),start=([^\]]+)\]")


class Mark(NamedTuple):
    """What a marked activation tells the transformation: the neuron that replaces it."""

    levels: int
    start: float


class Activation(NamedTuple):
    """One activation as a function of x = v / scale; hashable, so that its mark is traced once.

    `forward(x, key)` gives q and the one array kept for the backward pass; `slopes(residual)` the
    pair (dy/dv, dy/dscale).
    """

    mark: Mark
    forward: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]
    slopes: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def read_mark(name: str) -> Mark | None:
    """Returns the neuron written in the name of a `jit` equation, or None for any other name."""
    found = _MARK.fullmatch(name)
    return Mark(int(found[1]), float(found[2])) if found else None


def apply_activation(
    activation: Activation,
    v: ArrayLike,
    scale: ArrayLike,
    key: Any = None,
    gradient_scale: float = 1.0,
    name: str = "scale",
) -> jax.Array:
    """Returns `scale * q(v / scale)` with the activation's own gradients, arguments checked."""
    v = check_floating(v, "v")
    scale = check_scale(check_positive(scale, name), v.shape, name)
    # Inside shard_map a gradient has the varying axes of its argument: those of both.
    v, scale = vary_like(v, scale), vary_like(scale, v)
    return _scaled(activation, v, _scale_gradient(scale, gradient_scale), key)


def encode(below: jax.Array, above: jax.Array, inside: jax.Array) -> jax.Array:
    """One array for the backward pass: dy/dscale inside, the least number below, the largest above.

    No infinity: `jax_debug_infs` takes one for a fault.
    """
    largest = jnp.finfo(inside.dtype).max
    return jnp.where(below, -largest, jnp.where(above, largest, inside))


@functools.lru_cache(maxsize=None)
def decode(levels: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The slopes of an `encode`d residual: dy/dv is 1 inside, dy/dscale is `levels` above."""

    def slopes(residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        largest = jnp.finfo(residual.dtype).max
        inside = jnp.where(residual == -largest, 0, residual)
        dscale = jnp.where(residual == largest, levels, inside)
        return jnp.abs(residual) < largest, dscale

    return slopes


# The key is an ordinary argument, and its cotangent None: in nondiff_argnums it would leak tracers
# under jit, pmap, scan and remat.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled(activation: Activation, v: jax.Array, scale: jax.Array, key: Any) -> jax.Array:
    # In float32 up to the product, which is rounded once to the type of v.
    q = _marked(activation)(_in_units(v, scale), key)
    return (q * scale).astype(v.dtype)


def _scaled_fwd(activation, v, scale, key):
    # Without the mark, whose body has no residual: what is differentiated is not converted.
    q, residual = activation.forward(_in_units(v, scale), key)
    return (q * scale).astype(v.dtype), (_narrowed(residual, v.dtype), scale)


def _narrowed(residual: jax.Array, dtype: Any) -> jax.Array:
    """The residual in the dtype of v, the largest number of the one as that of the other."""
    largest = jnp.finfo(dtype).max
    # Cast as they are, the markers of `encode` would be infinities, which `decode` does not know.
    if largest < jnp.finfo(residual.dtype).max:
        bound = jnp.asarray(largest, residual.dtype)
        residual = jnp.clip(residual, -bound, bound)
    return residual.astype(dtype)


def _scaled_bwd(activation, saved, g):
    residual, scale = saved
    dv, dscale = activation.slopes(residual)
    # The sum is over a whole layer: in half precision it would lose its small terms.
    wide = jnp.promote_types(g.dtype, jnp.float32)
    grad_scale = _sum_to_shape(g.astype(wide) * dscale.astype(wide), scale.shape)
    # On an explicit mesh the sum lies as v does.
    grad_scale = shard_like(grad_scale.astype(scale.dtype), jax.typeof(scale))
    return g * dv.astype(g.dtype), grad_scale, None


_scaled.defvjp(_scaled_fwd, _scaled_bwd)


@jax.custom_vjp
def _scale_gradient(scale: jax.Array, factor: float) -> jax.Array:
    return scale


# For the factor's own gradient nobody asks: it is 0.
_scale_gradient.defvjp(
    lambda scale, factor: (scale, factor),
    lambda factor, g: ((g * factor).astype(g.dtype), jnp.zeros_like(factor)),
)


@functools.lru_cache(maxsize=None)
def _marked(activation: Activation) -> Callable[[jax.Array, Any], jax.Array]:
    def forward(x: jax.Array, key: Any) -> jax.Array:
        return activation.forward(x, key)[0]

    levels, start = activation.mark
    # By repr, so that `read_mark` reads the same float back.
    forward.__name__ = forward.__qualname__ = f"nadaptor_spike[levels={levels},start={start!r}]"
    return _jit(forward)


def _in_units(v: jax.Array, scale: jax.Array) -> jax.Array:
    """v / scale, at least in float32: half precision would move values across a rounding edge.

    By the reciprocal, as XLA does it in some programs and not in others: the quantized and the
    spiking network would else differ beside a tie.
    """
    wide = jnp.promote_types(v.dtype, jnp.float32)
    return v.astype(wide) * (1 / scale.astype(wide))


def _sum_to_shape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the axes along which `shape` was broadcast."""
    lead = x.ndim - len(shape)
    axes = [i for i in range(x.ndim) if i < lead or (shape[i - lead] == 1 and x.shape[i] != 1)]
    return x.sum(axes).reshape(shape)
