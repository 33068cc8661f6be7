"""Image folders in the layout of ImageNet and torchvision: `train/CLASS/*.JPEG`, `val/CLASS/`.

Photographs of all sizes are cropped to one. Small square pictures that are all alike, such as
CIFAR's as PNG files, are read as they are.
"""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nadaptor.data.codec import decode, read_file, read_size
from nadaptor.data.crops import IMAGE_SIZE, average_down
from nadaptor.data.source import (
    PHOTOGRAPHS,
    Example,
    Source,
    Spec,
    SplitName,
    hold_out,
    printable,
)

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# In this order: ImageNet's test images have no labels, and results are of its validation set.
TEST_FOLDERS = ("val", "validation", "test")
# So many files, spread over the training set, tell whether all are alike.
PROBES = 64


class _File(NamedTuple):
    path: str
    label: int


def folder_spec(dataset: str, data_dir: Path | None, image_size: int | None = None) -> Spec:
    """Returns the number of classes of an image folder; reads no image but some headers.

    Args:
        dataset: as for `open_folder`.
        data_dir: where the folder lies.
        image_size: as for `open_folder`.

    Raises:
        ValueError: there is no such folder, or none of a class in it.
    """
    root = _root(dataset, data_dir)
    classes = _class_names(root / "train")
    return _spec(root, classes, _own_size(root, classes), image_size)


def open_folder(
    dataset: str,
    split: SplitName,
    validation_size: int,
    data_dir: Path | None,
    image_size: int | None = None,
) -> Source:
    """Opens one split of an image folder.

    A class is a folder in `train`, its label the folder's place in the sorted list. The training
    and validation images come from `train`, the test images from `val`, `validation` or `test`.

    Args:
        dataset: "folder" for `data_dir` itself, "folder:NAME" for a folder in it.
        split: "train", "validation" or "test".
        validation_size: images held out of the training set.
        data_dir: where the folder lies.
        image_size: pixels per side of an image in a batch; None for the pictures' own size where
            they are square, smaller than 224 and all alike, and for 224 otherwise.

    Returns:
        The source; its files are read when they are asked for.

    Raises:
        ValueError: a folder is missing or empty, holds what is no file, or has names that cannot
            be shown; or the test classes are not those of `train`.
    """
    root = _root(dataset, data_dir)
    classes = _class_names(root / "train")
    stored = _test_folder(root) if split == "test" else root / "train"
    _check_classes(stored, classes)
    own = _own_size(root, classes)
    spec = _spec(root, classes, own, image_size)
    # Also for test images, whose identity has the digest of the training files.
    trained = _files(root / "train", classes)
    files = _files(stored, classes) if split == "test" else trained
    chosen = hold_out(len(files), validation_size, split)

    def read(index: int) -> Example:
        path, label = files[chosen[index]]
        data = read_file(path)
        return Example(_alike(data, path, own, spec) if own else data, label, path)

    identity = {
        "dataset": dataset,
        "split": split,
        "class_names": classes,
        "num_stored": len(files),
        "files_digest": _digest(trained, root / "train"),
    }
    return Source(spec, len(chosen), read, None, identity)


def _spec(root: Path, classes: Sequence[str], own: int | None, image_size: int | None) -> Spec:
    size = image_size or own or IMAGE_SIZE
    if own and size > own:
        raise ValueError(
            f"image_size {size} is more than the {own} pixels per side of the pictures in {root}; "
            f"choose at most {own}"
        )
    return Spec(len(classes), (size, size, 3), *PHOTOGRAPHS)


def _own_size(root: Path, classes: Sequence[str]) -> int | None:
    """Pixels per side of small square pictures that are all alike; None for photographs."""
    each = max(1, PROBES // len(classes))
    sizes: set[tuple[int, int]] = set()
    for name in classes[:: max(1, len(classes) // PROBES)]:
        for path in _images(root / "train" / name)[:each]:
            sizes.add(read_size(read_file(path), path))
            if len(sizes) > 1:
                # Photographs end the search here, mostly at the second file.
                return None
    height, width = sizes.pop()
    return height if height == width and height < IMAGE_SIZE else None


def _alike(data: bytes, path: str, own: int, spec: Spec) -> np.ndarray:
    image = decode(data, path)
    if image.shape[:2] != (own, own):
        raise ValueError(
            f"{printable(path)} has {image.shape[1]}x{image.shape[0]} pixels, where the others "
            f"have {own}x{own}; make it so, or remove it"
        )
    return average_down(image, spec.image_shape)


def _files(folder: Path, classes: Sequence[str]) -> list[_File]:
    return [_File(path, i) for i, name in enumerate(classes) for path in _images(folder / name)]


def _root(dataset: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        raise ValueError(
            f"dataset {dataset!r} needs a data directory; pass --data-dir or set NADAPTOR_DATA_DIR"
        )
    root = data_dir / dataset.partition(":")[2]
    if not (root / "train").is_dir():
        raise ValueError(
            f"no image folder at {root}: it must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG"
        )
    return root


def _test_folder(root: Path) -> Path:
    for name in TEST_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise ValueError(f"no test images in {root}: it must hold one of {', '.join(TEST_FOLDERS)}")


def _class_names(folder: Path) -> list[str]:
    # Sorted as torchvision does, so that labels mean the same to its weights.
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not names:
        raise ValueError(f"{folder} holds no class folders; it must hold CLASS/*.JPEG")
    for name in names:
        _check_shown(name, folder)
    return names


def _check_classes(folder: Path, classes: list[str]) -> None:
    odd = sorted(set(_class_names(folder)) ^ set(classes))
    if odd:
        raise ValueError(
            f"{folder} and train must hold the same class folders; {odd[0]!r} is in one alone"
        )


def _images(folder: Path) -> list[str]:
    """Paths of the images in a class folder, sorted."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == "." or not entry.name.lower().endswith(SUFFIXES):
                continue
            _check_shown(entry.name, folder)
            if not entry.is_file():
                raise ValueError(
                    f"{printable(entry.path)} is not a regular file, nor a link to one; remove it"
                )
            files.append(entry.path)
    if not files:
        raise ValueError(f"{folder} holds no images; put some in, or remove this class folder")
    return sorted(files)


def _check_shown(name: str, folder: Path) -> None:
    """Refuses a name that a card or a terminal cannot hold."""
    # Bytes that are no UTF-8 come as lone surrogates.
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise ValueError(
            f"the name '{printable(name)}' in {printable(str(folder))} is not UTF-8 or holds "
            "control characters; rename it"
        )


def _digest(files: list[_File], folder: Path) -> str:
    # Of names alone: for a digest of their contents all images would be read at every start.
    names = "\n".join(os.path.relpath(path, folder) for path, _ in files)
    return hashlib.sha256(names.encode()).hexdigest()
