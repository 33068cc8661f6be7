"""How a run's steps get their images: batches from the host, or the data set on the devices.

Both give the same steps: the same images in the same order, the same augmentation and noise. A
data set that lies on the devices, as uint8, spares the host between two snapshots: all steps until
then run as one compiled loop, and the host sends nothing but the numbers of the images.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor.data.loader import Batch, batches, part_of, prefetch, step_indices
from nadaptor.parallel import STEP, place_step
from nadaptor.training.run import Run
from nadaptor.training.step import build_step

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
    with contextlib.closing(_stream(run, start_step)) as stream:
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
    placed = place_step(_step(run), run.devices, run.config.step.parallel, STEP)
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
    config, devices, size = run.config, run.devices, run.images.size
    placed = place_step(_looped(_step(run)), devices, config.step.parallel, RESIDENT)
    key = placed.replicate(run.keys.steps)
    images, labels = (placed.replicate(x[:size]) for x in run.images.resident or ())
    part = part_of(config.step.batch_size, devices.process_index, devices.process_count)
    lengths = run.epoch_steps, run.options.snapshot_steps or run.epoch_steps

    def advance(state: Any, steps: range) -> tuple[Any, Any]:
        chosen = step_indices(size, config.seed, steps, config.step.batch_size)[:, part]
        padding = ((0, min(lengths) - len(steps)), (0, 0))
        indices = placed.put(np.ascontiguousarray(np.pad(chosen, padding).T))
        count = placed.replicate(np.int32(len(steps)))
        return placed.step(state, indices, images, labels, count, key)

    return Feed(cut(start_step, run.total_steps, *lengths), advance, placed.replicate)


def _stream(run: Run, start_step: int) -> Generator[Batch, None, None]:
    """This process's part of the batches that are still to come."""
    config, devices = run.config, run.devices
    return batches(
        run.images,
        config.step.augmentation,
        config.seed,
        config.step.batch_size,
        start_step=start_step,
        process_index=devices.process_index,
        process_count=devices.process_count,
    )


def _step(run: Run) -> Callable[..., tuple[Any, Any]]:
    return build_step(run.config, run.images.spec, run.total_steps, run.devices.axis_name)


# Cached, for jit to know the program again.
@functools.cache
def _looped(step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    return functools.partial(resident_steps, step)
