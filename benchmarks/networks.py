"""The networks to time: folded, with a threshold a layer, from trained weights."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor.checkpoints.checkpoint import load_checkpoint
from nadaptor.configs.config import replace
from nadaptor.conversion.calibrate import CalibrationOptions, calibrate_model
from nadaptor.data.source import PHOTOGRAPHS
from nadaptor.interop import load_pretrained
from nadaptor.models import ClippedRelu, Relu, ResNet, create, fold_batch_norm, start_scales
from nadaptor.training import get_config, train
from nadaptor.training.options import Options

CALIBRATION = 200
# Git ignores it: the ResNet-18 is trained where it is not there.
RUNS = Path(__file__).parents[1] / "runs"


class Network(NamedTuple):
    """A network to simulate."""

    model: ResNet  # folded, with ClippedRelu activations
    variables: Any
    images: np.ndarray  # [N, 32, 32, 3] float32, normalised
    labels: np.ndarray


def load(
    name: str,
    data_dir: Path,
    count: int,
    weights: Path | None = None,
    percentile: float | None = None,
) -> Network:
    """A trained ReLU network with each threshold at the maximum over training images.

    Args:
        name: "resnet18" or "resnet20", with the stem for CIFAR.
        data_dir: folder with `tfds/cifar10` in it, and `weights/resnet20-12fca82f.th`.
        count: test images to read.
        weights: a checkpoint of `train.py`, or a torch or safetensors file; None for the published
            ResNet-20, and for a ResNet-18 trained here for 100 steps.
        percentile: of a layer's positive values, for thresholds there and not at the maximum.
    """
    if weights is None and name == "resnet20":
        weights = data_dir / "weights/resnet20-12fca82f.th"
    model = create(f"cifar_{name}", 10, activation=ClippedRelu)
    train_images, _ = cifar10(data_dir, "train", CALIBRATION)
    variables = _read(model, weights or _briefly_trained(data_dir), train_images)
    images, labels = cifar10(data_dir, "test", count)
    folded = model.clone(norm=None)
    if percentile is not None:
        relus = folded.clone(activation=Relu)
        rule = CalibrationOptions("percentile", percentile)
        found = calibrate_model(relus, fold_batch_norm(variables), train_images, rule)
        return Network(folded, found, images, labels)
    variables = start_scales(model, variables, jnp.asarray(train_images), jax.random.key(0))
    return Network(folded, fold_batch_norm(variables), images, labels)


@functools.cache
def cifar10(data_dir: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the first images of a split of CIFAR-10, normalised, and their labels."""
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", split=split, data_dir=str(data_dir / "tfds"))
    examples = [source[i] for i in range(count)]
    images = np.stack([e["image"] for e in examples]).astype(np.float32)
    mean, std = (np.array(c, np.float32) for c in PHOTOGRAPHS)
    return (images - mean) / std, np.array([e["label"] for e in examples])


def accuracy(network: Network) -> float:
    """The share of its images that the ANN classifies correctly."""
    logits: Any = jax.jit(network.model.apply)(network.variables, network.images)
    return float((logits.argmax(-1) == network.labels).mean())


def _read(model: ResNet, weights: Path, images: np.ndarray) -> Any:
    if weights.is_dir():
        return load_checkpoint(weights, "ann")[0]
    shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    return load_pretrained(weights, shapes)


def _briefly_trained(data_dir: Path) -> Path:
    """The checkpoint of a ResNet-18 after 100 steps of 64 images: trained weights, little more."""
    config = replace(
        get_config("cifar10_resnet18"),
        name="resnet18_for_speed",
        epochs=1,
        batch_size=64,
        train_size=6400,
        validation_size=500,
        learning_rate=0.02,
        augmentation="crop_flip",
        normalization="imagenet",
    )
    return train(config, RUNS, Options(data_dir=data_dir))
