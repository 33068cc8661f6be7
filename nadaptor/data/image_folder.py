"""Image folders in the layout of ImageNet and torchvision: `train/CLASS/*.JPEG`, `val/CLASS/`."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from nadaptor.data.source import PHOTOGRAPHS, Example, Source, Spec, SplitName, hold_out

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
TEST_FOLDERS = ("val", "validation", "test")


class _File(NamedTuple):
    path: str
    label: int


def folder_spec(dataset: str, data_dir: Path | None, image_size: int) -> Spec:
    """Returns the number of classes of an image folder; reads no image.

    Raises:
        ValueError: there is no such folder, or none of a class in it.
    """
    classes = _class_names(_root(dataset, data_dir) / "train")
    return Spec(len(classes), (image_size, image_size, 3), *PHOTOGRAPHS)


def open_folder(
    dataset: str,
    split: SplitName,
    validation_size: int,
    data_dir: Path | None,
    image_size: int,
) -> Source:
    """Opens one split of an image folder.

    A class is a folder in `train`, its label the folder's place in the sorted list. The training
    and validation images come from `train`, the test images from `val`, `validation` or `test`.

    Args:
        dataset: "folder" for `data_dir` itself, "folder:NAME" for a folder in it.
        split: "train", "validation" or "test".
        validation_size: images held out of the training set.
        data_dir: where the folder lies.
        image_size: pixels of each side of an image in a batch.

    Returns:
        The source; its files are read when they are asked for.

    Raises:
        ValueError: a folder is missing or empty, or the test classes are not those of `train`.
    """
    root = _root(dataset, data_dir)
    spec = folder_spec(dataset, data_dir, image_size)
    classes = _class_names(root / "train")
    stored = _test_folder(root) if split == "test" else root / "train"
    _check_classes(stored, classes)
    files = [_File(path, i) for i, name in enumerate(classes) for path in _images(stored / name)]
    chosen = hold_out(len(files), validation_size, split)

    def read(index: int) -> Example:
        path, label = files[chosen[index]]
        return Example(Path(path).read_bytes(), label, path)

    identity = {
        "dataset": dataset,
        "split": split,
        "class_names": classes,
        "num_stored": len(files),
        "files_digest": _digest(files, stored),
    }
    return Source(spec, len(chosen), read, None, identity)


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
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not names:
        raise ValueError(f"{folder} holds no class folders; it must hold CLASS/*.JPEG")
    return names


def _check_classes(folder: Path, classes: list[str]) -> None:
    odd = sorted(set(_class_names(folder)) ^ set(classes))
    if odd:
        raise ValueError(
            f"{folder} and train must hold the same class folders; {odd[0]!r} is in one alone"
        )


def _images(folder: Path) -> list[str]:
    """Paths of the images in a class folder, sorted."""
    files = sorted(
        entry.path
        for entry in os.scandir(folder)
        if entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES)
    )
    if not files:
        raise ValueError(f"{folder} holds no images; put some in, or remove this class folder")
    return files


def _digest(files: list[_File], folder: Path) -> str:
    names = "\n".join(os.path.relpath(path, folder) for path, _ in files)
    return hashlib.sha256(names.encode()).hexdigest()
