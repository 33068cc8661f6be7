"""The accuracy of a pre-trained CIFAR-10 ResNet-20 as a spiking network, with no training.

    python -m benchmarks.calibrated_resnet20 --data-dir DIR

DIR holds `weights/resnet20-12fca82f.th` of akamaster/pytorch_resnet_cifar10 and the TFDS data set
`tfds/cifar10`. Thresholds and biases are measured on training images, accuracy on test images.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nadaptor import simulate
from nadaptor._files import write_csv
from nadaptor.conversion.calibrate import CalibrationOptions, calibrate_model
from nadaptor.interop.pretrained import load_pretrained
from nadaptor.models import ClippedRelu, create, fold_batch_norm

# The normalisation with which the weights were trained.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SETTINGS: Mapping[str, CalibrationOptions] = MappingProxyType(
    {
        "99.9th percentile": CalibrationOptions("percentile", 99.9),
        "99.9th percentile, biases for T = 16": CalibrationOptions("percentile", 99.9, 16, True),
        "99th percentile": CalibrationOptions("percentile", 99.0),
        "99th percentile, biases for T = 16": CalibrationOptions("percentile", 99.0, 16, True),
    }
)
BATCH_SIZE = 100


def main(
    data_dir: Path,
    num_images: int = 2000,
    num_steps: int = 64,
    out: Path = Path("results/calibrated_resnet20.csv"),
) -> None:
    """Measures every setting and writes one row for each, as it is done.

    Args:
        data_dir: Folder with the weights and the data set.
        num_images: The first so many test images.
        num_steps: T.
        out: CSV file to write.
    """
    model, variables = load_network(data_dir)
    images, labels = load_images(data_dir, "test", num_images)
    calibration, _ = load_images(data_dir, "train", 128)
    ann = _percent(_ann_accuracy(model, variables, images, labels))
    steps = [t for t in (4, 8, 16, 32, 64, 128) if t <= num_steps]
    rows = []
    for name, options in SETTINGS.items():
        found = calibrate_model(model, variables, calibration, options)
        accuracy = measure(model, found, images, labels, num_steps)
        at = {f"T = {t}": _percent(accuracy[t - 1]) for t in steps}
        rows.append({"calibration": name, "images": num_images, "ANN": ann, **at})
        print(rows[-1], flush=True)
        write_csv(out, rows)


def load_network(data_dir: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the folded ResNet-20 with ReLUs, and its weights."""
    model = create("cifar_resnet20", 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    loaded = load_pretrained(data_dir / "weights" / "resnet20-12fca82f.th", shapes)
    return model.clone(norm=None), fold_batch_norm(loaded)


def load_images(data_dir: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first images of a split, normalised, and their labels."""
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", split=split, data_dir=data_dir / "tfds")
    rows = [source[i] for i in range(count)]
    images = (np.stack([row["image"] for row in rows]) / 255 - MEAN) / DEVIATION
    return images.astype(np.float32), np.array([row["label"] for row in rows])


def measure(
    model: nn.Module, variables: Any, images: np.ndarray, labels: np.ndarray, num_steps: int
) -> Sequence[float]:
    """Returns the accuracy of a calibrated network at t = 1 to T."""
    network = model.clone(activation=ClippedRelu)

    @jax.jit
    def predict(variables: Any, batch: jax.Array) -> jax.Array:
        run = functools.partial(simulate, network.apply, num_steps=num_steps)
        return run(variables, batch).outputs.argmax(-1)

    parts = range(0, len(images), BATCH_SIZE)
    found = [np.asarray(predict(variables, images[i : i + BATCH_SIZE])) for i in parts]
    return (np.concatenate(found, 1) == labels).mean(1).tolist()


def _ann_accuracy(
    model: nn.Module, variables: Any, images: np.ndarray, labels: np.ndarray
) -> float:
    predict = jax.jit(lambda variables, batch: model.apply(variables, batch).argmax(-1))
    parts = range(0, len(images), BATCH_SIZE)
    found = [np.asarray(predict(variables, images[i : i + BATCH_SIZE])) for i in parts]
    return float((np.concatenate(found) == labels).mean())


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
