"""Vision transformers with slots, named as timm names them.

`blocks.3.attn.qkv` of timm is `blocks_3/attn/qkv`. Neurons take the place of the activations in the
MLPs; layer norms and attention act on running means, or on sums (`docs/coding.md`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nadaptor._checks import check_count
from nadaptor.models.activations import Relu
from nadaptor.models.layers import Slot, batch_norm, check_images, convolution, finish_logits

# timm's trunc_normal_(std=0.02), of dense weights and embeddings
_init = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Self-attention [B, N, D] -> [B, N, D] with one matrix for queries, keys and values."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the attention of all tokens to all."""
        features = x.shape[-1]
        qkv = _dense(3 * features, "qkv", self.dtype)(x)
        # [B, N, 3 D] -> three of [B, N, heads, D / heads], one behind the other in timm's matrix.
        queries, keys, values = jnp.moveaxis(
            qkv.reshape(*x.shape[:2], 3, self.heads, features // self.heads), 2, 0
        )
        weights = jnp.einsum("bnhd,bmhd->bhnm", queries, keys) / (features / self.heads) ** 0.5
        mixed = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(weights), values)
        return _dense(features, "proj", self.dtype)(mixed.reshape(x.shape))


class Mlp(nn.Module):
    """Two dense layers with the activation between them, [B, N, D] -> [B, N, D]."""

    hidden: int
    activation: Slot
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the second layer's output."""
        hidden = self.activation(name="act")(_dense(self.hidden, "fc1", self.dtype)(x))
        return _dense(x.shape[-1], "fc2", self.dtype)(hidden)


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and beside a residual connection."""

    heads: int
    hidden: int
    activation: Slot
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block of the tokens x, [B, N, D]."""
        x = x + Attention(self.heads, self.dtype, name="attn")(_norm("norm1", self.dtype)(x))
        mlp = Mlp(self.hidden, self.activation, self.dtype, name="mlp")
        return x + mlp(_norm("norm2", self.dtype)(x))


class Vit(nn.Module):
    """A vision transformer [B, H, W, C] -> logits [B, num_classes], in float32 or wider.

    Published weights are trained with GELU, and the activation here is a ReLU or a quantizer: they
    load, and give another network, to be trained further. Dropout is left out.

    Attributes:
        num_classes: size of the last dense layer.
        patch_size: side of a patch in pixels, of which the sides of the images are multiples. The
            number of patches is fixed by the images that the network is made with.
        width: D, the features of a token.
        depth: number of blocks.
        heads: of the attention, among which the features are divided.
        conv: as for `ResNet`, of the patches.
        norm: unused: a transformer has layer norms, which are not folded.
        activation: as for `ResNet`; each MLP has one, on 4 D features.
        dtype: compute dtype.

    Raises:
        ValueError: images are not floating point of rank 4, their sides not multiples of the patch,
            or the features not a multiple of the heads.

    Example:
        >>> model = Vit(10, patch_size=4, width=24, depth=2)
        >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> shapes["params"]["pos_embed"].shape  # four patches and the class
        (1, 5, 24)

    Source: Dosovitskiy et al., An image is worth 16x16 words, 2021; names and starts of
    timm.models.vision_transformer.
    """

    num_classes: int
    patch_size: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    conv: Slot = convolution
    norm: Slot | None = batch_norm
    activation: Slot = Relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits; `train` changes nothing."""
        images = self._check(images)
        patches = _Patches(self.patch_size, self.width, self.conv, self.dtype, name="patch_embed")
        x = patches(images)
        # timm's start of the class token.
        first = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], axis=1)
        # The embeddings are float32 and would widen tokens of half precision.
        x = (x + self.param("pos_embed", _init, (1, *x.shape[1:]))).astype(self.dtype)
        for i in range(self.depth):
            block = Block(
                self.heads, 4 * self.width, self.activation, self.dtype, name=f"blocks_{i}"
            )
            x = block(x)
        # Of all tokens the class's alone is read.
        x = _norm("norm", self.dtype)(x)[:, 0]
        return finish_logits(_dense(self.num_classes, "head", self.dtype)(x))

    def _check(self, images: jax.Array) -> jax.Array:
        images = check_images(images)
        if any(side % check_count(self.patch_size, "patch_size") for side in images.shape[1:3]):
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels are not made of patches of "
                f"{self.patch_size}x{self.patch_size}; set patch_size or another image size"
            )
        if self.width % check_count(self.heads, "heads"):
            raise ValueError(
                f"width {self.width} is not a multiple of the {self.heads} heads; set one of them"
            )
        return images


class _Patches(nn.Module):
    """The patches of the images as tokens, [B, H, W, C] -> [B, N, D], row by row."""

    size: int
    features: int
    conv: Slot
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the tokens."""
        x = self.conv(
            self.features,
            kernel_size=(self.size, self.size),
            strides=(self.size, self.size),
            padding="VALID",
            dtype=self.dtype,
            name="proj",
        )(images)
        return x.reshape(len(x), -1, self.features)


def _dense(features: int, name: str, dtype: Any) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_init, name=name)


def _norm(name: str, dtype: Any) -> nn.LayerNorm:
    # timm's epsilon, and not torch's 1e-5.
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)
