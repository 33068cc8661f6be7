"""What a training run is: one frozen dataclass, and the checks of its values."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from nadaptor._checks import check_count, check_levels

Activation = Literal[
    "relu", "lsq", "noise_adaptor", "any_level", "clipped_relu", "qcfs", "slip_relu", "ttrbr"
]
# Activations with noise, that compute "lsq" without it.
NOISY: tuple[Activation, ...] = ("noise_adaptor", "any_level")
Dtype = Literal["float32", "bfloat16"]
Prng = Literal["threefry2x32", "rbg", "unsafe_rbg"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run's result depends on: two equal configs train the same network."""

    # Name of the run and of its folder.
    name: str
    # Activation to train with; "relu" is full precision.
    activation: Activation
    # Config whose trained weights this run starts from; None for random weights.
    parent: str | None
    # Passes over the training images.
    epochs: int
    # Images a step.
    batch_size: int
    # Step size of the first update; a cosine takes it to 0 at the last.
    learning_rate: float
    # Updates over which the step size first rises from 0; 0 for none.
    warmup_steps: int
    # Share of the last update that is kept in the next.
    momentum: float
    # Factor of the L2 gradient, on all parameters, scales included.
    weight_decay: float
    # p, the quantizer's levels above 0; unused by "relu" and "clipped_relu".
    levels: int
    # Start of the learned threshold, in the units of its input; used by "qcfs" and "slip_relu".
    initial_threshold: float
    # Half-width of the noise, in units of the scale; used by "noise_adaptor" and "any_level".
    noise_amplitude: float
    # Gradient of the noise adaptor's scale: Eq. 10 ("paper") or Eq. 7's ("exact").
    gradient: Literal["paper", "exact"]
    # Where scales start: by LSQ's rule, or where the first batch is represented best.
    scale_init: Literal["lsq", "mmse"]
    # Whether LSQ's factor 1/sqrt(N*p) is on the gradient of the scale.
    scale_gradient: bool
    # Levels of which each step of "any_level" draws one.
    drawn_levels: tuple[int, ...]
    # Data set to train on.
    dataset: str
    # Images held out of the training set to choose by.
    validation_size: int
    # Network, a name in nadaptor.models.MODELS.
    model: str
    # Seed of the initial weights, the order of the images and the noise.
    seed: int
    # Training images to use, the first of the training set's order; None for all.
    train_size: int | None
    # Pixels are normalised with the mean of the data set, or with that of ImageNet, as weights do
    # that were trained with it.
    normalization: Literal["dataset", "imagenet"]
    # What is done to training images: see nadaptor.data.augmentation.prepare_batch.
    augmentation: Literal["none", "crop_flip", "autoaugment", "random_resized_crop"]
    # Share of each target that is spread over all classes.
    label_smoothing: float
    # Share of the moving average of the parameters that is kept in a step; 0 for no average.
    average_decay: float
    # Parts in which each device computes its batch, one after another, to save memory.
    micro_batches: int
    # Weights that a finished run hands on: the last, or the best on the validation images.
    select: Literal["last", "best"]
    # Type of the computation; parameters, scales and statistics are float32.
    dtype: Dtype
    # How a step is spread over several devices.
    parallel: Literal["pmap", "shard_map"]
    # Generator of random bits. With "rbg" and "unsafe_rbg", cheaper on accelerators, the noise of
    # an example depends on the number of devices.
    prng: Prng


def check_config(config: Config) -> Config:
    """Returns `config`, every value in its range.

    Not done where it is made: the command line would wrap the message in its own.

    Raises:
        ValueError: a value is out of its range; the message names the field and the value.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> check_config(dataclasses.replace(get_config("digits_na"), epochs=0))
        Traceback (most recent call last):
        ValueError: epochs must be a positive int, not 0
    """
    for levels in (config.levels, *config.drawn_levels):
        check_levels(levels)
    for field in ("epochs", "batch_size", "validation_size", "micro_batches"):
        check_count(getattr(config, field), field)
    if config.train_size is not None:
        check_count(config.train_size, "train_size")
    for field in ("momentum", "label_smoothing", "average_decay"):
        if not 0 <= getattr(config, field) < 1:
            value = getattr(config, field)
            raise ValueError(f"{field} must be at least 0 and below 1, not {value!r}")
    if not 0 < config.initial_threshold < float("inf"):
        raise ValueError(f"initial_threshold must be positive, not {config.initial_threshold!r}")
    for field in ("learning_rate", "warmup_steps", "weight_decay", "noise_amplitude", "seed"):
        if not 0 <= getattr(config, field) < float("inf"):
            raise ValueError(f"{field} must be a number >= 0, not {getattr(config, field)!r}")
    return config


def to_json(config: Config) -> dict[str, Any]:
    """Returns the fields of a config as JSON gives them back: a tuple is a list."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(fields: Mapping[str, Any]) -> Config:
    """Returns the config that `to_json` was given.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> from_json(to_json(get_config("digits_na"))) == get_config("digits_na")
        True
    """
    tuples: dict[str, Any] = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
    return Config(**{**fields, **tuples})


