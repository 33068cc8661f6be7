"""What a training run is: frozen groups of values, and the checks of their ranges.

A group is hashable, and so is itself the cache key of what is built from it: the images of
`DataConfig`, the network of `NetworkConfig` and `QuantizerConfig`, the optimizer of
`OptimizerConfig` and the step of `StepConfig`. No field has the name of another group's: on the
command line, in a checkpoint's card and for `replace` they are all fields of the config.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from nadaptor._checks import check_count
from nadaptor.data.augmentation import Augmentation
from nadaptor.data.config import DataConfig, check_data
from nadaptor.models.config import NetworkConfig, QuantizerConfig, check_network
from nadaptor.parallel import Parallel

Dtype = Literal["float32", "bfloat16"]
Prng = Literal["threefry2x32", "rbg", "unsafe_rbg"]
Select = Literal["last", "best"]
# Names that cards had before, and what they lacked.
RENAMED: Mapping[str, str] = {"average_decay": "ema_decay", "scale_start": "scale_init"}
ADDED: Mapping[str, Any] = {"width": None, "image_size": None, "pool": None}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """SGD with momentum and a cosine of the learning rate."""

    # Learning rate of the first update; a cosine takes it to 0 at the last.
    learning_rate: float
    # Updates over which the learning rate first rises from 0; 0 for none.
    warmup_steps: int
    # Fraction of the last update that is kept in the next.
    momentum: float
    # Factor of the L2 gradient, on all parameters, scales included.
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """One step of training: what is done to its batch, and how it is computed."""

    # Images per step.
    batch_size: int
    # What is done to training images.
    augmentation: Augmentation
    # Fraction of each target that is spread over all classes.
    label_smoothing: float
    # Fraction of the moving average of the parameters that is kept in a step; 0 for no average.
    ema_decay: float
    # Parts in which each device computes its batch, one after another, to save memory.
    micro_batches: int
    # Type of the computation; parameters, scales and statistics are float32.
    dtype: Dtype
    # How a step is spread over several devices.
    parallel: Parallel
    # Generator of random bits. With "rbg" and "unsafe_rbg", cheaper on accelerators, the noise of
    # an example depends on the number of devices.
    prng: Prng


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run's result depends on: two equal configs train the same network."""

    # Name of the run and of its folder.
    name: str
    # Config whose trained weights this run starts from; None for random weights.
    parent: str | None
    # Seed of the initial weights, the order of the images and the noise.
    seed: int
    # Passes over the training images.
    epochs: int
    # Weights that a finished run hands on: the last, or the best on the validation images.
    select: Select
    # Which images.
    data: DataConfig
    # Which network.
    network: NetworkConfig
    # Its activations.
    quantizer: QuantizerConfig
    # How its parameters are changed.
    optimizer: OptimizerConfig
    # What is done to a batch, and how it is computed.
    step: StepConfig


GROUPS: Mapping[str, Any] = {
    "data": DataConfig,
    "network": NetworkConfig,
    "quantizer": QuantizerConfig,
    "optimizer": OptimizerConfig,
    "step": StepConfig,
}
# The group of each field that lies in one.
_GROUP_OF = {f.name: group for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}
_OWN = [f.name for f in dataclasses.fields(Config) if f.name not in GROUPS]


def make_config(**fields: Any) -> Config:
    """Makes a config from all of its fields, whichever group they belong to.

    Raises:
        TypeError: a field is unknown or missing.
    """
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for name in fields.keys() & _GROUP_OF.keys():
        groups[_GROUP_OF[name]][name] = fields.pop(name)
    made: dict[str, Any] = {name: kind(**groups[name]) for name, kind in GROUPS.items()}
    return Config(**fields, **made)


def replace(config: Config, **changes: Any) -> Config:
    """Returns a config with some fields changed, as `dataclasses.replace`, in their groups.

    Args:
        config: the config.
        **changes: values by the names of fields, or of whole groups.

    Raises:
        TypeError: there is no field of that name.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> replace(get_config("digits_na"), levels=4, epochs=1).quantizer.levels
        4
    """
    own = {name: value for name, value in changes.items() if name not in _GROUP_OF}
    for group in {_GROUP_OF[name]: None for name in changes if name in _GROUP_OF}:
        inside = {name: v for name, v in changes.items() if _GROUP_OF.get(name) == group}
        before: Any = own.get(group, getattr(config, group))
        own[group] = dataclasses.replace(before, **inside)
    return dataclasses.replace(config, **own)


def check_config(config: Config) -> Config:
    """Returns `config`, every value in its range.

    Not done where it is made: the command line would wrap the message in its own.

    Raises:
        ValueError: a value is out of its range; the message names the field and the value.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> check_config(replace(get_config("digits_na"), epochs=0))
        Traceback (most recent call last):
        ValueError: epochs must be a positive int, not 0
    """
    # No dot at the beginning: the folder would be hidden, or the one above.
    if not re.fullmatch(r"[\w=+-][\w.=+-]*", config.name, re.ASCII):
        raise ValueError(
            f"name must be letters, digits and -_.=+, to be that of a folder, not {config.name!r}"
        )
    check_data(config.data)
    check_network(config.network, config.quantizer)
    fields = fields_of(config)
    for field in ("epochs", "batch_size", "micro_batches"):
        check_count(fields[field], field)
    for field in ("momentum", "label_smoothing", "ema_decay"):
        if not 0 <= fields[field] < 1:
            raise ValueError(f"{field} must be at least 0 and below 1, not {fields[field]!r}")
    for field in ("learning_rate", "warmup_steps", "weight_decay", "seed"):
        if not 0 <= fields[field] < float("inf"):
            raise ValueError(f"{field} must be a number >= 0, not {fields[field]!r}")
    for field in ("warmup_steps", "seed"):
        if not isinstance(fields[field], int):
            raise ValueError(f"{field} must be an int, not {fields[field]!r}")
    if fields["seed"] >= 2**63:
        raise ValueError(f"seed must be below 2^63, not {fields['seed']!r}")
    if fields["levels"] >= 2**24:
        # From there on, a float32 does not hold every count of levels.
        raise ValueError(f"levels must be below 2^24, not {fields['levels']!r}")
    for field, known in (("select", Select), ("dtype", Dtype), ("prng", Prng)):
        if fields[field] not in get_args(known):
            raise ValueError(f"{field} must be one of {get_args(known)}, not {fields[field]!r}")
    return config


def fields_of(config: Config) -> dict[str, Any]:
    """Returns all values by their names, those of the groups among them."""
    return {
        **{name: getattr(config, name) for name in _OWN},
        **{name: getattr(getattr(config, group), name) for name, group in _GROUP_OF.items()},
    }


def to_json(config: Config) -> dict[str, Any]:
    """Returns the fields of a config as JSON gives them back: a tuple is a list.

    They are flat, as on the command line, so that a group may change and cards stay readable.
    """
    return json.loads(json.dumps(fields_of(config)))


def today(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the fields of a card as this version writes them; those of no config as they are.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> old = {k: v for k, v in to_json(get_config("digits_na")).items() if k != "pool"}
        >>> today(old) == to_json(get_config("digits_na"))
        True
    """
    try:
        return to_json(from_json(fields))
    except ValueError:
        return fields


def from_json(fields: Mapping[str, Any]) -> Config:
    """Returns the config that `to_json` was given, by this version of nadaptor or an older one.

    Args:
        fields: from a card; older names are read as today's, and what was not yet there is filled.

    Raises:
        ValueError: a field is missing or unknown; the card is of a newer version, or no config.

    Example:
        >>> from nadaptor.configs.named import get_config
        >>> from_json(to_json(get_config("digits_na"))) == get_config("digits_na")
        True
    """
    # JSON has lists alone, and a group must be hashable.
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    read = {**ADDED, **{RENAMED.get(name, name): value for name, value in tuples.items()}}
    known = {*_OWN, *_GROUP_OF}
    if unknown := sorted(read.keys() - known):
        raise ValueError(
            f"this version of nadaptor does not know the config's {', '.join(unknown)}; "
            "read it with the newer version that wrote it"
        )
    if missing := sorted(known - read.keys()):
        raise ValueError(f"the config lacks {', '.join(missing)}; train the network again")
    return make_config(**read)
