"""The layers of neurons that a traced function becomes, and the neuron that fits them."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import jax

from nadaptor._jaxpr.places import layer_name
from nadaptor._jaxpr.plan import MEAN, Plan, kind_of
from nadaptor.neurons import Coding, IntegrateAndFire, Neuron, StBif, Threshold

_NEURONS: dict[str, Neuron] = {"rate": IntegrateAndFire(), "sum": StBif()}


class Layer(NamedTuple):
    """One layer of neurons: what a quantized activation has become."""

    name: str  # the scopes around the activation, "ResNet/act1" and "ResNet/act1:2", or "layer0"
    shape: tuple[int, ...]
    threshold: Threshold  # in units of the scale: the quantizer's levels, or a calibration's array
    start: float  # the potential before the first step, in units of the scale
    source: str  # the user's file and line
    bias: jax.Array | None = None  # added to the current at every step, in units of the scale
    from_mean: bool = False  # whether its current comes from a running mean, and not from spikes


def find_layers(parts: Plan) -> tuple[Layer, ...]:
    """Returns a layer for each quantizer, in the order of evaluation."""
    layers: list[Layer] = []
    uses: collections.Counter[str] = collections.Counter()
    for op in parts.stepwise:
        if op.mark is not None:
            name = layer_name(op.location.scope) or f"layer{len(layers)}"
            uses[name] += 1
            unique = name if uses[name] == 1 else f"{name}:{uses[name]}"
            mean = kind_of(parts.kinds, op.inputs[0]) == MEAN
            layer = Layer(unique, op.avals[0].shape, *op.mark, op.location.source, None, mean)
            layers.append(layer)
    return tuple(layers)


def fitting_neuron(neuron: Neuron | None, coding: Coding, layers: Sequence[Layer]) -> Neuron:
    """Returns the neuron of all layers; raises a ValueError unless it and they fit the coding."""
    if coding not in _NEURONS:
        raise ValueError(f"coding must be 'rate' or 'sum', not {coding!r}")
    neuron = _NEURONS[coding] if neuron is None else neuron
    # A neuron of the user's that says nothing of it is one for rates.
    own = getattr(neuron, "coding", "rate")
    if own != coding:
        raise ValueError(
            f"{type(neuron).__name__} is a neuron for {own} coding; with coding={coding!r} use "
            f"neuron={_NEURONS[coding]}, or one of your own whose class says coding = {coding!r}"
        )
    for layer in layers:
        # Thresholds are integers here: a calibration, which makes arrays of them, refuses sums.
        if coding == "sum" and layer.threshold >= 2**24:
            raise ValueError(
                f"layer {layer.name} at {layer.source} has {layer.threshold} levels, and float32 "
                "counts to 2**24 only; use fewer levels"
            )
    return neuron
