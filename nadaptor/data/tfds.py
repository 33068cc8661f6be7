"""Data sets that TFDS has prepared as array_record, read with no TensorFlow and no network."""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nadaptor._files import read_small
from nadaptor.data.codec import decode
from nadaptor.data.crops import IMAGE_SIZE, average_down
from nadaptor.data.source import (
    PHOTOGRAPHS,
    Example,
    Source,
    Spec,
    Split,
    SplitName,
    hold_out,
    printable,
    resident_source,
    sized_spec,
)

# Mean and standard deviation of each channel over the training set, as fractions of 255. CIFAR-10's
# deviations are those that published recipes use, within an image; over all they are near 0.25.
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
        # A grey set that is not known is taken to -1 to 1.
        return Spec(num_classes, shape, (127.5,), (127.5,))
    return Spec(num_classes, shape, *PHOTOGRAPHS)


KNOWN: Mapping[str, Spec] = MappingProxyType(
    {
        "cifar10": _spec("cifar10", 10, (32, 32, 3)),
        "cifar100": _spec("cifar100", 100, (32, 32, 3)),
        "imagenet2012": _spec("imagenet2012", 1000, (224, 224, 3)),
    }
)


# Known ones whose images are of all sizes.
PHOTOGRAPHIC = ("imagenet2012",)


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
            # As numbers: 3.0.10 comes after 3.0.2.
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
        return f"{message}; or, for the image folder at {data_dir}, use --dataset folder"
    return (
        f"{message}; or take a folder of images, DIR/train/CLASS and DIR/val/CLASS, with --dataset "
        "folder --data-dir DIR"
    )


def prepared_spec(dataset: str, data_dir: Path | None, image_size: int | None) -> Spec:
    """Returns the number of classes and image shape of a prepared data set; reads no image.

    Raises:
        ValueError: it is not prepared, not of images with one label each, or its images are
            smaller than `image_size`.
    """
    features = _builder(dataset, data_dir).info.features
    image_key, label_key = _keys(dataset, features)
    name = dataset.partition(":")[0]
    shape = features[image_key].shape
    if name in KNOWN:
        return sized_spec(KNOWN[name], None if None in shape[:2] else shape, image_size)
    fixed = None if None in shape[:2] else shape
    spec = _spec(name, features[label_key].num_classes, fixed or (IMAGE_SIZE, IMAGE_SIZE, 3))
    return sized_spec(spec, fixed, image_size)


def open_prepared(
    dataset: str,
    split: SplitName,
    validation_size: int,
    data_dir: Path | None,
    image_size: int | None = None,
) -> Source:
    """Opens one split of a prepared data set.

    Args:
        dataset: its name; see `find_prepared`.
        split: "train", "validation", held out of the stored training set, or "test".
        validation_size: images held out.
        data_dir: where it lies; see `find_prepared`.
        image_size: pixels per side of an image in a batch: images that are all of one shape are
            averaged down to it, others cropped. None for their own shape, or 224.

    Returns:
        The source; with its images in memory, where they are small.

    Raises:
        ValueError: it is not prepared as array_record, lacks the split, is not of images with one
            label each, or its files hold another number of records than its info says.
    """
    import tensorflow_datasets as tfds

    builder = _builder(dataset, data_dir)
    info, spec = builder.info, prepared_spec(dataset, data_dir, image_size)
    image_key, label_key = _keys(dataset, info.features)
    stored = "train" if split != "test" else _test_split(dataset, info.splits)
    chosen = hold_out(info.splits[stored].num_examples, validation_size, split)
    _check_count(info.splits[stored], f"{dataset} {stored}")
    # Images come as bytes, for the decoder that the other data sets have.
    records = builder.as_data_source(stored, decoders={image_key: tfds.decode.SkipDecoding()})
    shape = info.features[image_key].shape
    fixed = None not in shape[:2]

    def read(index: int) -> Example:
        name = f"{dataset} {stored} {chosen[index]}"
        record = _read_records(records, [int(chosen[index])], name)[0]
        image = record[image_key]
        if fixed:
            image = average_down(_decode(image, shape, name), spec.image_shape)
        return Example(image, _check_label(record[label_key], name), name)

    identity = {
        "dataset": dataset,
        "split": split,
        "class_names": list(info.features[label_key].names or ()),
        "version": str(info.version),
        "num_stored": info.splits[stored].num_examples,
    }
    if not fixed or len(chosen) * np.prod(spec.image_shape) > RESIDENT_BYTES:
        return Source(spec, len(chosen), read, None, identity)
    images = _load_all(records, chosen, (image_key, label_key), shape, spec.image_shape)
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
    stored = _read_json(path / "dataset_info.json").get("fileFormat", "tfrecord")
    if stored != "array_record":
        raise ValueError(
            f"{path} is stored as {stored}, which cannot be read at random; with TensorFlow "
            f"installed, convert it with: tfds convert_format --dataset_dir {path} "
            f"--out_file_format array_record --out_path {path}"
        )
    _check_features(_read_json(path / "features.json"), path / "features.json")
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(path)
    # Whatever TFDS raises on files that it does not expect.
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {_first_line(error)}; {_PREPARE}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(path).decode())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {_PREPARE}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}; {_PREPARE}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object; {_PREPARE}")
    return found


def _check_features(found: Any, path: Path) -> None:
    """Refuses a feature of a class that is not TFDS's own: TFDS would import the class's module."""
    if isinstance(found, list):
        for item in found:
            _check_features(item, path)
    if not isinstance(found, dict):
        return
    for key, value in found.items():
        # A feature may have its description as JSON inside of JSON.
        if key == "json" and isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {_first_line(error)}; {_PREPARE}") from error
        named = key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str)
        if named and "." in value and not value.startswith("tensorflow_datasets."):
            raise ValueError(
                f"{path} names the feature class {printable(value)}, which is not one of TFDS's; "
                "only data sets of TFDS's own features are read"
            )
        _check_features(value, path)


def _check_count(split: Any, name: str) -> None:
    """Refuses files that hold another number of records than the info states."""
    from array_record.python.array_record_module import ArrayRecordReader

    count = 0
    for path in split.filepaths:
        try:
            count += ArrayRecordReader(str(path)).num_records()
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {_first_line(error)}; {_PREPARE}") from error
    if count != split.num_examples:
        raise ValueError(
            f"{name} holds {count} records, where its info says {split.num_examples}; {_PREPARE}"
        )


def _read_records(records: Any, indices: list[int], name: str) -> Any:
    try:
        return records.__getitems__(indices)
    # Whatever the reader and the parser raise on damaged bytes.
    except Exception as error:
        raise ValueError(f"{name} is damaged: {_first_line(error)}; {_PREPARE}") from error


def _decode(data: bytes, shape: tuple[int, ...], name: str) -> np.ndarray:
    """The pixels of an image file whose shape is known."""
    pixels = decode(data, name)
    if pixels.shape[:2] != shape[:2]:
        raise ValueError(
            f"{name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, where its info says "
            f"{shape[1]}x{shape[0]}; {_PREPARE}"
        )
    # Grey is decoded to three equal channels.
    return pixels[..., : shape[2]]


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0])


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
    if (channels := features[found[0][0]].shape[-1]) not in (1, 3):
        raise ValueError(f"{dataset} has images of {channels} channels; 1 or 3 can be read")
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


def _load_all(
    records: Any,
    chosen: np.ndarray,
    keys: tuple[str, str],
    stored: tuple[int, ...],
    shape: tuple[int, int, int],
) -> Split:
    """Reads small images into memory, in the order of `chosen`."""
    images, labels = np.empty((len(chosen), *shape), np.uint8), np.empty(len(chosen), np.int32)
    # Neighbours on disk are compressed together: read in their order, three times as fast.
    order = np.argsort(chosen)

    def load(places: np.ndarray) -> None:
        name = f"one of examples {chosen[places].min()} to {chosen[places].max()}"
        found = _read_records(records, [int(i) for i in chosen[places]], name)
        for place, record in zip(places, found, strict=True):
            name = f"example {chosen[place]}"
            images[place] = average_down(_decode(record[keys[0]], stored, name), shape)
            labels[place] = _check_label(record[keys[1]], name)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(load, np.array_split(order, -(-len(order) // 1000))):
            pass
    return Split(images, labels)


_PREPARE = "prepare the data set again"
