"""What a config stands for: its images, its network, its optimizer."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import optax

from nadaptor.configs.config import Activation, Config, Dtype
from nadaptor.data.registry import get_spec, load_source, open_source
from nadaptor.data.source import PHOTOGRAPHS, Source, Split, SplitName
from nadaptor.models import (
    AnyLevel,
    ClippedRelu,
    Lsq,
    NoiseAdaptor,
    Qcfs,
    Relu,
    SlipRelu,
    Ttrbr,
    batch_norm,
    create,
)
from nadaptor.models.activations import ScaleInit
from nadaptor.quantizers import GradientMode


class Layer(NamedTuple):
    """The fields of a config that its activation layers are made of."""

    activation: Activation
    levels: int
    initial_threshold: float
    noise_amplitude: float
    gradient: GradientMode
    scale_init: ScaleInit
    scale_gradient: bool
    drawn_levels: tuple[int, ...]


def open_split(config: Config, split: SplitName, data_dir: Path | None) -> Source:
    """Opens a split of a config's data set, with its normalisation and training size.

    Raises:
        ValueError: as `open_source`, or `train_size` is more than there is.
    """
    source = open_source(config.dataset, split, config.validation_size, data_dir)
    if config.normalization == "imagenet":
        mean, deviation = PHOTOGRAPHS
        source = source._replace(spec=source.spec._replace(mean=mean, deviation=deviation))
    if split != "train" or config.train_size is None:
        return source
    if config.train_size > source.size:
        raise ValueError(f"train_size {config.train_size} is more than the {source.size} there are")
    return source._replace(size=config.train_size)


def config_split(
    config: Config, split: SplitName, data_dir: Path | None = None, limit: int | None = None
) -> Split:
    """Loads a split of a config's data set, or its first images, as its network takes them.

    Raises:
        ValueError: as `open_split`.
    """
    return load_source(open_split(config, split, data_dir), limit)


def build_model(
    config: Config,
    axis_name: str | None = None,
    *,
    folded: bool = False,
    num_classes: int | None = None,
) -> nn.Module:
    """Builds the network that a config trains.

    Args:
        config: the run.
        axis_name: mapped axis over which the batch is split, for the moments of batch norm, the
            start of the scales and the noise; None for one device.
        folded: whether batch norm is folded into the layers before it.
        num_classes: size of the last layer; None for the classes of the config's data set.

    Returns:
        The Linen module, without variables.

    Raises:
        ValueError: the model, data set or activation is unknown.
    """
    if num_classes is None:
        num_classes = get_spec(config.dataset).num_classes
    layer = Layer(*(getattr(config, field) for field in Layer._fields))
    return _network(config.model, num_classes, layer, config.dtype, axis_name, folded)


def build_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """Builds SGD with momentum, a cosine from the learning rate to 0, and decay of all parameters.

    With a warm-up, the rate rises from 0 along a line before, and the cosine has the other steps.

    Args:
        config: the run.
        total_steps: updates in it.

    Returns:
        The optimizer. The decay is added to the gradient before the momentum, as torch does.
    """
    schedule = config.learning_rate, config.warmup_steps, total_steps
    return _sgd(*schedule, config.momentum, config.weight_decay)


# Flax compares slots, and Optax its functions, by identity: without these caches each run would
# have a network and an optimizer of its own, and jit would compile the same step again.
@functools.cache
def _network(
    model: str,
    num_classes: int,
    layer: Layer,
    dtype: Dtype,
    axis_name: str | None,
    folded: bool,
) -> nn.Module:
    norm = None if folded else functools.partial(batch_norm, axis_name=axis_name)
    slot = _slot(layer, axis_name)
    return create(model, num_classes, activation=slot, norm=norm, dtype=jnp.dtype(dtype))


def _slot(layer: Layer, axis_name: str | None) -> Callable[..., nn.Module]:
    """What makes the activation layers of a network."""
    levels = {"levels": layer.levels}
    learned = {
        **levels, "scale_init": layer.scale_init, "scale_gradient": layer.scale_gradient
    }
    noisy = {**learned, "amplitude": layer.noise_amplitude, "gradient": layer.gradient}
    from_threshold = {**levels, "initial_threshold": layer.initial_threshold}
    slots = {
        "clipped_relu": (ClippedRelu, {}),
        "lsq": (Lsq, learned),
        "ttrbr": (Ttrbr, levels),
        "qcfs": (Qcfs, from_threshold),
        "slip_relu": (SlipRelu, from_threshold),
        "noise_adaptor": (NoiseAdaptor, noisy),
        "any_level": (AnyLevel, {**noisy, "drawn": layer.drawn_levels}),
    }
    if layer.activation == "relu":
        return Relu
    kind, fields = slots[layer.activation]
    return functools.partial(kind, **fields, axis_name=axis_name)


@functools.cache
def _sgd(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    momentum: float,
    weight_decay: float,
) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1))
    if warmup_steps:
        rise = optax.linear_schedule(0, learning_rate, warmup_steps)
        schedule = optax.join_schedules([rise, schedule], [warmup_steps])
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum)
    )
