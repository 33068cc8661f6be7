"""The networks by name: every architecture of the paper, for ImageNet, CIFAR and 8x8 digits."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from nadaptor._checks import check_name
from nadaptor.models.activations import Relu
from nadaptor.models.resnet import BasicBlock, Bottleneck, ResNet, Slot, batch_norm

_LARGE = {
    "resnet18": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck),
    "resnet101": functools.partial(ResNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck),
}
_SMALL = {
    f"cifar_resnet{6 * blocks + 2}": functools.partial(
        ResNet, stage_sizes=(blocks,) * 3, stem="cifar", width=16, shortcut="pad"
    )
    for blocks in (3, 5, 7, 9)
}
_DIGITS = {
    f"digits_resnet{6 * blocks + 2}": functools.partial(
        ResNet, stage_sizes=(blocks,) * 3, stem="cifar", width=16
    )
    for blocks in (1, 3)
}

# The two stems differ about 16 times in work at the same image size: results do not compare
# across them, and so the stem is in the name.
MODELS: Mapping[str, functools.partial] = MappingProxyType(
    {
        **_LARGE,
        **{f"cifar_{name}": functools.partial(make, stem="cifar") for name, make in _LARGE.items()},
        **_SMALL,
        **_DIGITS,
    }
)


def create(
    name: str,
    num_classes: int,
    *,
    activation: Slot = Relu,
    norm: Slot | None = batch_norm,
    dtype: Any = jnp.float32,
    **options: Any,
) -> ResNet:
    """Builds a network by its name.

    Args:
        name: a key of `MODELS`. `resnet18`, `34`, `50`, `101` have the imagenet stem and
            `cifar_resnet18`, ... the cifar stem; `cifar_resnet20`, `32`, `44`, `56` have stages of
            16, 32 and 64 features and padded shortcuts; `digits_resnet8` and `digits_resnet20` are
            for 8x8 images.
        num_classes: size of the last dense layer.
        activation: activation slot, for example `functools.partial(Lsq, levels=2)`.
        norm: norm slot; None for the folded network.
        dtype: compute dtype.
        **options: other attributes of `ResNet` to override, such as `width` or `shortcut`.

    Returns:
        The module, without variables.

    Raises:
        ValueError: the name or an option is unknown, or `num_classes` is below 1.

    Example:
        >>> create("cifar_resnet20", 10, shortcut="conv").stage_sizes
        (3, 3, 3)
    """
    check_name(name, MODELS, "model")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes!r}")
    fields = {k: v for k, v in ResNet.__dataclass_fields__.items() if k not in ("parent", "name")}
    for option in options:
        check_name(option, fields, f"option of {name},")
    options |= {"activation": activation, "norm": norm, "dtype": dtype}
    return MODELS[name](num_classes=num_classes, **options)
