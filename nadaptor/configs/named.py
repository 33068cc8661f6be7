"""The named configs that users start from: digits here, others in `paper` and `small`."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from nadaptor._checks import check_name
from nadaptor.configs.config import Config, fields_of, make_config, replace
from nadaptor.configs.paper import PAPER
from nadaptor.configs.small import SMALL
from nadaptor.data.config import DataConfig
from nadaptor.models.config import NetworkConfig


def digits_relu() -> Config:
    """Full-precision 20-layer ResNet on 8x8 digits: where the quantized ones start from.

    `nadaptor train digits_relu`
    """
    return make_config(
        name="digits_relu",
        activation="relu",
        parent=None,
        epochs=15,
        batch_size=64,
        learning_rate=0.05,
        warmup_steps=0,
        momentum=0.9,
        weight_decay=5e-4,
        levels=2,
        initial_threshold=4.0,
        noise_amplitude=0.5,
        gradient="paper",
        scale_init="lsq",
        scale_gradient=True,
        drawn_levels=(1, 2, 4),
        dataset="digits",
        validation_size=150,
        image_size=None,
        model="digits_resnet20",
        width=None,
        pool=None,
        seed=0,
        train_size=None,
        normalization="dataset",
        augmentation="none",
        label_smoothing=0.0,
        ema_decay=0.0,
        micro_batches=1,
        select="last",
        dtype="float32",
        parallel="pmap",
        prng="threefry2x32",
    )


def digits_lsq() -> Config:
    """The digits ResNet with p = 2 quantized activations, without the noise adaptor.

    The learning rate is the paper's; on validation images 0.1 was better than 0.05 at every T.

    `nadaptor train digits_lsq`
    """
    return replace(
        digits_relu(),
        name="digits_lsq",
        activation="lsq",
        parent="digits_relu",
        epochs=20,
        learning_rate=0.1,
    )


def digits_na() -> Config:
    """The digits ResNet with p = 2 quantized activations and the noise adaptor.

    `nadaptor train digits_na`
    """
    return replace(digits_lsq(), name="digits_na", activation="noise_adaptor")


def digits_clipped_relu() -> Config:
    """The digits ResNet with clipped ReLUs, whose thresholds are learned (TCL).

    `nadaptor train digits_clipped_relu`
    """
    return replace(digits_lsq(), name="digits_clipped_relu", activation="clipped_relu")


def digits_qcfs() -> Config:
    """The digits ResNet with QCFS activations of 4 levels.

    Thresholds start at 4, and not at the authors' 8, at which one level leaves it all silent.

    `nadaptor train digits_qcfs`
    """
    return replace(digits_lsq(), name="digits_qcfs", activation="qcfs", levels=4)


def digits_slip_relu() -> Config:
    """The digits ResNet with SlipReLU activations of 4 levels, thresholds as in digits_qcfs.

    `nadaptor train digits_slip_relu`
    """
    return replace(digits_qcfs(), name="digits_slip_relu", activation="slip_relu")


def digits_ttrbr() -> Config:
    """The digits ResNet with 32 levels and tuned thresholds, an approximation of TTRBR.

    `nadaptor train digits_ttrbr`
    """
    return replace(digits_lsq(), name="digits_ttrbr", activation="ttrbr", levels=32)


_MADE = (
    digits_relu,
    digits_lsq,
    digits_na,
    digits_clipped_relu,
    digits_qcfs,
    digits_slip_relu,
    digits_ttrbr,
)
CONFIGS: Mapping[str, Callable[[], Config]] = MappingProxyType(
    {**{make.__name__: make for make in _MADE}, **PAPER, **SMALL}
)
# A parent's weights fit, and its validation images were held out of it, where these agree.
INHERITED = (
    "seed",
    *(f.name for group in (DataConfig, NetworkConfig) for f in dataclasses.fields(group)),
)


def get_config(name: str) -> Config:
    """Returns the config of that name.

    Raises:
        ValueError: there is none; the message suggests the nearest.

    Example:
        >>> get_config("digits_na").quantizer.levels
        2
    """
    return CONFIGS[check_name(name, CONFIGS, "config")]()


def parent_of(config: Config) -> Config | None:
    """Returns the config to train first, with the data, model and seed of `config`.

    Raises:
        ValueError: there is no config of the parent's name.

    Example:
        >>> parent_of(replace(get_config("digits_na"), seed=3)).seed
        3
    """
    if config.parent is None:
        return None
    same = {name: value for name, value in fields_of(config).items() if name in INHERITED}
    return replace(get_config(config.parent), **same)
