"""The networks by name: those of the paper, and others that are published with weights."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nadaptor._checks import check_name
from nadaptor.models.activations import Relu
from nadaptor.models.layers import Slot, batch_norm
from nadaptor.models.mobilenet import MobileNetV2
from nadaptor.models.resnet import BasicBlock, Bottleneck, ResNet
from nadaptor.models.vgg import Head, Vgg
from nadaptor.models.vit import Vit

_LARGE = {
    "resnet18": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck),
    "resnet101": functools.partial(ResNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck),
}
# 6n + 2 layers: three stages of n blocks of two convolutions, the stem and the dense layer.
_SMALL = {
    f"cifar_resnet{6 * blocks + 2}": functools.partial(
        ResNet, stage_sizes=(blocks,) * 3, stem="cifar", width=16, shortcut="pad"
    )
    for blocks in (1, 3, 5, 7, 9)
}
_DIGITS = {
    f"digits_resnet{6 * blocks + 2}": functools.partial(
        ResNet, stage_sizes=(blocks,) * 3, stem="cifar", width=16
    )
    for blocks in (1, 3)
}
_VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_HEADS: Mapping[str, Head] = {"": "imagenet", "cifar_": "cifar"}
_VGG = {
    f"{prefix}vgg{depth}{suffix}": functools.partial(
        Vgg, stage_sizes=sizes, head=head, normalized=normalized
    )
    for depth, sizes in _VGG_STAGES.items()
    for prefix, head in _HEADS.items()
    for suffix, normalized in (("", False), ("_bn", True))
}

# The two stems differ about 16 times in work at the same image size: results do not compare
# across them, and so the stem is in the name.
MODELS: Mapping[str, functools.partial] = MappingProxyType(
    {
        **_LARGE,
        **{f"cifar_{name}": functools.partial(make, stem="cifar") for name, make in _LARGE.items()},
        **_SMALL,
        **_DIGITS,
        **_VGG,
        # A partial like the others, whose `func` and `keywords` are read below.
        "mobilenet_v2": functools.partial(MobileNetV2),
        "vit_tiny": functools.partial(Vit),
        "vit_small": functools.partial(Vit, width=384, heads=6),
        "cifar_vit": functools.partial(Vit, patch_size=4, depth=6),
    }
)

# The last dense layer of each, of which the one that a network has comes first here.
HEADS = ("fc", "head", "classifier_6", "classifier_1", "classifier")


def create(
    name: str,
    num_classes: int,
    *,
    activation: Slot = Relu,
    norm: Slot | None = batch_norm,
    dtype: Any = jnp.float32,
    **options: Any,
) -> nn.Module:
    """Builds a network by its name.

    Args:
        name: a key of `MODELS`. `resnet18`, `34`, `50`, `101` have the imagenet stem and
            `cifar_resnet18`, ... the cifar stem; `cifar_resnet8`, `20`, `32`, `44`, `56` have
            stages of 16, 32 and 64 features and padded shortcuts; `digits_resnet8` and
            `digits_resnet20` are for 8x8 images. `vgg11`, `13`, `16`, `19` have torchvision's head
            and `cifar_vgg11`, ... one dense layer, each with `_bn` or without norms; `mobilenet_v2`
            is torchvision's. `vit_tiny` and `vit_small` are timm's, with patches of 16 pixels, and
            `cifar_vit` has patches of 4 and 6 blocks.
        num_classes: size of the last dense layer.
        activation: activation slot, for example `functools.partial(Lsq, levels=2)`.
        norm: norm slot; None for the folded network.
        dtype: compute dtype.
        **options: other attributes of the network's class to override, such as `width`; `pool` is
            "mean" by default, and "max" is that of the published ResNets and VGGs: their weights
            fit both, and are another network with means.

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
    if "pool" in options and not has_pool(name, options.get("stem")):
        raise ValueError(
            f"pool {options['pool']!r} cannot be had: {name} has no pool; leave it out, or choose "
            "a network with one, such as resnet18"
        )
    # Any: the type of a partial does not say that it makes a dataclass.
    network: Any = MODELS[name].func
    fields = {field.name: field for field in dataclasses.fields(network)}
    # These two Flax adds to every module.
    known = {key: field for key, field in fields.items() if key not in ("parent", "name")}
    for option in options:
        check_name(option, known, f"option of {name},")
    options |= {"activation": activation, "norm": norm, "dtype": dtype}
    return MODELS[name](num_classes=num_classes, **options)


def has_pool(name: str, stem: str | None = None) -> bool:
    """Returns whether a network has pools of which a kind can be chosen: of its stem, or of stages.

    Args:
        name: a key of `MODELS`.
        stem: the stem, where it is not the network's own.

    Example:
        >>> has_pool("resnet18"), has_pool("cifar_resnet18"), has_pool("vgg11")
        (True, False, True)
    """
    made: Any = MODELS[name]
    stem = stem or made.keywords.get("stem", "imagenet")
    return made.func is Vgg or (made.func is ResNet and stem == "imagenet")
