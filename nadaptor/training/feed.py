"""How a run's steps get their images: batches from the host, or the data set on the devices.

Both give the same steps: the same images in the same order, the same augmentation and noise. A
data set that lies on the devices, as uint8, spares the host between two snapshots: all steps until
then run as one compiled loop, and the host sends nothing but the numbers of the images.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor.data.loader import Batch, prefetch
from nadaptor.training.run import Run

# Of `resident_steps`, without its first argument: which arguments each device gets its part of.
RESIDENT = (False, True, False, False, False, False)


class Feed(NamedTuple):
    """The steps of a run that are still to come, on its devices."""

    spans: Iterator[range]  # their numbers, so many at a time
    # (state, a span) -> the new state and the metrics of its steps, on a leading axis where there
    # are several; to be called with every span in turn, the state a donation
    advance: Callable[[Any, range], tuple[Any, Any]]
    replicate: Callable[[Any], Any]  # a pytree, whole, to every device


@contextlib.contextmanager
def open_feed(run: Run, start_step: int) -> Iterator[Feed]:
    """Opens the steps of a run, and closes what they read from.

    Args:
        run: the run; `run.resident` says where its images lie.
        start_step: number of the first step.

    Yields:
        The feed.
    """
    if run.resident:
        yield _resident(run, start_step)
        return
    with contextlib.closing(run.batches(start_step)) as stream:
        yield _streamed(run, start_step, stream)


def resident_steps(
    step: Callable[..., tuple[Any, Any]],
    state: Any,
    indices: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    count: jax.Array,
    key: jax.Array,
) -> tuple[Any, Any]:
    """Runs steps on images that lie on the device, as one loop: to be jitted or mapped.

    One program serves any number of steps, so that a run that resumes in the middle of an epoch
    ends to the bit as one that does not. For accelerators: on CPU a backward convolution inside a
    loop is several times slower.

    Args:
        step: `(state, images, labels, key) -> (state, metrics)`, images as they are stored.
        state: before the first step; it counts them, for the keys.
        indices: [B, S], in a column which images make the batch of a step; this device's part.
        images: all training images, uint8.
        labels: of all images.
        count: steps to run, at most S: the first columns.
        key: typed PRNG key of the run.

    Returns:
        The state after the last step, and the metrics with a leading axis of S, 0 after the last.
    """

    def one(state: Any, i: jax.Array | int) -> tuple[Any, Any]:
        chosen = indices[:, i]
        return step(state, images[chosen], labels[chosen], key)

    def body(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, measured = one(carry[0], i)
        return state, jax.tree.map(lambda all, x: all.at[i].set(x), carry[1], measured)

    shapes = jax.eval_shape(one, state, 0)[1]
    rows = indices.shape[1]
    metrics = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), shapes)
    # Not a scan, which would fix the number of steps: a shorter span needs no program of its own.
    return jax.lax.fori_loop(0, count, body, (state, metrics))


def cut(start: int, total: int, *every: int) -> Iterator[range]:
    """Yields the steps from `start` to `total`, cut at all multiples of some numbers.

    Example:
        >>> list(cut(3, 12, 6, 4))
        [range(3, 4), range(4, 6), range(6, 8), range(8, 12)]
    """
    while start < total:
        end = min(total, *((start // n + 1) * n for n in every))
        yield range(start, end)
        start = end


def _streamed(run: Run, start_step: int, stream: Iterator[Batch]) -> Feed:
    """One step at a time, its batch from the host."""
    placed = run.placed
    key = placed.replicate(run.keys.steps)
    ready = prefetch(
        stream, lambda b: b._replace(images=placed.put(b.images), labels=placed.put(b.labels))
    )

    def advance(state: Any, _: range) -> tuple[Any, Any]:
        batch = next(ready)
        return placed.step(state, batch.images, batch.labels, key)

    return Feed(cut(start_step, run.total_steps, 1), advance, placed.replicate)


def _resident(run: Run, start_step: int) -> Feed:
    """All steps until the next snapshot as one program, its images on the devices."""
    placed = run.place(_looped(run.step), RESIDENT)
    key = placed.replicate(run.keys.steps)
    # A limit on the training images changes `size` alone: what is resident is the whole split.
    images, labels = (placed.replicate(x[: run.images.size]) for x in run.images.resident or ())
    lengths = run.epoch_steps, run.options.snapshot_steps or run.epoch_steps

    def advance(state: Any, steps: range) -> tuple[Any, Any]:
        # All spans have one shape, and `count` says where the padding begins.
        padding = ((0, min(lengths) - len(steps)), (0, 0))
        # Devices take their parts along the leading axis, and so that is the one of the batch.
        indices = placed.put(np.ascontiguousarray(np.pad(run.indices(steps), padding).T))
        count = placed.replicate(np.int32(len(steps)))
        return placed.step(state, indices, images, labels, count, key)

    return Feed(cut(start_step, run.total_steps, *lengths), advance, placed.replicate)


# Cached, for jit to know the program again.
@functools.cache
def _looped(step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    return functools.partial(resident_steps, step)
