"""The data sets by name: what opens a split, and what loads a small one whole."""

import difflib
import functools
import os
from pathlib import Path

import numpy as np

from nadaptor._checks import check_name
from nadaptor.data import digits, synthetic
from nadaptor.data import image_folder as folder
from nadaptor.data import tfds as prepared
from nadaptor.data.config import DataConfig
from nadaptor.data.crops import evaluation_image
from nadaptor.data.source import PHOTOGRAPHS, Source, Spec, Split, SplitName, permutation

__all__ = [
    "Split",
    "SplitName",
    "batch_at",
    "get_spec",
    "load_source",
    "load_split",
    "open_source",
    "open_split",
    "resolve_data_dir",
    "steps_per_epoch",
]
IMAGE_SIZE = 224
NAMES = ("digits", "synthetic", "folder", *prepared.KNOWN)


def get_spec(dataset: str, data_dir: Path | None = None) -> Spec:
    """Returns the number of classes and the image shape of a data set; reads no image.

    Args:
        dataset: as for `open_source`.
        data_dir: as for `open_source`; not needed for digits, synthetic, cifar10, cifar100 and
            imagenet2012.

    Raises:
        ValueError: the data set is unknown, or not where it is looked for.

    Example:
        >>> get_spec("cifar100").num_classes, get_spec("imagenet2012").image_shape
        (100, (224, 224, 3))
    """
    known = {"digits": digits.SPEC, "synthetic": synthetic.SPEC, **prepared.KNOWN}
    if dataset in known:
        return known[dataset]
    root = resolve_data_dir(data_dir)
    if is_folder(dataset):
        return folder.folder_spec(dataset, root, IMAGE_SIZE)
    return prepared.prepared_spec(_check_dataset(dataset, root), root, IMAGE_SIZE)


def open_source(
    dataset: str,
    split: SplitName,
    validation_size: int,
    data_dir: Path | None = None,
    image_size: int | None = None,
) -> Source:
    """Opens one split of a data set.

    Args:
        dataset: "digits"; "synthetic"; "folder" for `train/CLASS/*.JPEG` in `data_dir`,
            "folder:NAME" in `data_dir/NAME`; or the name of a TFDS data set, such as "cifar10",
            "cifar10:3.0.2" or "imagenet2012", prepared as array_record.
        split: "train" (without the validation images), "validation", or "test": the set that the
            literature calls so, for ImageNet its 50000 validation images.
        validation_size: images held out of the training set.
        data_dir: where to look; a TFDS data set in `data_dir/tfds`, then in `data_dir`. None for
            the environment's NADAPTOR_DATA_DIR.
        image_size: pixels per side of photographs of many shapes; None for 224. Images that are
            all of one shape have their own size only.

    Returns:
        The source. Small images of one shape lie in memory, as uint8.

    Raises:
        ValueError: the data set is unknown, not where it is looked for, or damaged. The network
            is never used.

    Example:
        >>> open_source("digits", "validation", 150).size
        150
    """
    size = IMAGE_SIZE if image_size is None else image_size
    source = _open(dataset, split, validation_size, resolve_data_dir(data_dir), size)
    if image_size is not None and source.spec.image_shape[:2] != (image_size, image_size):
        shape = source.spec.image_shape
        raise ValueError(
            f"image_size must be left out, not {image_size}: the images of {dataset} are {shape}"
        )
    return source


def open_split(data: DataConfig, split: SplitName, data_dir: Path | None) -> Source:
    """Opens a split of a config's data set, with its normalisation, image and training size.

    Raises:
        ValueError: as `open_source`, or `train_size` is more than there is.
    """
    source = open_source(
        data.dataset, split, data.validation_size, data_dir, image_size=data.image_size
    )
    if data.normalization == "imagenet":
        mean, deviation = PHOTOGRAPHS
        source = source._replace(spec=source.spec._replace(mean=mean, deviation=deviation))
    if split != "train" or data.train_size is None:
        return source
    if data.train_size > source.size:
        raise ValueError(f"train_size {data.train_size} is more than the {source.size} there are")
    return source._replace(size=data.train_size)


def resolve_data_dir(data_dir: Path | None) -> Path | None:
    """Returns `data_dir`, or the environment's NADAPTOR_DATA_DIR, or None."""
    named = data_dir or os.environ.get("NADAPTOR_DATA_DIR")
    return Path(named).expanduser() if named else None


def is_folder(dataset: str) -> bool:
    """Whether the name is of an image folder."""
    return dataset.partition(":")[0] == "folder"


def load_split(
    dataset: str,
    split: SplitName,
    validation_size: int,
    data_dir: Path | None = None,
    limit: int | None = None,
) -> Split:
    """Loads one split whole, normalised: for data sets that fit in memory, or the first of others.

    Args:
        dataset: as for `open_source`.
        split: "train" (without the validation images), "validation" or "test".
        validation_size: images held out of the training set.
        data_dir: as for `open_source`.
        limit: images to load; None for all.

    Returns:
        Images in float32 and labels, in a fixed order.

    Raises:
        ValueError: as `open_source`.

    Example:
        >>> load_split("digits", "validation", 150).images.shape
        (150, 8, 8, 1)
    """
    return load_source(open_source(dataset, split, validation_size, data_dir), limit)


def load_source(source: Source, limit: int | None = None) -> Split:
    """Loads a source whole, or its first images, normalised; see `load_split`."""
    if source.resident:
        images, labels = (x[:limit] for x in source.resident)
    else:
        examples = [source.read(i) for i in range(min(source.size, limit or source.size))]
        images = np.stack([evaluation_image(e, source.spec.image_shape) for e in examples])
        labels = np.array([e.label for e in examples], np.int32)
    mean, deviation = (np.array(c, np.float32) for c in (source.spec.mean, source.spec.deviation))
    return Split((images - mean) / deviation, labels)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Returns the number of full batches in one pass; what is left over waits for another order.

    Raises:
        ValueError: there are fewer images than one batch holds.
    """
    if num_images < batch_size:
        raise ValueError(
            f"batch_size {batch_size} is more than the {num_images} training images; lower it"
        )
    return num_images // batch_size


def batch_indices(size: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Returns which examples make the batch of one training step, a pure function of its arguments.

    Every epoch goes through the images in a new order, and no state is carried between steps: a
    run that resumes at a step sees what it would have seen.

    Args:
        size: training images.
        seed: of the order.
        step: number of the step, from 0.
        batch_size: images a batch.

    Returns:
        `batch_size` indices.

    Raises:
        ValueError: there are fewer images than one batch holds.

    Example:
        >>> sorted([*batch_indices(4, 0, 0, 2), *batch_indices(4, 0, 1, 2)]) == [0, 1, 2, 3]
        True
    """
    epoch, index = divmod(step, steps_per_epoch(size, batch_size))
    return _order(size, seed, epoch)[index * batch_size : (index + 1) * batch_size]


def batch_at(split: Split, seed: int, step: int, batch_size: int) -> Split:
    """Returns the batch of one training step from images in memory; see `batch_indices`.

    Raises:
        ValueError: there are fewer images than one batch holds.
    """
    chosen = batch_indices(len(split.labels), seed, step, batch_size)
    return Split(split.images[chosen], split.labels[chosen])


_order = functools.lru_cache(maxsize=4)(permutation)


# The cache keeps a set of small images in memory once, however often it is asked for.
@functools.lru_cache(maxsize=4)
def _open(
    dataset: str, split: SplitName, validation_size: int, root: Path | None, image_size: int
) -> Source:
    if dataset == "digits":
        return digits.open_digits(split, validation_size)
    if dataset == "synthetic":
        return synthetic.open_synthetic(split, validation_size)
    if is_folder(dataset):
        return folder.open_folder(dataset, split, validation_size, root, image_size)
    name = _check_dataset(dataset, root)
    return prepared.open_prepared(name, split, validation_size, root, image_size)


def _check_dataset(dataset: str, root: Path | None) -> str:
    """Returns the name of a TFDS data set; one that is not prepared may be a slip."""
    if not prepared.find_prepared(dataset, root):
        known = dict.fromkeys(NAMES)
        if difflib.get_close_matches(name := dataset.partition(":")[0], known, cutoff=0.8):
            check_name(name, known, "dataset")
        raise ValueError(prepared.how_to_prepare(dataset, root))
    return dataset
