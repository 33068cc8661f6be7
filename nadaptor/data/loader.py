"""Batches for the devices: decoded in threads, ahead of the step that needs them.

A batch is a pure function of (seed, step). Which images are in it, in which order, and how each is
cropped come from counters, not from a generator that remembers: so a run resumes at any step, and
neither the number of threads nor of processes changes a pixel. What runs on the device, from
`prepare_batch` on, takes its randomness from a key of the step and the example's place.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from nadaptor.data.augmentation import Augmentation
from nadaptor.data.crops import NUM_DRAWS, evaluation_image, training_image
from nadaptor.data.registry import batch_indices, steps_per_epoch
from nadaptor.data.source import Source

T = TypeVar("T")
# Batches that are decoded ahead of the one in use.
LOOK_AHEAD = 3


class Batch(NamedTuple):
    """This process's part of the batch of one step."""

    step: int
    images: np.ndarray  # [B / process_count, H, W, C] uint8, neither normalised nor all augmented
    labels: np.ndarray  # [B / process_count] int32; -1 for the padding of an evaluation


def batches(
    source: Source,
    augmentation: Augmentation,
    seed: int,
    batch_size: int,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> Generator[Batch, None, None]:
    """Yields the training batches from one step to another.

    Args:
        source: the training images.
        augmentation: its part for the host is done here, "random_resized_crop" that is; the rest is
            left to `prepare_batch`.
        seed: of the order and of the crops.
        batch_size: images a step, over all processes.
        start_step: number of the first step.
        stop_step: number after the last; None for no end.
        process_index: which part of each batch to yield: the processes' parts in their order make
            the batch.
        process_count: parts.
        num_threads: that decode; None for one a core.

    Yields:
        Batches. Close the iterator to end the threads.

    Raises:
        ValueError: there are fewer images than one batch holds, the batch does not divide among the
            processes, or a file is damaged; the message names it.

    Example:
        >>> from nadaptor.data.registry import open_source
        >>> source = open_source("digits", "train", 150)
        >>> batch = next(batches(source, "none", seed=0, batch_size=64, start_step=7))
        >>> batch.step, batch.images.shape
        (7, (64, 8, 8, 1))
    """
    part = part_of(batch_size, process_index, process_count)
    steps_per_epoch(source.size, batch_size)

    def tasks() -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
        for step in steps:
            indices = batch_indices(source.size, seed, step, batch_size)[part]
            places = np.arange(batch_size)[part]
            crops = augmentation == "random_resized_crop"
            yield step, indices, _draws(seed, step, places) if crops else None

    return _load_ahead(source, tasks(), len(range(batch_size)[part]), num_threads)


def evaluation_batches(
    source: Source,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Yields every image of a split once, in its order, in batches of one size.

    Args:
        source: the split.
        batch_size: images a batch, over all processes; the last is filled up with label -1.
        process_index: as in `batches`.
        process_count: as in `batches`; every process gets the same number of batches.
        num_threads: as in `batches`.

    Yields:
        Batches; `step` is the number of the batch.

    Raises:
        ValueError: the batch does not divide among the processes, or a file is damaged.

    Example:
        >>> from nadaptor.data.registry import open_source
        >>> source = open_source("digits", "validation", 150)
        >>> [int((batch.labels >= 0).sum()) for batch in evaluation_batches(source, 64)]
        [64, 64, 22]
    """
    part = part_of(batch_size, process_index, process_count)

    def tasks() -> Iterator[tuple[int, np.ndarray, None]]:
        for step in range(-(-source.size // batch_size)):
            indices = np.arange(step * batch_size, (step + 1) * batch_size)[part]
            yield step, indices[indices < source.size], None

    return _load_ahead(source, tasks(), len(range(batch_size)[part]), num_threads)


def part_of(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns which images of a batch a process reads.

    Raises:
        ValueError: the batch does not divide among the processes.
    """
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} does not divide among {process_count} processes; "
            f"choose a multiple of {process_count}"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def step_indices(size: int, seed: int, steps: range, batch_size: int) -> np.ndarray:
    """Returns which examples make the batches of some steps: those that `batches` reads.

    Args:
        size: training images.
        seed: of the order.
        steps: their numbers.
        batch_size: images a step.

    Returns:
        [steps, batch_size] int32.

    Raises:
        ValueError: there are fewer images than one batch holds.

    Example:
        >>> step_indices(8, 0, range(3, 5), 2).shape
        (2, 2)
    """
    chosen = [batch_indices(size, seed, step, batch_size) for step in steps]
    return np.stack(chosen).astype(np.int32)


def prefetch(items: Iterator[T], put: Callable[[T], T], depth: int = 2) -> Iterator[T]:
    """Yields `put(item)`, with `depth` of them under way: copies overlap with the steps.

    Args:
        items: such as `batches` yields.
        put: starts a copy to the devices, such as `jax.device_put`, and does not wait for it.
        depth: copies in device memory beside the one in use.

    Yields:
        The items in their order.

    Example:
        >>> list(prefetch(iter([1, 2, 3]), lambda x: 10 * x))
        [10, 20, 30]
    """
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(put(item))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def _draws(seed: int, step: int, places: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) for each place in a batch: [B, NUM_DRAWS]."""
    # The orders of the epochs count from [0, 0, 0, 0]; the 1 keeps the two apart.
    streams = [
        np.random.Philox(key=[seed, 0], counter=[0, 1, step, int(place)]) for place in places
    ]
    return (np.stack([stream.random_raw(NUM_DRAWS) for stream in streams]) >> 11) * 2.0**-53


def _load_ahead(
    source: Source,
    tasks: Iterator[tuple[int, np.ndarray, np.ndarray | None]],
    size: int,
    num_threads: int | None,
) -> Generator[Batch, None, None]:
    """Loads the batches of `tasks` in threads, `LOOK_AHEAD` of them at a time, in their order."""
    pool = ThreadPoolExecutor(num_threads or os.cpu_count(), thread_name_prefix="decode")
    waiting: deque[tuple[Batch, list[Future[None]]]] = deque()
    try:
        for task in tasks:
            waiting.append(_start(pool, source, task, size))
            if len(waiting) > LOOK_AHEAD:
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(
    pool: ThreadPoolExecutor,
    source: Source,
    task: tuple[int, np.ndarray, np.ndarray | None],
    size: int,
) -> tuple[Batch, list[Future[None]]]:
    step, indices, draws = task
    shape = source.spec.image_shape
    batch = Batch(step, np.zeros((size, *shape), np.uint8), np.full(size, -1, np.int32))
    if source.resident and draws is None:
        batch.images[: len(indices)] = source.resident.images[indices]
        batch.labels[: len(indices)] = source.resident.labels[indices]
        return batch, []

    def load(place: int) -> None:
        example = source.read(int(indices[place]))
        batch.labels[place] = example.label
        batch.images[place] = (
            evaluation_image(example, shape)
            if draws is None
            else training_image(example, shape[0], draws[place])
        )

    return batch, [pool.submit(load, place) for place in range(len(indices))]


def _finish(batch: Batch, loading: list[Future[None]]) -> Batch:
    for future in loading:
        future.result()
    return batch
