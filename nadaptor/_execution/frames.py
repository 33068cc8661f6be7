"""Arguments that vary over time: a frame for each step, along a leading axis.

What depends on frames alone is evaluated a step at a time, and enters the first neurons as their
current. The frames are among what is prepared, and each step takes its own by its number.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

OverTime = int | tuple[int, ...]


def first_frames(args: tuple[Any, ...], over_time: OverTime) -> tuple[Any, list[bool]]:
    """Returns the arguments of one step, and says of each leaf whether it has frames.

    Args:
        args: the arguments, those with frames with a leading axis of time.
        over_time: which have frames.

    Raises:
        ValueError: there is no such argument, or a leaf of it has no leading axis.
    """
    chosen = _chosen(over_time, len(args))
    for i in sorted(chosen):
        for leaf in jax.tree.leaves(args[i]):
            if not jnp.ndim(leaf) or not jnp.shape(leaf)[0]:
                raise ValueError(
                    f"over_time names argument {i}, and a leaf of it has the shape "
                    f"{jnp.shape(leaf)}; give it a leading axis with a frame for each step"
                )
    frames = [i in chosen for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    # Types only: the network is traced for one step, and each step is given its frame.
    step = [
        jax.tree.map(lambda x: jax.eval_shape(lambda x: x[0], x), arg) if i in chosen else arg
        for i, arg in enumerate(args)
    ]
    return tuple(step), frames


def check_frames(
    args: tuple[Any, ...], over_time: OverTime, num_steps: int, correction: Any
) -> None:
    """Raises a ValueError unless there is a frame for each step, and for each of a correction."""
    for i in sorted(_chosen(over_time, len(args))):
        for leaf in jax.tree.leaves(args[i]):
            # A leaf without an axis is refused by `first_frames`, which says more of it.
            if jnp.ndim(leaf) and jnp.shape(leaf)[0] != num_steps:
                raise ValueError(
                    f"argument {i} has {jnp.shape(leaf)[0]} frames and num_steps is {num_steps}; "
                    "over_time takes one frame for each step"
                )
        if correction is not None and correction.num_steps > num_steps:
            raise ValueError(
                f"{correction} spends {correction.num_steps} steps and there are {num_steps} "
                "frames, which it reads first; give it fewer steps"
            )


def axes_with_time(in_axes: Any, over_time: OverTime, number: int) -> Any:
    """`in_axes`, which count without the axis of time, counted with it."""
    chosen = _chosen(over_time, number)
    if in_axes is None or not chosen:
        return in_axes
    axes = in_axes if isinstance(in_axes, Sequence) else [in_axes] * number
    return [
        # From the end an axis has the same number with one more in front.
        jax.tree.map(lambda a: a if a < 0 else a + 1, axis) if i in chosen else axis
        for i, axis in enumerate(axes)
    ]


def frame_at(frames: jax.Array, t: jax.Array) -> jax.Array:
    """The frame of step t, or the [K] frames of several; t counts from 1, in float32.

    Steps that a last chunk runs beyond the last frame get it again, and are not looked at.
    """
    return jnp.take(frames, t.astype(jnp.int32) - 1, axis=0, mode="clip")


def _chosen(over_time: OverTime, number: int) -> set[int]:
    numbers = (over_time,) if isinstance(over_time, int) else over_time
    for n in numbers:
        if not -number <= n < number:
            raise ValueError(f"over_time names argument {n}, but there are {number}")
    return {n % number for n in numbers}
