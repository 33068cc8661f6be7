"""Simulation of a batch over several devices: examples that are independent, a part on each.

On a CPU a device for each core is worth it, too: the operations on a few examples and steps are too
small for XLA to share one among cores, but a core can have examples of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from nadaptor._execution.tiles import SHARED, slice_examples

AXIS = "examples"


def in_shards(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    axes: Sequence[int | None],
    number: int,
    devices: Sequence[Any],
    out_axes: Callable[..., Any],
) -> Any:
    """Runs an equal part of the examples on each device.

    Args:
        run: computes the examples in its arguments.
        args: the arguments that hold all examples.
        axes: axis of the examples in each leaf of the arguments, or None.
        number: number of examples.
        devices: where to run.
        out_axes: from the arguments of one part, axis of the examples in the result; SHARED for
            what is the same for all.

    Returns:
        The result for all examples.

    Raises:
        ValueError: the examples do not divide by the devices.
    """
    if not devices or number % len(devices):
        raise ValueError(
            f"{number} examples do not divide by {len(devices)} devices; pass fewer devices or pad "
            "the batch"
        )
    leaves, tree = jax.tree.flatten(args)
    specs = tuple(
        _spec(SHARED if axis is None else axis % jnp.ndim(x))
        for x, axis in zip(leaves, axes, strict=True)
    )
    # Only its shapes count: they tell which axis of each result grows with the examples.
    part = tree.unflatten(slice_examples(leaves, axes, 0, number // len(devices)))
    # Unchecked: a layer without an example's axis is the same everywhere, which cannot be inferred.
    sharded = jax.shard_map(
        # `total_steps` may be a number of Python's, and shard_map returns arrays alone.
        lambda *leaves: jax.tree.map(jnp.asarray, run(*tree.unflatten(leaves))),
        mesh=Mesh(np.array(devices), (AXIS,)),
        in_specs=specs,
        out_specs=jax.tree.map(_spec, out_axes(*part)),
        check_vma=False,
    )
    return sharded(*leaves)


def _spec(axis: Any) -> PartitionSpec:
    return PartitionSpec() if axis == SHARED else PartitionSpec(*[None] * axis, AXIS)
