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
    size, specs, part = number // len(devices), [], []
    for x, axis in zip(leaves, axes, strict=True):
        specs.append(_spec(None if axis is None else axis % jnp.ndim(x)))
        part.append(x if axis is None else jax.lax.slice_in_dim(x, 0, size, axis=axis))
    pairs = zip(shapes(*args), shapes(*tree.unflatten(part)), strict=True)
    counts = tuple(
        _spec(next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), None))
        for pair in pairs
    )

    def run_part(*leaves: jax.Array) -> tuple[Any, Any, jax.Array]:
        sim = run(*tree.unflatten(leaves))
        return sim.outputs, sim.spike_counts, jnp.int32(sim.total_steps)

    mesh = Mesh(np.array(devices), (AXIS,))
    out_specs = (PartitionSpec(None, AXIS), counts, PartitionSpec())
    # Unchecked: a layer without an example's axis is the same everywhere, which cannot be inferred.
    sharded = jax.shard_map(
        run_part, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False
    )
    return sharded(*leaves)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
