"""Batches for the devices: made by Grain in threads or processes, ahead of their use.

A batch is a pure function of (seed, step). Which images are in it, in which order, and how each is
cropped come from counters, not from a generator that remembers: so a run resumes at any step, and
neither the number of threads nor of processes changes a pixel. What runs on the device, from
`augment_batch` on, takes its randomness from a key of the step and the example's place.

The order is our own (`registry.batch_indices`), because its bits are fixed for every version of
NumPy, and Grain's are fixed for one version of Grain only: snapshots outlive versions.
"""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nadaptor._checks import check_count
from nadaptor.data.augmentation import Augmentation
from nadaptor.data.crops import NUM_DRAWS, evaluation_image, training_image
from nadaptor.data.registry import batch_indices, steps_per_epoch
from nadaptor.data.source import Source, Split, normalize_array

T = TypeVar("T")
# A thread makes a whole batch: so many bytes of them may be under way in a process.
BYTES_AHEAD = 2**31


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
    num_workers: int = 0,
) -> Generator[Batch, None, None]:
    """Yields the training batches from one step to another.

    Args:
        source: the training images.
        augmentation: its part for the host is done here, "random_resized_crop" that is; the rest is
            left to `augment_batch`.
        seed: of the order and of the crops.
        batch_size: images per step, over all processes.
        start_step: number of the first step.
        stop_step: number after the last; None for no end.
        process_index: which part of each batch to yield: the processes' parts in their order make
            the batch.
        process_count: parts.
        num_threads: that decode; None for one per core, and one in each worker.
        num_workers: processes that decode, for a host with more cores than one interpreter can
            feed; 0 for threads of this process only.

    Yields:
        Batches. Close the iterator to end the threads and the workers.

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
    # For what it raises, before any thread is started.
    steps_per_epoch(source.size, batch_size)
    crops = augmentation == "random_resized_crop"

    def make(step: int) -> Batch:
        indices = batch_indices(source.size, seed, step, batch_size)[part]
        # By the place in the whole batch: an image's crop is the same for any number of processes.
        draws = _draws(seed, step, np.arange(batch_size)[part]) if crops else None
        return _make_batch(source, step, indices, draws, len(indices))

    steps = range(start_step, sys.maxsize if stop_step is None else stop_step)
    size = _batch_bytes(source, len(range(batch_size)[part]))
    return _ahead(make, steps, size, num_threads, num_workers)


def evaluation_batches(
    source: Source,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> Generator[Batch, None, None]:
    """Yields every image of a split once, in its order, in batches of one size.

    Args:
        source: the split.
        batch_size: images per batch, over all processes; the last is filled up with label -1.
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
    size = len(range(batch_size)[part])

    def make(step: int) -> Batch:
        indices = np.arange(step * batch_size, (step + 1) * batch_size)[part]
        # A part may be padding alone: a process without a batch would leave the others waiting.
        return _make_batch(source, step, indices[indices < source.size], None, size)

    steps = range(-(-source.size // batch_size))
    return _ahead(make, steps, _batch_bytes(source, size), num_threads, 0)


def load_images(source: Source) -> Split:
    """Loads a source whole, normalised: for a calibration batch, after a limit on its size.

    Returns:
        Images [N, H, W, C] in float32 and labels [N], in the source's order.

    Raises:
        ValueError: a file is damaged; the message names it.

    Example:
        >>> from nadaptor.data.registry import open_source
        >>> load_images(open_source("digits", "validation", 150)).images.shape
        (150, 8, 8, 1)
    """
    images = np.empty((source.size, *source.spec.image_shape), np.float32)
    labels = np.empty(source.size, np.int32)
    with contextlib.closing(evaluation_batches(source, 32)) as stream:
        for batch in stream:
            place = slice(batch.step * 32, min((batch.step + 1) * 32, source.size))
            count = place.stop - place.start
            images[place] = normalize_array(batch.images[:count], source.spec)
            labels[place] = batch.labels[:count]
    return Split(images, labels)


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
    # The upper 53 of 64 bits: so many a float64 holds.
    return (np.stack([stream.random_raw(NUM_DRAWS) for stream in streams]) >> 11) * 2.0**-53


def _make_batch(
    source: Source, step: int, indices: np.ndarray, draws: np.ndarray | None, size: int
) -> Batch:
    """Reads the examples of a batch: cropped at random where there are draws, else whole."""
    shape = source.spec.image_shape
    batch = Batch(step, np.zeros((size, *shape), np.uint8), np.full(size, -1, np.int32))
    if source.resident and draws is None:
        batch.images[: len(indices)] = source.resident.images[indices]
        batch.labels[: len(indices)] = source.resident.labels[indices]
        return batch
    for place, index in enumerate(indices):
        example = source.read(int(index))
        batch.labels[place] = example.label
        batch.images[place] = (
            evaluation_image(example, shape)
            if draws is None
            else training_image(example, shape[0], draws[place])
        )
    return batch


def _batch_bytes(source: Source, size: int) -> int:
    return size * int(np.prod(source.spec.image_shape))


def _ahead(
    make: Callable[[int], Batch],
    steps: range,
    batch_bytes: int,
    num_threads: int | None,
    num_workers: int,
) -> Generator[Batch, None, None]:
    """Yields the batches of some steps in their order, made by Grain ahead of their use."""
    import grain

    cores = os.cpu_count() or 1
    given = (1 if num_workers else cores) if num_threads is None else num_threads
    threads = check_count(given, "num_threads")
    threads = max(1, min(threads, BYTES_AHEAD // (2 * batch_bytes)))
    made = grain.MapDataset.range(steps.start, steps.stop).map(make)
    # One buffered batch per thread, beside the one that the thread makes.
    stream: Any = made.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads))
    if num_workers:
        _mark_flags_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers))
    return _closing(iter(stream))


def _closing(items: Any) -> Generator[Batch, None, None]:
    try:
        yield from items
    finally:
        items.close()


def _mark_flags_as_parsed() -> None:
    """Grain's workers read a flag of absl's, and absl expects a main function of its own."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
