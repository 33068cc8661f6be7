"""Residual networks with slots: one module, any convolution, norm and activation.

Names follow torch's, so that pre-trained weights map by name: `conv1`, `layer1_0/conv2`,
`layer2_0/downsample`, `fc`. The norm of layer `X` is called `X_norm` (folding relies on it) and the
activations are `act1`, `act2`, ... inside each block. Everything between two activations is affine
(average pools, means, sums, paddings), as a spiking network needs; the last dense layer has no
activation.
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from nadaptor.models.activations import Relu
from nadaptor.models.layers import (
    Layers,
    Pool,
    Slot,
    batch_norm,
    check_images,
    convolution,
    dense_init,
    finish_logits,
    pool_images,
)

Stem = Literal["imagenet", "cifar"]
Shortcut = Literal["conv", "pad"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the sum enters the block's last activation."""

    features: int
    stride: int
    shortcut: Shortcut
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block of x."""
        convolve, activation = self.layers.convolve, self.layers.activation
        y = convolve(x, "conv1", self.features, 3, self.stride, train)
        y = activation(name="act1")(y)
        y = convolve(y, "conv2", self.features, 3, 1, train)
        return activation(name="act2")(y + _shortcut(self, x, self.features, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is on the 3x3 (torchvision v1.5)."""

    features: int
    stride: int
    shortcut: Shortcut
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block of x."""
        convolve, activation = self.layers.convolve, self.layers.activation
        y = convolve(x, "conv1", self.features, 1, 1, train)
        y = activation(name="act1")(y)
        y = convolve(y, "conv2", self.features, 3, self.stride, train)
        y = activation(name="act2")(y)
        y = convolve(y, "conv3", 4 * self.features, 1, 1, train)
        return activation(name="act3")(y + _shortcut(self, x, 4 * self.features, train))


class ResNet(nn.Module):
    """A residual network [B, H, W, C] -> logits [B, num_classes], in float32 or wider.

    Stage i has `width * 2**i` features and halves the image from the second stage on. Parameters
    and batch-norm statistics are float32 whatever the compute dtype.

    Attributes:
        num_classes: size of the last dense layer.
        stage_sizes: blocks a stage.
        block: `BasicBlock` or `Bottleneck`.
        stem: "imagenet" is a 7x7 convolution at stride 2 and a 3x3 pool at stride 2 with padding 1;
            "cifar" is a 3x3 convolution at stride 1, no pool.
        pool: of the imagenet stem: "mean" in place of torch's max-pool, padded zeros counted, which
            is torch's default for average pools; "max" is torch's own.
        width: features of the first stage and of the stem.
        shortcut: "conv" is a 1x1 convolution and its norm, where the shape changes (option B);
            "pad" takes every second pixel and pads channels with zeros on both sides (option A).
        conv: called as `conv(features, kernel_size=, strides=, padding=, use_bias=, dtype=,
            kernel_init=, name=)`.
        norm: called as `norm(use_running_average=, dtype=, name=)`; `functools.partial(batch_norm,
            axis_name="batch")` averages moments over a mapped axis; None is the folded network.
        activation: called as `activation(name=)`, for example `functools.partial(Lsq, levels=2)`.
        dtype: compute dtype.

    `init` wants a real batch, on which quantized activations measure their scales, and the mode in
    which the network will run next. To train one from scratch call `init(key, batch, train=True)`:
    measured with running averages that are still 0 and 1, the scales would silence deep layers.

    Raises:
        ValueError: images are not floating point of rank 4, or an unknown stem or shortcut.

    Example:
        >>> model = ResNet(10, (1, 1), stem="cifar", width=4)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> model.apply(variables, jnp.zeros((2, 8, 8, 3))).shape
        (2, 10)

    Source: He et al., Deep residual learning for image recognition, 2015; names and padding of
    torchvision, option A of its section 4.2.
    """

    num_classes: int
    stage_sizes: Sequence[int]
    block: Slot = BasicBlock
    stem: Stem = "imagenet"
    pool: Pool = "mean"
    width: int = 64
    shortcut: Shortcut = "conv"
    conv: Slot = convolution
    norm: Slot | None = batch_norm
    activation: Slot = Relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits; `train=True` normalises with the moments of the batch."""
        layers = Layers(self.conv, self.norm, self.activation, self.dtype)
        x = self._stem(check_images(images), layers, train)
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                x = self.block(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    shortcut=self.shortcut,
                    layers=layers,
                    name=f"layer{stage + 1}_{index}",
                )(x, train)
        x = x.mean(axis=(1, 2))
        logits = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=dense_init, name="fc")(x)
        return finish_logits(logits)

    def _stem(self, x: jax.Array, layers: Layers, train: bool) -> jax.Array:
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem must be 'imagenet' or 'cifar', not {self.stem!r}")
        large = self.stem == "imagenet"
        x = layers.convolve(x, "conv1", self.width, 7 if large else 3, 2 if large else 1, train)
        x = layers.activation(name="act1")(x)
        # Behind the activation, as in torch: the windows of the pool hold spikes.
        return pool_images(x, self.pool, 3, 2, padding=1) if large else x


def _shortcut(block: Any, x: jax.Array, features: int, train: bool) -> jax.Array:
    """x itself where the block keeps its shape, else the block's kind of shortcut."""
    if block.stride == 1 and x.shape[-1] == features:
        return x
    if block.shortcut == "conv":
        return block.layers.convolve(x, "downsample", features, 1, block.stride, train)
    if block.shortcut == "pad":
        missing = features - x.shape[-1]
        x = x[:, :: block.stride, :: block.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
    raise ValueError(f"shortcut must be 'conv' or 'pad', not {block.shortcut!r}")
