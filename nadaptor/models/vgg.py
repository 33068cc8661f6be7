"""VGG networks with slots, named as torchvision names them.

Convolution i of torch's `features` is `features_i` and its norm `features_i_norm`, of which torch
makes the next number. The first dense layer is a convolution over the whole map: a flattened map
would need the order of torch's channels, and a kernel says it by its shape.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nadaptor.models.activations import Relu
from nadaptor.models.layers import (
    Layers,
    Pool,
    Slot,
    batch_norm,
    check_images,
    convolution,
    finish_logits,
    pool_images,
)

Head = Literal["imagenet", "cifar"]
# torch's normal_(0, 0.01) of the dense layers
_dense_init = nn.initializers.normal(0.01)
# Pixels per side of the map under torchvision's dense layers: 224 / 32.
_MAP = 7


class Vgg(nn.Module):
    """A VGG network [B, H, W, C] -> logits [B, num_classes], in float32 or wider.

    Stage i has `min(width * 2**i, 8 * width)` features and ends in a pool that halves the image:
    sides are at least 32. torchvision's dropout between the dense layers is left out.

    Attributes:
        num_classes: size of the last dense layer.
        stage_sizes: convolutions per stage.
        normalized: whether a norm follows each convolution (VGG-BN); without one `norm` is ignored.
        head: "imagenet" is torchvision's, three dense layers on a map of 7x7, to which other maps
            are averaged or repeated as torch's adaptive pool does it; "cifar" is one dense layer on
            the mean of the map.
        pool: "mean" in place of the max-pools of the published networks, or "max", theirs.
        width: features of the first stage.
        hidden: features of the two hidden dense layers of the imagenet head.
        conv: as for `ResNet`.
        norm: as for `ResNet`; None is the folded network.
        activation: as for `ResNet`.
        dtype: compute dtype.

    Raises:
        ValueError: images are not floating point of rank 4, or an unknown head or pool.

    Example:
        >>> model = Vgg(10, (1, 1, 1, 1, 1), head="cifar", width=4)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        >>> sorted(variables["params"])[:3]
        ['classifier', 'features_0', 'features_0_norm']

    Source: Simonyan and Zisserman, Very deep convolutional networks for large-scale image
    recognition, 2015; names, starts and paddings of torchvision.models.vgg.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    normalized: bool = True
    head: Head = "imagenet"
    pool: Pool = "mean"
    width: int = 64
    hidden: int = 4096
    conv: Slot = convolution
    norm: Slot | None = batch_norm
    activation: Slot = Relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits; `train=True` normalises with the moments of the batch."""
        norm = self.norm if self.normalized else None
        layers = Layers(self.conv, norm, self.activation, self.dtype)
        x, index, count = check_images(images), 0, 0
        for stage, size in enumerate(self.stage_sizes):
            features = min(self.width * 2**stage, 8 * self.width)
            for _ in range(size):
                # torchvision's convolutions have biases, which a norm makes useless, too.
                x = layers.convolve(x, f"features_{index}", features, 3, 1, train, bias=True)
                count += 1
                x = self.activation(name=f"act{count}")(x)
                # torch counts norms, activations and pools among the layers of `features`.
                index += 3 if self.normalized else 2
            x = pool_images(x, self.pool, 2, 2)
            index += 1
        return finish_logits(self._classify(x, count))

    def _classify(self, x: jax.Array, count: int) -> jax.Array:
        if self.head not in ("imagenet", "cifar"):
            raise ValueError(f"head must be 'imagenet' or 'cifar', not {self.head!r}")
        if self.head == "cifar":
            x = x.mean(axis=(1, 2))
            return self._dense(x, "classifier", self.num_classes)
        x = self.conv(
            self.hidden,
            kernel_size=(_MAP, _MAP),
            strides=(1, 1),
            padding=[(0, 0)] * 2,
            use_bias=True,
            dtype=self.dtype,
            kernel_init=_dense_init,
            name="classifier_0",
        )(_adaptive_mean(x, _MAP))
        # [B, 1, 1, hidden], because the kernel is as large as the map.
        x = self.activation(name=f"act{count + 1}")(x.reshape(len(x), self.hidden))
        x = self._dense(x, "classifier_3", self.hidden)
        x = self.activation(name=f"act{count + 2}")(x)
        return self._dense(x, "classifier_6", self.num_classes)

    def _dense(self, x: jax.Array, name: str, features: int) -> jax.Array:
        return nn.Dense(features, dtype=self.dtype, kernel_init=_dense_init, name=name)(x)


def _adaptive_mean(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, size, size, C]: means over torch's windows, which may overlap."""
    rows, columns = (_windows(side, size) for side in x.shape[1:3])
    if rows.shape == columns.shape == (size, size):
        return x
    # The windows are constants, so that this is affine and spikes can go through it.
    return jnp.einsum("ih,jw,bhwc->bijc", rows.astype(x.dtype), columns.astype(x.dtype), x)


def _windows(side: int, size: int) -> np.ndarray:
    """[size, side]: row i averages the pixels from floor(i * side / size) on."""
    i = np.arange(size)[:, None]
    pixel = np.arange(side)
    inside = (pixel >= i * side // size) & (pixel < -(-(i + 1) * side // size))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
