"""Augmentation on the device, in uint8: crop with padding, flip, AutoAugment, Cutout.

Every example draws from a key of its own, `fold_in(key, place)`, so that the number of devices
that share a batch changes nothing.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from nadaptor.data.autoaugment import auto_augment
from nadaptor.data.source import Spec, normalize

Augmentation = Literal["none", "crop_flip", "autoaugment", "random_resized_crop"]
# In pixels: of a crop on each side, and of Cutout's square.
PADDING = 4
CUTOUT = 16


def augment_batch(
    key: jax.Array,
    images: jax.Array,
    spec: Spec,
    augmentation: Augmentation,
    first_index: jax.Array | int = 0,
) -> jax.Array:
    """Augments and normalises a batch: the first thing that a training step does.

    "crop_flip" crops with a padding of 4 and flips; "autoaugment" does that, then AutoAugment's
    CIFAR-10 policy, then Cutout of 16 pixels after the normalisation, that is to the mean; "none"
    and "random_resized_crop", which the host has done, only normalise.

    Args:
        key: typed PRNG key of the step, the same on every device; consumed.
        images: [B, H, W, C] uint8, as `batches` yields them.
        spec: of the data set.
        augmentation: what to do.
        first_index: index of the first of these images in the whole batch.

    Returns:
        [B, H, W, C] float32.

    Raises:
        ValueError: the augmentation is unknown, or AutoAugment is asked for on grey images.

    Example:
        >>> import numpy as np
        >>> spec = Spec(10, (32, 32, 3), (127.5,) * 3, (127.5,) * 3)
        >>> images = np.zeros((2, 32, 32, 3), np.uint8)
        >>> augment_batch(jax.random.key(0), images, spec, "crop_flip").shape
        (2, 32, 32, 3)
    """
    if augmentation in ("none", "random_resized_crop"):
        return normalize(images, spec)
    if augmentation not in ("crop_flip", "autoaugment"):
        raise ValueError(
            f"augmentation must be one of none, crop_flip, autoaugment, random_resized_crop, "
            f"not {augmentation!r}"
        )
    places = first_index + jnp.arange(len(images))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
    augment = functools.partial(_augment_image, spec=spec, augmentation=augmentation)
    return jax.vmap(augment)(keys, jnp.asarray(images))


def crop_and_flip(key: jax.Array, image: jax.Array, padding: int = PADDING) -> jax.Array:
    """Crops an image out of itself padded with black, and flips it in one of two cases.

    Args:
        key: typed PRNG key, consumed.
        image: [H, W, C].
        padding: pixels on each side.

    Returns:
        [H, W, C].
    """
    crop_key, flip_key = jax.random.split(key)
    # Black before the normalisation, as torchvision pads an image.
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
    cropped = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), cropped[:, ::-1], cropped)


def cutout(key: jax.Array, image: jax.Array, size: int = CUTOUT) -> jax.Array:
    """Sets a square to 0, which is the mean of a normalised image.

    Its centre is a pixel chosen uniformly, so that part of the square may lie outside.

    Args:
        key: typed PRNG key, consumed.
        image: [H, W, C].
        size: pixels of a side, even.

    Returns:
        [H, W, C].

    Source: DeVries and Taylor, 2017, and their code.
    """
    height, width, _ = image.shape
    row, column = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    inside = [
        (position >= centre - size // 2) & (position < centre + size // 2)
        for position, centre in ((jnp.arange(height), row), (jnp.arange(width), column))
    ]
    return jnp.where((inside[0][:, None] & inside[1])[..., None], 0, image)


def _augment_image(
    key: jax.Array, image: jax.Array, spec: Spec, augmentation: Augmentation
) -> jax.Array:
    crop_key, policy_key, cutout_key = jax.random.split(key, 3)
    image = crop_and_flip(crop_key, image)
    if augmentation == "crop_flip":
        return normalize(image, spec)
    return cutout(cutout_key, normalize(auto_augment(policy_key, image), spec))
