"""Data sets that TFDS has prepared as array_record, read with no TensorFlow and no network."""

import io
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nadaptor.data.source import (
    PHOTOGRAPHS,
    Example,
    Source,
    Spec,
    Split,
    SplitName,
    hold_out,
    resident_source,
)

# Mean and deviation of each channel over the training set, as shares of 255.
_STATISTICS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = MappingProxyType(
    {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "mnist": ((0.1307,), (0.3081,)),
    }
)
# TFDS has labels of -1 in imagenet2012's test split; everyone reports on the validation split.
_TEST_SPLITS: Mapping[str, str] = MappingProxyType({"imagenet2012": "validation"})
# More pixels than these are read when they are asked for: CIFAR is 154 MB.
RESIDENT_BYTES = 2**30


def _spec(name: str, num_classes: int, shape: tuple[int, int, int]) -> Spec:
    if name in _STATISTICS:
        return Spec(num_classes, shape, *(tuple(255 * x for x in c) for c in _STATISTICS[name]))
    if shape[-1] == 1:
        return Spec(num_classes, shape, (127.5,), (127.5,))
    return Spec(num_classes, shape, *PHOTOGRAPHS)


KNOWN: Mapping[str, Spec] = MappingProxyType(
    {
        "cifar10": _spec("cifar10", 10, (32, 32, 3)),
        "cifar100": _spec("cifar100", 100, (32, 32, 3)),
        "imagenet2012": _spec("imagenet2012", 1000, (224, 224, 3)),
    }
)


def find_prepared(dataset: str, data_dir: Path | None) -> Path | None:
    """Returns the folder of a prepared data set, of its latest version, or None.

    Args:
        dataset: "NAME", "NAME/CONFIG", or either with ":VERSION".
        data_dir: looked for in `data_dir/tfds`, then in `data_dir`; None for TFDS's own place.
    """
    name, _, version = dataset.partition(":")
    for root in _roots(data_dir):
        made = [path.parent for path in (root / name).glob("*/dataset_info.json")]
        made = [p for p in made if p.name.replace(".", "").isdigit() and version in ("", p.name)]
        if made:
            return max(made, key=lambda p: [int(part) for part in p.name.split(".")])
    return None


def how_to_prepare(dataset: str, data_dir: Path | None) -> str:
    """Returns the message for a data set that is not prepared: where it is not, and the command."""
    name = dataset.partition(":")[0]
    roots = _roots(data_dir)
    message = (
        f"no prepared data set {dataset!r} in {' or '.join(map(str, roots))}; with TensorFlow "
        f"installed, prepare it with: tfds build {name} --data_dir {roots[0]} "
        "--file_format array_record"
    )
    if data_dir and (data_dir / "train").is_dir():
        message += f"; or, for the image folder at {data_dir}, use --dataset folder"
    return message


def prepared_spec(dataset: str, data_dir: Path | None, image_size: int) -> Spec:
    """Returns the number of classes and image shape of a prepared data set; reads no image.

    Raises:
        ValueError: it is not prepared, or not of images with one label each.
    """
    builder = _builder(dataset, data_dir)
    image_key, label_key = _keys(dataset, builder.info.features)
    features = builder.info.features
    name = dataset.partition(":")[0]
    if name in KNOWN:
        return KNOWN[name]
    shape = features[image_key].shape
    if None in shape[:2]:
        shape = (image_size, image_size, 3)
    return _spec(name, features[label_key].num_classes, shape)


def open_prepared(
    dataset: str,
    split: SplitName,
    validation_size: int,
    data_dir: Path | None,
    image_size: int,
) -> Source:
    """Opens one split of a prepared data set.

    Args:
        dataset: its name; see `find_prepared`.
        split: "train", "validation", held out of the stored training set, or "test".
        validation_size: images held out.
        data_dir: where it lies; see `find_prepared`.
        image_size: pixels of each side of an image in a batch, where they are not all of one shape.

    Returns:
        The source; with its images in memory, where they are small.

    Raises:
        ValueError: it is not prepared as array_record, lacks the split, or is not of images with
            one label each.
    """
    import tensorflow_datasets as tfds

    builder = _builder(dataset, data_dir)
    info, spec = builder.info, prepared_spec(dataset, data_dir, image_size)
    image_key, label_key = _keys(dataset, info.features)
    stored = "train" if split != "test" else _test_split(dataset, info.splits)
    chosen = hold_out(info.splits[stored].num_examples, validation_size, split)
    records = builder.as_data_source(stored, decoders={image_key: tfds.decode.SkipDecoding()})

    def read(index: int) -> Example:
        record = records[int(chosen[index])]
        name = f"{dataset} {stored} {chosen[index]}"
        return Example(record[image_key], _check_label(record[label_key], name), name)

    identity = {
        "dataset": dataset,
        "split": split,
        "class_names": list(info.features[label_key].names or ()),
        "version": str(info.version),
        "num_stored": info.splits[stored].num_examples,
    }
    shape = info.features[image_key].shape
    if None in shape or len(chosen) * np.prod(shape) > RESIDENT_BYTES:
        return Source(spec, len(chosen), read, None, identity)
    images = _load_all(records, chosen, (image_key, label_key), shape)
    return resident_source(spec, images, identity)


def _roots(data_dir: Path | None) -> list[Path]:
    if data_dir:
        return [data_dir / "tfds", data_dir]
    return [Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()]


def _builder(dataset: str, data_dir: Path | None) -> Any:
    """Opens the files themselves: by name, TFDS would first ask the network what it knows."""
    path = find_prepared(dataset, data_dir)
    if path is None:
        raise ValueError(how_to_prepare(dataset, data_dir))
    stored = json.loads((path / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    if stored != "array_record":
        raise ValueError(
            f"{path} is stored as {stored}, which cannot be read at random; with TensorFlow "
            f"installed, convert it with: tfds convert_format --dataset_dir {path} "
            f"--out_file_format array_record --out_path {path}"
        )
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(path)


def _keys(dataset: str, features: Any) -> tuple[str, str]:
    """Names of the image and of the label in a record."""
    import tensorflow_datasets as tfds

    found = [
        [key for key, feature in features.items() if isinstance(feature, kind)]
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    ]
    if [len(keys) for keys in found] != [1, 1]:
        raise ValueError(
            f"{dataset} is not a data set of images with one label each; it holds "
            f"{', '.join(features)}"
        )
    return found[0][0], found[1][0]


def _test_split(dataset: str, splits: Iterable[str]) -> str:
    wanted = _TEST_SPLITS.get(dataset.partition(":")[0])
    names = [wanted] if wanted else ["test", "validation"]
    for name in names:
        if name in splits:
            return name
    raise ValueError(f"{dataset} has no split {' or '.join(names)}; it has {', '.join(splits)}")


def _check_label(label: Any, name: str) -> int:
    if label < 0:
        raise ValueError(f"{name} has no label; evaluate on another split")
    return int(label)


def _load_all(records: Any, chosen: np.ndarray, keys: tuple[str, str], shape: Any) -> Split:
    """Reads small images into memory, in the order of `chosen`."""
    from PIL import Image

    images, labels = np.empty((len(chosen), *shape), np.uint8), np.empty(len(chosen), np.int32)
    # Neighbours on disk are compressed together: read in their order, three times as fast.
    order = np.argsort(chosen)

    def load(places: np.ndarray) -> None:
        found = records.__getitems__([int(i) for i in chosen[places]])
        for place, record in zip(places, found, strict=True):
            image = Image.open(io.BytesIO(record[keys[0]]))
            images[place] = np.asarray(image).reshape(shape)
            labels[place] = _check_label(record[keys[1]], f"example {chosen[place]}")

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(load, np.array_split(order, -(-len(order) // 1000))):
            pass
    return Split(images, labels)
