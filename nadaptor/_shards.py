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

from nadaptor._tiles import batch_axis, cut

AXIS = "examples"


def in_shards(
    run: Callable[..., Any],
    shapes: Callable[..., Sequence[tuple[int, ...]]],
    args: tuple[Any, ...],
    axes: Sequence[int | None],
    number: int,
    devices: Sequence[Any],
) -> tuple[Any, tuple[jax.Array, ...], jax.Array]:
    """Runs an equal part of the examples on each device.

    Args:
        run: simulates the examples in its arguments.
        shapes: the shape of each layer for given arguments.
        args: the arguments that hold all examples.
        axes: axis of the examples in each leaf of the arguments, or None.
        number: number of examples.
        devices: where to run.

    Returns:
        The three fields of a `Simulation`.

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
        _spec(None if axis is None else axis % jnp.ndim(x))
        for x, axis in zip(leaves, axes, strict=True)
    )
    part = tree.unflatten(cut(leaves, axes, 0, number // len(devices)))
    counts = tuple(
        _spec(batch_axis(*pair)) for pair in zip(shapes(*part), shapes(*args), strict=True)
    )

    def run_part(*leaves: jax.Array) -> tuple[Any, Any, jax.Array]:
        sim = run(*tree.unflatten(leaves))
        return sim.outputs, sim.spike_counts, jnp.int32(sim.total_steps)

    mesh = Mesh(np.array(devices), (AXIS,))
    out_specs = (PartitionSpec(None, AXIS), counts, PartitionSpec())
    # Unchecked: a layer without an example's axis is the same everywhere, which cannot be inferred.
    sharded = jax.shard_map(
        run_part, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
    )
    return sharded(*leaves)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
