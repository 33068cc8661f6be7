"""The networks to time: folded, with a threshold a layer, from trained weights."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor.interop import load_pretrained
from nadaptor.models import ClippedRelu, ResNet, create, fold_batch_norm, start_scales
from nadaptor.training.source import PHOTOGRAPHS

CALIBRATION = 200


class Network(NamedTuple):
    """A network to simulate."""

    model: ResNet  # folded, with ClippedRelu activations
    variables: Any
    images: np.ndarray  # [N, 32, 32, 3] float32, normalised
    labels: np.ndarray


def cifar10(data_dir: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the first images of a split of CIFAR-10, normalised, and their labels."""
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", split=split, data_dir=str(data_dir / "tfds"))
    examples = [source[i] for i in range(count)]
    images = np.stack([e["image"] for e in examples]).astype(np.float32)
    mean, deviation = (np.array(c, np.float32) for c in PHOTOGRAPHS)
    return (images - mean) / deviation, np.array([e["label"] for e in examples])


def calibrated(name: str, weights: Path, data_dir: Path, count: int) -> Network:
    """A pre-trained ReLU network with each threshold at the maximum over training images.

    Args:
        name: of the model, such as "cifar_resnet20".
        weights: a torch or safetensors file.
        data_dir: folder with tfds/cifar10 in it.
        count: test images to read.
    """
    model = create(name, 10, activation=ClippedRelu)
    train, _ = cifar10(data_dir, "train", CALIBRATION)
    shapes = jax.eval_shape(model.init, jax.random.key(0), train[:1])
    variables = load_pretrained(weights, shapes)
    variables = start_scales(model, variables, jnp.asarray(train), jax.random.key(0))
    images, labels = cifar10(data_dir, "test", count)
    return Network(model.clone(norm=None), fold_batch_norm(variables), images, labels)
