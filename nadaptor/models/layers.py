"""What networks are built of: slots of convolution, norm and activation, torch's starts and pools.

A norm of layer `X` is called `X_norm`, as folding expects. Paddings are written out, as torch has
them.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nadaptor._checks import check_floating
from nadaptor._execution.conv_gradient import conv_general_dilated

Slot = Callable[..., Any]
Pool = Literal["mean", "max"]

# On a CPU its weight gradient is several times as fast as with the convolution of `jax.lax`.
convolution = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
# Flax's momentum is the fraction of the old average: 0.9 here is torch's 0.1.
batch_norm = functools.partial(nn.BatchNorm, epsilon=1e-5, momentum=0.9)
# torch's kaiming_normal_(mode="fan_out", nonlinearity="relu")
kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# torch's default for dense weights: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Layers(NamedTuple):
    """The parts that a network is built of; `norm=None` gives convolutions with biases instead."""

    conv: Slot
    norm: Slot | None
    activation: Slot
    dtype: Any

    def convolve(
        self,
        x: jax.Array,
        name: str,
        features: int,
        size: int,
        stride: int,
        train: bool,
        *,
        bias: bool = False,
        groups: int = 1,
    ) -> jax.Array:
        """Applies convolution `name` (torch's padding, size // 2) and its norm `name_norm`.

        Args:
            x: images [B, H, W, C].
            name: of the convolution.
            features: output channels.
            size: of the kernel, in pixels.
            stride: in pixels.
            train: whether the norm takes the moments of the batch.
            bias: a bias beside the norm too, for networks whose files have one.
            groups: of channels that do not mix; C of them make the convolution depthwise.

        Returns:
            The normalised output, [B, H', W', features].
        """
        # A slot written for networks without groups need not know the word.
        grouped = {"feature_group_count": groups} if groups > 1 else {}
        x = self.conv(
            features,
            kernel_size=(size, size),
            strides=(stride, stride),
            # Not "SAME", which pads the other side first at stride 2.
            padding=[(size // 2, size // 2)] * 2,
            # A folded network has the offset of the norm as its bias.
            use_bias=bias or self.norm is None,
            dtype=self.dtype,
            kernel_init=kaiming,
            name=name,
            **grouped,
        )(x)
        if self.norm is None:
            return x
        norm = self.norm(use_running_average=not train, dtype=self.dtype, name=f"{name}_norm")
        return norm(x)


def pool_images(x: jax.Array, pool: str, size: int, stride: int, padding: int = 0) -> jax.Array:
    """Pools [B, H, W, C] as torch does; padded zeros count in a mean, and never in a maximum.

    Args:
        x: the images.
        pool: "mean", which a spiking network can compute, or "max", which pre-trained networks use.
        size: of the window, in pixels.
        stride: in pixels.
        padding: pixels around the image.

    Returns:
        [B, (H + 2 * padding - size) // stride + 1, ..., C].

    Raises:
        ValueError: another pool.

    Example:
        >>> pool_images(jnp.arange(4.0).reshape(1, 2, 2, 1), "max", 2, 2).ravel()
        Array([3.], dtype=float32)
    """
    if pool not in ("mean", "max"):
        raise ValueError(f"pool must be 'mean' or 'max', not {pool!r}")
    # Any: Flax declares the padding of its pools as a string, and takes pairs.
    around: Any = ((padding, padding),) * 2
    function = nn.avg_pool if pool == "mean" else nn.max_pool
    return function(x, (size, size), (stride, stride), padding=around)


def finish_logits(x: jax.Array) -> jax.Array:
    """Returns the logits in float32 or wider, whatever the compute dtype."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_images(images: jax.Array) -> jax.Array:
    """Returns the images as an array.

    Raises:
        ValueError: they are not floating point, or not of rank 4.
    """
    images = check_floating(images, "images")
    if images.ndim != 4:
        raise ValueError(
            f"images must be [batch, height, width, channels], not of shape {images.shape}; "
            "a single image gets its batch axis from images[None]"
        )
    return images
