"""Which network a config stands for, and the one table of its activation layers.

A new activation is a class and a line of `ACTIVATIONS` with its name: the command line, the
conversion, the study and the evaluation with noise read the rest from there.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn

from nadaptor._checks import check_count, check_levels
from nadaptor.models.activations import AnyLevel, ClippedRelu, Lsq, NoiseAdaptor, Relu, ScaleInit
from nadaptor.models.layers import Pool
from nadaptor.models.threshold_activations import Qcfs, SlipRelu, Ttrbr
from nadaptor.quantizers import GradientMode

# Activations with a spiking network, and the one of full precision.
Spiking = Literal["lsq", "noise_adaptor", "any_level", "clipped_relu", "qcfs", "slip_relu", "ttrbr"]
Activation = Literal["relu", Spiking]


class Entry(NamedTuple):
    """What the rest of the project has to know of an activation."""

    layer: Callable[..., nn.Module]
    converts_as: Activation | None  # what its spiking network computes; None for full precision
    # Attributes of the layer by the config's fields that set them.
    attributes: Mapping[str, str] = MappingProxyType({})
    noisy: bool = False  # whether it draws noise where `apply` has a key for it
    fixed_levels: int | None = None  # p in a study, where that is none of its axes


_LEVELS = {"levels": "levels"}
_LEARNED = {**_LEVELS, "scale_init": "scale_init", "scale_gradient": "scale_gradient"}
_NOISY = {**_LEARNED, "noise_amplitude": "amplitude", "gradient": "gradient"}
_THRESHOLD = {**_LEVELS, "initial_threshold": "initial_threshold"}
ACTIVATIONS: Mapping[Activation, Entry] = MappingProxyType(
    {
        "relu": Entry(Relu, None),
        "lsq": Entry(Lsq, "lsq", _LEARNED),
        "noise_adaptor": Entry(NoiseAdaptor, "lsq", _NOISY, noisy=True),
        "any_level": Entry(AnyLevel, "lsq", {**_NOISY, "drawn_levels": "drawn"}, noisy=True),
        # Its levels stand for the one step of its neuron, whose height is th.
        "clipped_relu": Entry(ClippedRelu, "clipped_relu", fixed_levels=1),
        "qcfs": Entry(Qcfs, "qcfs", _THRESHOLD),
        "slip_relu": Entry(SlipRelu, "slip_relu", _THRESHOLD),
        # Its threshold starts from data, and has no constant to set.
        "ttrbr": Entry(Ttrbr, "ttrbr", _LEVELS, fixed_levels=32),
    }
)


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network of a run but for its activations."""

    # Network, one of those that `train --help` lists.
    model: str
    # Features of its first stage, of which the others are multiples; None for the network's own.
    width: int | None
    # Its pools: "mean", which spikes can go through, or "max", as published; None for means. Of the
    # stem of ResNets for photographs and the stages of VGGs; the others have none.
    pool: Pool | None


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """The activation layers of a network."""

    # Activation to train with; "relu" is full precision.
    activation: Activation
    # p, the quantizer's levels above 0; unused by "relu" and "clipped_relu".
    levels: int
    # Start of the learned threshold, in the units of its input; used by "qcfs" and "slip_relu".
    initial_threshold: float
    # Half-width of the noise, in units of the scale; used by "noise_adaptor" and "any_level".
    noise_amplitude: float
    # Gradient of the noise adaptor's scale: Eq. 10 ("paper") or Eq. 7's ("exact").
    gradient: GradientMode
    # Where scales start: by LSQ's rule; where the first batch is represented best ("mmse"), each
    # layer behind quantized ones; or the same on the parent's network with ReLUs ("mmse_relu").
    scale_init: ScaleInit
    # Whether LSQ's factor 1/sqrt(N*p) is on the gradient of the scale.
    scale_gradient: bool
    # Levels of which each step of "any_level" draws one.
    drawn_levels: tuple[int, ...]

    @property
    def used_levels(self) -> int | None:
        """The levels of its layers, p; None where they have none, as ReLUs and clipped ReLUs."""
        return self.levels if "levels" in ACTIVATIONS[self.activation].attributes else None


def check_network(network: NetworkConfig, quantizer: QuantizerConfig) -> None:
    """Checks the values of a network; its name is checked where it is built.

    Raises:
        ValueError: a value is out of its range; the message names the field and the value.
    """
    # XLA ends the program where the sizes of an array multiply to more than it can count.
    if network.width is not None and check_count(network.width, "width") >= 2**16:
        raise ValueError(f"width must be below 2^16, not {network.width}")
    if network.pool not in (None, *get_args(Pool)):
        raise ValueError(f"pool must be one of {get_args(Pool)}, not {network.pool!r}")
    for levels in (quantizer.levels, *quantizer.drawn_levels):
        check_levels(levels)
    if not 0 < quantizer.initial_threshold < float("inf"):
        raise ValueError(f"initial_threshold must be positive, not {quantizer.initial_threshold!r}")
    if not 0 <= quantizer.noise_amplitude < float("inf"):
        raise ValueError(f"noise_amplitude must be a number >= 0, not {quantizer.noise_amplitude}")


def activation_slot(quantizer: QuantizerConfig, axis_name: str | None) -> Callable[..., nn.Module]:
    """Returns what makes the activation layers of a network, called as `slot(name=)`.

    Args:
        quantizer: the layers.
        axis_name: mapped axis over which the batch is split; None for one device.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> activation_slot(get_config("digits_lsq").quantizer, None)(name="act1").levels
        2
    """
    entry = ACTIVATIONS[quantizer.activation]
    # The class itself, which MobileNetV2 knows and bounds.
    if entry.layer is Relu:
        return Relu
    fields: dict[str, Any] = {
        attribute: getattr(quantizer, field) for field, attribute in entry.attributes.items()
    }
    return functools.partial(entry.layer, **fields, axis_name=axis_name)
