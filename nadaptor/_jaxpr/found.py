"""What `find` says of a function: what becomes a quantizer or a mean, and what is left."""

from typing import NamedTuple

from nadaptor._jaxpr.flat import Path

# Why a layer is left that `select` rejects.
NOT_SELECTED = "it is not selected"
# Why an operation is left that is no layer.
NO_NEURON = "no neuron can come of it"
# Why a maximum is left in another function of a library, whose name follows.
PART_OF = "it is a part of "


class QuantizedLayer(NamedTuple):
    """A ReLU that becomes a quantizer, or a max-pool that becomes a mean."""

    name: str  # "ResNet/act1" or "layer0", as `nadaptor.spiking` has it where all are selected
    kind: str  # "relu", "bounded_relu" or "max_pool"
    shape: tuple[int, ...]
    source: str  # the user's file and line
    bound: float | None = None  # where a bounded ReLU ends: 6 for relu6
    turns: tuple[int, ...] = ()  # lengths of the scans around it: it has a scale for each turn


class Left(NamedTuple):
    """An operation that stays as it is."""

    name: str
    kind: str
    shape: tuple[int, ...]
    source: str
    why: str


class Plan(NamedTuple):
    """What to put in the place of an equation; without a layer, its operand alone."""

    layer: QuantizedLayer | None
    operand: int


class Found(NamedTuple):
    """What to replace, by path and in order, and what is left."""

    plans: dict[Path, Plan]
    left: tuple[Left, ...]
