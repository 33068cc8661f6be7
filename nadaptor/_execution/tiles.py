"""Simulation of a batch in tiles: examples that are independent, a few at a time.

On a CPU the spikes of a few examples and steps stay in the cache between one operation and the
next, and those of a whole batch do not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Of the largest layer's float32 values in one evaluation: about the cache of one core.
CACHE_BYTES = 4 * 2**20
SHARED: Any = "shared"
MOST_TOGETHER, MOST_STEPS = 16, 4  # measured with ResNet-18 and ResNet-20 at 32 pixels


def choose_sizes(
    shapes: Sequence[tuple[int, ...]], number: int, num_steps: int, backend: str
) -> tuple[int, int]:
    """Chooses examples a tile and steps a chunk by the size of the largest layer.

    Args:
        shapes: shape of each layer with all examples.
        number: number of examples.
        num_steps: T.
        backend: of `jax.default_backend`: off the CPU, large kernels are better.

    Returns:
        The pair, each at least 1.

    Example:
        >>> choose_sizes([(32, 32, 32, 64)], number=32, num_steps=16, backend="cpu")
        (4, 4)
    """
    if backend != "cpu" or not isinstance(number, int):  # a number may be a symbol in an export
        return number, 1
    # Bytes of one example's largest layer.
    largest = max(1, 4 * max(map(math.prod, shapes)) // max(1, number))
    together = max(1, CACHE_BYTES // largest)
    # Steps first: those of one example share the weights and the neuron's state.
    steps = min(num_steps, MOST_STEPS, together)
    return max(1, min(number, min(MOST_TOGETHER, together) // steps)), steps


def in_tiles(
    start: Callable[..., Callable[..., Any]],
    args: tuple[Any, ...],
    axes: Sequence[int | None],
    number: int,
    size: int,
    out_axes: Callable[[], Any],
) -> Any:
    """Runs equal tiles of the batch one after the other, then what is left over.

    Args:
        start: takes the arguments of a first tile, and returns what computes any tile of its size;
            what does not depend on the examples is computed once, in `start`.
        args: the arguments that hold all examples.
        axes: axis of the examples in each leaf of the arguments, or None.
        number: number of examples.
        size: examples per tile, less than `number`.
        out_axes: axis of the examples in the result, a prefix of its tree as in `jax.vmap`; SHARED
            for what is the same for all.

    Returns:
        The result for all examples.
    """
    leaves, tree = jax.tree.flatten(args)
    tiles, rest = divmod(number, size)

    def part(first: Any, length: int) -> Any:
        return tree.unflatten(slice_examples(leaves, axes, first, length))

    # The first tile is sliced twice: here only for what all tiles share.
    run = start(*part(0, size))
    parts = [jax.lax.map(lambda i: run(*part(i * size, size)), jnp.arange(tiles))]
    if rest:
        # A smaller tile is another network, traced and prepared by itself.
        last = part(tiles * size, rest)
        parts.append(start(*last)(*last))
    return jax.tree.map(_join, jax.tree.broadcast(out_axes(), parts[0]), *parts)


def _join(axis: Any, tiles: jax.Array, last: Any = None) -> jax.Array:
    """All examples along `axis`, from tiles [n, ...] and what is left over."""
    if axis == SHARED:
        return tiles[0]
    whole = merge_axes(jnp.moveaxis(tiles, 0, axis), axis)
    return whole if last is None else jnp.concatenate([whole, last], axis)


def slice_examples(
    leaves: Sequence[jax.Array], axes: Sequence[int | None], first: Any, length: int
) -> list[jax.Array]:
    """Some of the examples in each leaf that holds any, and the other leaves as they are."""
    return [
        x if axis is None else jax.lax.dynamic_slice_in_dim(x, first, length, axis)
        for x, axis in zip(leaves, axes, strict=True)
    ]


def batch_axis(part: tuple[int, ...], whole: tuple[int, ...]) -> Any:
    """The axis of a layer that grew with the examples: under `vmap` it may be any."""
    pairs = zip(part, whole, strict=True)
    return next((axis for axis, (some, all_) in enumerate(pairs) if some != all_), SHARED)


def example_axes(in_axes: Any, args: tuple[Any, ...]) -> tuple[list[int | None], int]:
    """The axis of the examples in each leaf of the arguments, or None, and their number."""
    if not isinstance(in_axes, Sequence):
        in_axes = [in_axes] * len(args)
    if len(in_axes) != len(args):
        raise ValueError(f"in_axes has {len(in_axes)} entries for {len(args)} arguments")
    # A None among the axes is an entry, a None among the arguments is an empty tree.
    marked = jax.tree.map(lambda a: SHARED if a is None else a, in_axes, is_leaf=_is_none)
    named = jax.tree.leaves([jax.tree.broadcast(a, x) for a, x in zip(marked, args, strict=True)])
    axes = [None if a == SHARED else a for a in named]
    shapes = [(jnp.shape(x), a) for x, a in zip(jax.tree.leaves(args), axes, strict=True)]
    for shape, axis in shapes:
        if axis is not None and not (isinstance(axis, int) and -len(shape) <= axis < len(shape)):
            raise ValueError(f"in_axes has {axis!r} for an argument of shape {shape}")
    sizes = {shape[axis] for shape, axis in shapes if axis is not None}
    if len(sizes) != 1:
        raise ValueError(f"in_axes={in_axes!r} must pick axes of one length, not {sorted(sizes)}")
    return axes, sizes.pop()


def check_example_outputs(shapes: Any, number: int) -> None:
    """Raises a ValueError unless all outputs of a function have the examples along axis 0."""
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        # Parts of anything else would be joined along a wrong axis, without a word.
        if x.ndim == 0 or x.shape[0] != number:
            name = " ".join(filter(None, ("output", jax.tree_util.keystr(path))))
            raise ValueError(
                f"{name} has shape {x.shape}, no {number} examples along axis 0; with in_axes a "
                "function has to return each example's result, its axis first: sum or average "
                "over the examples outside"
            )


def _is_none(x: Any) -> bool:
    return x is None


def merge_axes(x: jax.Array, axis: int) -> jax.Array:
    """Joins an axis and the next into one."""
    first, second = x.shape[axis : axis + 2]
    return x.reshape(*x.shape[:axis], first * second, *x.shape[axis + 2 :])
