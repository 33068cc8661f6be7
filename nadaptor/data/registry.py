"""The data sets by name, and the one way to the images of a config: `open_split`."""

import difflib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nadaptor._checks import check_count, check_name
from nadaptor.data import digits, synthetic
from nadaptor.data import image_folder as folder
from nadaptor.data import tfds as prepared
from nadaptor.data.config import DataConfig
from nadaptor.data.crops import average_down
from nadaptor.data.source import (
    PHOTOGRAPHS,
    Source,
    Spec,
    Split,
    SplitName,
    check_identity,
    permutation,
    resident_source,
    sized_spec,
)

NAMES = ("digits", "synthetic", "folder", *prepared.KNOWN)


def open_split(
    data: DataConfig,
    split: SplitName,
    data_dir: Path | None = None,
    limit: int | None = None,
    known: Mapping[str, Any] | None = None,
) -> Source:
    """Opens a split as a config has it: with its image size, normalisation and training size.

    Args:
        data: the config's data fields.
        split: "train", "validation" or "test"; see `open_source`.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        limit: images to read, the first of the split; None for all. More than there are is all.
        known: what the card of a trained network says of its data, to be compared with what is
            stored now; None where there is no such card.

    Returns:
        The source; no image is read but those of small data sets.

    Raises:
        ValueError: as `open_source`; `train_size` is more than there is; or the classes or files
            are not those the network was trained on.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> open_split(get_config("digits_na").data, "test", limit=100).size
        100
    """
    source = open_source(data.dataset, split, data.validation_size, data_dir, data.image_size)
    check_identity(source, known or {})
    if data.normalization == "imagenet":
        if (channels := source.spec.image_shape[-1]) != 3:
            raise ValueError(
                f"normalization 'imagenet' is of three channels, and {data.dataset} has {channels};"
                " choose 'dataset'"
            )
        mean, std = PHOTOGRAPHS
        source = source._replace(spec=source.spec._replace(mean=mean, std=std))
    if split == "train" and data.train_size is not None:
        if data.train_size > source.size:
            raise ValueError(
                f"train_size {data.train_size} is more than the {source.size} there are"
            )
        # What is resident stays whole: only its first `size` images are meant.
        source = source._replace(size=data.train_size)
    if limit is not None:
        source = source._replace(size=min(source.size, check_count(limit, "num_images")))
    return source


def get_spec(dataset: str, data_dir: Path | None = None, image_size: int | None = None) -> Spec:
    """Returns the number of classes and the image shape of a data set; decodes no image.

    Args:
        dataset: as for `open_source`.
        data_dir: as for `open_source`; not needed for digits, synthetic, cifar10, cifar100 and
            imagenet2012.
        image_size: as for `open_source`.

    Raises:
        ValueError: the data set is unknown, or not where it is looked for.

    Example:
        >>> get_spec("cifar100").num_classes, get_spec("imagenet2012").image_shape
        (100, (224, 224, 3))
    """
    known = {"digits": digits.SPEC, "synthetic": synthetic.SPEC, **prepared.KNOWN}
    if dataset in known:
        spec = known[dataset]
        # Photographs are cropped to any size; images of one shape can only be averaged down.
        fixed = None if dataset in prepared.PHOTOGRAPHIC else spec.image_shape
        return sized_spec(spec, fixed, image_size)
    root = resolve_data_dir(data_dir)
    if is_folder(dataset):
        return folder.folder_spec(dataset, root, image_size)
    return prepared.prepared_spec(_check_dataset(dataset, root), root, image_size)


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
        image_size: pixels per side of an image in a batch: images that are all of one small shape
            are averaged down to it, photographs are cropped. None for their own shape, or 224.

    Returns:
        The source. Small images of one shape lie in memory, as uint8.

    Raises:
        ValueError: the data set is unknown, not where it is looked for, damaged, or of smaller
            images than `image_size`. The network is never used.

    Example:
        >>> open_source("digits", "validation", 150).size
        150
    """
    root = resolve_data_dir(data_dir)
    if is_folder(dataset):
        return folder.open_folder(dataset, split, validation_size, root, image_size)
    return _open(dataset, split, validation_size, root, image_size)


def resolve_data_dir(data_dir: Path | None) -> Path | None:
    """Returns `data_dir`, or the environment's NADAPTOR_DATA_DIR, or None."""
    named = data_dir or os.environ.get("NADAPTOR_DATA_DIR")
    return Path(named).expanduser() if named else None


def is_folder(dataset: str) -> bool:
    """Whether the name is of an image folder."""
    return dataset.partition(":")[0] == "folder"


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
        batch_size: images per batch.

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


# Without the cache each batch would sort all images; threads ahead are in the next epoch already.
_order = functools.lru_cache(maxsize=4)(permutation)


# The cache keeps a set of small images in memory once, however often it is asked for.
@functools.lru_cache(maxsize=4)
def _open(
    dataset: str,
    split: SplitName,
    validation_size: int,
    root: Path | None,
    image_size: int | None,
) -> Source:
    if dataset == "digits":
        return _averaged(digits.open_digits(split, validation_size), image_size)
    if dataset == "synthetic":
        return _averaged(synthetic.open_synthetic(split, validation_size), image_size)
    name = _check_dataset(dataset, root)
    return prepared.open_prepared(name, split, validation_size, root, image_size)


def _averaged(source: Source, image_size: int | None) -> Source:
    """A source in memory with its images averaged down."""
    spec = sized_spec(source.spec, source.spec.image_shape, image_size)
    if spec == source.spec or source.resident is None:
        return source
    images, labels = source.resident
    smaller = np.stack([average_down(image, spec.image_shape) for image in images])
    return resident_source(spec, Split(smaller, labels), source.identity)


def _check_dataset(dataset: str, root: Path | None) -> str:
    """Returns the name of a TFDS data set; one that is not prepared may be a slip."""
    if not prepared.find_prepared(dataset, root):
        known = dict.fromkeys(NAMES)
        if difflib.get_close_matches(name := dataset.partition(":")[0], known, cutoff=0.8):
            check_name(name, known, "dataset")
        raise ValueError(prepared.how_to_prepare(dataset, root))
    return dataset
