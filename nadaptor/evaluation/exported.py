"""The accuracy of an exported artefact on a data set, at every time step."""

from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from nadaptor.configs.config import from_json
from nadaptor.data.config import DataConfig
from nadaptor.data.loader import evaluation_batches
from nadaptor.data.registry import open_split
from nadaptor.data.source import Source, images_together, normalize
from nadaptor.evaluation.report import print_accuracy, write_accuracy
from nadaptor.simulation.deployment import Exported, load_exported, output_of


def simulate_exported(
    path: Path,
    split: Literal["validation", "test"],
    dataset: str | None = None,
    data_dir: Path | None = None,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Measures an artefact of `nadaptor.export` on a split.

    Args:
        path: of the artefact.
        split: images to read.
        dataset: its name, for an artefact whose sidecar names none; its test images only. An
            artefact that takes uint8 gets pixels as stored, another one normalised images.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        num_images: the first images of the split to measure on; None for all.

    Returns:
        `accuracy`, a fraction at t = 1 to T; `name`, `split`, `num_images` and `num_steps`.

    Raises:
        ValueError: the artefact or its sidecar is missing or damaged, it takes more than images,
            the images are of another shape or another data set, or the data set is named by neither
            the sidecar nor `dataset`, or by both.
    """
    exported = load_exported(path)
    wanted = _image_input(path, exported)
    source = _open(path, exported, split, dataset, data_dir, num_images)
    # The first axis is that of the batch.
    if list(source.spec.image_shape) != wanted["shape"][1:]:
        raise ValueError(
            f"{path} takes images of shape {wanted['shape'][1:]}, and those of "
            f"{source.identity['dataset']} are {list(source.spec.image_shape)}"
        )
    right = np.zeros(exported.sidecar["num_steps"], np.int64)
    for batch in evaluation_batches(source, min(images_together(source.spec), source.size)):
        images = jnp.asarray(batch.images)
        images = images if wanted["dtype"] == "uint8" else normalize(images, source.spec)
        # [T, B]; what fills the last batch has the label -1, which is no class.
        hits = output_of(exported.call(images)).argmax(-1) == jnp.asarray(batch.labels)
        right += np.asarray(hits.sum(1))
    return {
        "name": path.name,
        "split": split,
        "num_images": source.size,
        "num_steps": len(right),
        "accuracy": (right / source.size).tolist(),
    }


def write_exported(report: dict[str, Any], out: Path) -> None:
    """Prints what `simulate_exported` measured, and writes it.

    Args:
        report: what was measured.
        out: folder for `accuracy.csv` (t, accuracy), `report.json` and `accuracy.png`.
    """
    print_accuracy(report)
    write_accuracy(report, report["name"], out)


def _image_input(path: Path, exported: Exported) -> dict[str, Any]:
    """What the sidecar says of the one array that goes in."""
    inputs = exported.sidecar["inputs"]
    if len(inputs) != 1:
        shapes = [x["shape"] for x in inputs]
        raise ValueError(
            f"{path} takes arrays of the shapes {shapes}, and accuracy is measured with one of "
            "images; export a function of images alone"
        )
    return inputs[0]


def _open(
    path: Path,
    exported: Exported,
    split: Literal["validation", "test"],
    dataset: str | None,
    data_dir: Path | None,
    num_images: int | None,
) -> Source:
    """The images that the sidecar names, or the test images of a data set of that name."""
    config = exported.sidecar.get("config")
    if config is not None:
        data = from_json(config).data
        if dataset is not None:
            raise ValueError(
                f"the sidecar of {path} names its data set, {data.dataset!r}; leave out --dataset "
                f"{dataset}"
            )
        return open_split(data, split, data_dir, num_images, exported.sidecar.get("data"))
    if dataset is None:
        raise ValueError(f"the sidecar of {path} names no data set; name one with --dataset")
    if split != "test":
        raise ValueError(f"the validation images of {path} are not known; add --split test")
    # Any number to validate on does: those are held out of the training set.
    data = DataConfig(dataset, 1, None, None, "dataset")
    return open_split(data, split, data_dir, num_images)
