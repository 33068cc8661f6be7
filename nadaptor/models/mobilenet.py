"""MobileNetV2 with slots, named as torchvision names it.

Layer `features.0.0` of torch is `features_0_0` and its norm, `features.0.1`, is
`features_0_0_norm`; the layers of block i are `features_i/conv_0_0`, `features_i/conv_1_0` and
`features_i/conv_2`. The last convolution of a block has no activation.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nadaptor.models.activations import Relu
from nadaptor.models.layers import (
    Layers,
    Slot,
    batch_norm,
    check_images,
    convolution,
    finish_logits,
)

# Expansion, features, blocks, stride of the first of them: Table 2 of the paper.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# torch's normal_(0, 0.01) of the dense layer
_dense_init = nn.initializers.normal(0.01)


class Relu6(nn.Module):
    """The full-precision activation min(max(v, 0), 6) of networks made for few bits."""

    @nn.compact
    def __call__(self, v: jax.Array) -> jax.Array:
        """Returns min(max(v, 0), 6)."""
        return nn.relu6(v)


class InvertedResidual(nn.Module):
    """1x1 to a wider map, 3x3 on each channel alone, 1x1 back; x is added where shapes agree."""

    features: int
    stride: int
    expansion: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block of x."""
        convolve, activation = self.layers.convolve, self.layers.activation
        wide, y, index = x.shape[-1] * self.expansion, x, 0
        # Without an expansion torch's numbers begin at the depthwise convolution.
        if self.expansion != 1:
            y = activation(name="act1")(convolve(y, "conv_0_0", wide, 1, 1, train))
            index = 1
        name = f"conv_{index}_0"
        y = convolve(y, name, wide, 3, self.stride, train, groups=wide)
        y = activation(name=f"act{index + 1}")(y)
        y = convolve(y, f"conv_{index + 1}", self.features, 1, 1, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(nn.Module):
    """A MobileNetV2 [B, H, W, C] -> logits [B, num_classes], in float32 or wider.

    torchvision's dropout before the dense layer is left out.

    Attributes:
        num_classes: size of the dense layer.
        width: factor of all widths, which are rounded to multiples of 8.
        conv: as for `ResNet`, and called with `feature_group_count=` where it is depthwise.
        norm: as for `ResNet`; None is the folded network.
        activation: as for `ResNet`. `Relu`, the full-precision one, is bounded at 6 here, as
            published; a quantizer has a bound of its own.
        dtype: compute dtype.

    Raises:
        ValueError: images are not floating point of rank 4.

    Example:
        >>> model = MobileNetV2(10, width=0.25)
        >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        >>> shapes["params"]["features_1"]["conv_0_0"]["kernel"].shape  # depthwise
        (3, 3, 1, 8)

    Source: Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, 2018; names,
    starts and paddings of torchvision.models.mobilenetv2.
    """

    num_classes: int
    width: float = 1.0
    conv: Slot = convolution
    norm: Slot | None = batch_norm
    activation: Slot = Relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits; `train=True` normalises with the moments of the batch."""
        activation = Relu6 if self.activation is Relu else self.activation
        layers = Layers(self.conv, self.norm, activation, self.dtype)
        widen = functools.partial(_divisible, factor=self.width)
        x = layers.convolve(check_images(images), "features_0_0", widen(32), 3, 2, train)
        x, index = activation(name="act1")(x), 1
        for expansion, features, blocks, stride in _STAGES:
            for block in range(blocks):
                x = InvertedResidual(
                    features=widen(features),
                    stride=stride if block == 0 else 1,
                    expansion=expansion,
                    layers=layers,
                    name=f"features_{index}",
                )(x, train)
                index += 1
        # Narrower networks keep the published width of the last map.
        last = _divisible(1280, max(1.0, self.width))
        x = layers.convolve(x, f"features_{index}_0", last, 1, 1, train)
        x = activation(name="act2")(x).mean(axis=(1, 2))
        dense = nn.Dense(
            self.num_classes, dtype=self.dtype, kernel_init=_dense_init, name="classifier_1"
        )
        return finish_logits(dense(x))


def _divisible(features: int, factor: float) -> int:
    """The nearest multiple of 8, which is at least 8 and not more than a tenth too small."""
    wanted = features * factor
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * wanted else nearest
