"""Configs that a CPU trains in minutes: CIFAR-10 averaged to 8 pixels, an 8-layer ResNet.

They are there for studies of what the noise adaptor does, and when: small enough for many networks,
and for a training set that is fitted, as the paper's is after 160 epochs.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from nadaptor.configs.config import Config, replace
from nadaptor.configs.paper import cifar10_resnet20


def cifar10_8px() -> Config:
    """Full-precision 8-layer ResNet on 1,000 images of CIFAR-10 at 8 pixels, 30 epochs.

    Its training set is small, and neither cropped nor flipped, for it to be fitted soon.

    `nadaptor train cifar10_8px`
    """
    return replace(
        cifar10_resnet20(),
        name="cifar10_8px",
        model="cifar_resnet8",
        image_size=8,
        normalization="dataset",
        train_size=1000,
        validation_size=500,
        augmentation="none",
        epochs=30,
        batch_size=50,
        weight_decay=5e-4,
        select="last",
    )


def cifar10_8px_lsq() -> Config:
    """The same network with p = 2 quantized activations, without the noise adaptor.

    Scales start where the first batch is represented best, and LSQ's factor is on their gradients,
    as in the paper.

    `nadaptor train cifar10_8px_lsq`
    """
    return replace(
        cifar10_8px(),
        name="cifar10_8px_lsq",
        parent="cifar10_8px",
        activation="lsq",
        levels=2,
        scale_init="mmse",
        learning_rate=0.03,
    )


def cifar10_8px_na() -> Config:
    """The same network with p = 2 quantized activations and the noise adaptor.

    `nadaptor train cifar10_8px_na`
    """
    return replace(cifar10_8px_lsq(), name="cifar10_8px_na", activation="noise_adaptor")


SMALL: Mapping[str, Callable[[], Config]] = MappingProxyType(
    {make.__name__: make for make in (cifar10_8px, cifar10_8px_lsq, cifar10_8px_na)}
)
