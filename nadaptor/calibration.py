"""Conversion without training: thresholds, biases and start potentials measured on data.

A network that was trained with ReLU has no thresholds. The functions here take it as it is, its
data being the last argument, and measure what its neurons need: on one batch, from the activations
that the network has without any clip. The result is a `Calibration`, a pytree of plain arrays. It
is put on the traced network, which `nadaptor.quantize` gives thresholds of 1 (a function that has
`clipped_relu` in the place of each ReLU already is taken with the thresholds it has):

    calibration = calibrate_thresholds(f, params, images)
    unit = functools.partial(nadaptor.quantize(f, activation="clipped_relu"), 1.0)
    net = calibration.apply(nadaptor.spiking(unit, params, others))
    sim = run_network(net, net.prepare(params, others), num_steps=64)

Thresholds alone are `nadaptor.quantize(f, activation="clipped_relu").init(params, images,
rule="percentile")`, ordinary arguments of the quantized function.

Everything is exact over the batch it is given, which has to fit into memory; several hundred images
are customary. All functions can be jitted.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nadaptor._checks import check_count
from nadaptor._execution.placement import shard_like
from nadaptor._jaxpr.trace import contains, is_mark, to_jaxpr
from nadaptor.quantization import quantize
from nadaptor.quantization.rules import SMALLEST, Rule, maximum, mmse, other_axes, percentile
from nadaptor.transformation import Nonaffine, Prepared, SpikingNetwork, spiking

__all__ = [
    "Calibration",
    "Rule",
    "calibrate_biases",
    "calibrate_potentials",
    "calibrate_thresholds",
    "maximum",
    "mmse",
    "percentile",
    "shift_biases",
]

Pair = tuple[jax.Array, jax.Array]


class Calibration(NamedTuple):
    """What a calibration has found, one array a layer, each broadcastable to the layer's shape.

    All are in units of the layer's scale, which for `clipped_relu` is its threshold.
    """

    thresholds: tuple[jax.Array, ...]
    starts: tuple[jax.Array, ...]  # potential before the first step
    biases: tuple[jax.Array, ...]  # current added at every step

    def apply(self, net: SpikingNetwork) -> SpikingNetwork:
        """Returns a network with these thresholds, start potentials and biases.

        Args:
            net: from `nadaptor.spiking`, of the function that was calibrated; the batch may be of
                another size than the calibration's.

        Returns:
            The network, for `nadaptor.simulation.run_network`. Corrections and other neurons work
            with it as with any.

        Raises:
            ValueError: the network has another number of layers, or sum coding.
        """
        if net.coding == "sum":
            raise ValueError(
                "a calibration sets thresholds for rates, and sum coding counts the quantizer's "
                'levels; convert with coding="rate", or calibrate the scales of the quantizers'
            )
        if len(net.layers) != len(self.thresholds):
            raise ValueError(
                f"the calibration is of {len(self.thresholds)} layers and the network has "
                f"{len(net.layers)}; calibrate the function that you convert"
            )
        layers = tuple(
            layer._replace(threshold=threshold, start=start, bias=bias)
            for layer, threshold, start, bias in zip(net.layers, *self, strict=True)
        )
        return dataclasses.replace(net, layers=layers)


def calibrate_thresholds(
    f: Callable[..., Any],
    *args: Any,
    rule: Rule | None = None,
    channel_axis: int | None = None,
    nonaffine: Nonaffine = "refuse",
) -> Calibration:
    """Measures each layer's threshold on the network with plain ReLUs.

    Args:
        f: function with ReLUs, or with `clipped_relu` in the place of each, of which the thresholds
            are not used: the activations are measured without a clip.
        *args: its arguments, with a batch of data.
        rule: `maximum()`, `percentile(...)` or `mmse(...)`; None for `percentile(99.9)`.
        channel_axis: axis of the layers' arrays along which each entry has a threshold of its own;
            None for one threshold a layer.
        nonaffine: as for `nadaptor.spiking`. With "running_mean" max-pools stay what they are; else
            those between ReLUs become means, as `nadaptor.quantize` has it.

    Returns:
        The thresholds, start potentials of half of them, and no biases.

    Raises:
        ValueError: `f` cannot be converted (see `nadaptor.spiking`).

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.clipped_relu(v, 1.0)
        >>> found = calibrate_thresholds(f, jnp.array([-1.0, 2.0, 4.0]), rule=maximum())
        >>> found.thresholds[0].item(), found.starts[0].item(), found.biases[0].item()
        (4.0, 2.0, 0.0)

    Source: Rueckauer et al., Conversion of continuous-valued deep networks to efficient
    event-driven networks for image classification, 2017.
    """
    net = _convert(f, args, nonaffine)
    rule = percentile() if rule is None else rule
    found = [
        rule(a, other_axes(a, channel_axis)) for a in _relu_activations(net, net.prepare(*args))
    ]
    # A layer, or channel, that is silent on the whole batch keeps the threshold it has.
    usable = [jnp.where(th > SMALLEST, th, 1.0).astype(jnp.float32) for th in found]
    # From half the threshold the neuron's floor is a rounding.
    return Calibration(
        tuple(usable), tuple(th / 2 for th in usable), tuple(jnp.zeros_like(th) for th in usable)
    )


def calibrate_biases(
    f: Callable[..., Any],
    *args: Any,
    calibration: Calibration,
    num_steps: int,
    channel_axis: int = -1,
    nonaffine: Nonaffine = "refuse",
) -> Calibration:
    """Adds to each channel's bias what its mean activation lacks after T steps.

    Layer by layer, each running on the corrected spikes of those before it:
    `bias += mean(ANN) - mean(SNN)`, the means over the batch and all positions, with the ReLU
    network as the ANN. All T steps of a layer are in memory at once: use a small batch.

    Args:
        f: function with ReLUs, or with `clipped_relu` in the place of each.
        *args: its arguments, with a batch of data.
        calibration: the thresholds to begin with.
        num_steps: T, the number of steps that the network is going to run.
        channel_axis: axis of the layers' arrays that a bias belongs to.
        nonaffine: as for `calibrate_thresholds`.

    Returns:
        The calibration with biases.

    Raises:
        ValueError: `num_steps` is not a positive int, or `f` cannot be converted.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.clipped_relu(v, 1.0)
        >>> v = jnp.array([[0.1], [0.2]])  # one channel of mean 0.15, silent in 2 steps
        >>> start = calibrate_thresholds(f, v, rule=lambda a, axes: jnp.ones((1, 1)))
        >>> found = calibrate_biases(f, v, calibration=start, num_steps=2)
        >>> round(found.biases[0].item(), 3)
        0.15

    Source: Li et al., A free lunch from ANN, 2021 (light pipeline).
    """

    def adjust(missing: jax.Array, start: jax.Array, bias: jax.Array) -> Pair:
        return start, bias + missing.mean(other_axes(missing, channel_axis), keepdims=True)

    return _layer_by_layer(f, args, calibration, num_steps, nonaffine, adjust)


def calibrate_potentials(
    f: Callable[..., Any],
    *args: Any,
    calibration: Calibration,
    num_steps: int,
    batch_axis: int = 0,
    nonaffine: Nonaffine = "refuse",
) -> Calibration:
    """Raises each neuron's start potential by what it lacks over T steps.

    As `calibrate_biases`, but at once instead of at every step, and for each neuron of its own:
    `start += T * (mean(ANN) - mean(SNN))`, the means over the batch.

    Args:
        f: function with ReLUs, or with `clipped_relu` in the place of each.
        *args: its arguments, with a batch of data.
        calibration: the thresholds to begin with.
        num_steps: T, the number of steps that the network is going to run.
        batch_axis: axis of the layers' arrays that the examples lie along.
        nonaffine: as for `calibrate_thresholds`.

    Returns:
        The calibration with start potentials.

    Raises:
        ValueError: `num_steps` is not a positive int, or `f` cannot be converted.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.clipped_relu(v, 1.0)
        >>> v = jnp.array([[0.1], [0.2]])
        >>> start = calibrate_thresholds(f, v, rule=lambda a, axes: jnp.ones((1, 1)))
        >>> found = calibrate_potentials(f, v, calibration=start, num_steps=2)
        >>> round(found.starts[0].item(), 3)  # 0.5 + 2 * 0.15
        0.8

    Source: Li et al., A free lunch from ANN, 2021.
    """

    def adjust(missing: jax.Array, start: jax.Array, bias: jax.Array) -> Pair:
        return start + num_steps * missing.mean(batch_axis, keepdims=True), bias

    return _layer_by_layer(f, args, calibration, num_steps, nonaffine, adjust)


def shift_biases(calibration: Calibration, num_steps: int) -> Calibration:
    """Spreads the pre-charge th/2 over T steps: start 0, and th/(2T) added at every step.

    After T steps the sum is the same; before, fewer neurons have fired.

    Args:
        calibration: thresholds and biases.
        num_steps: T.

    Raises:
        ValueError: `num_steps` is not a positive int.

    Example:
        >>> one = jnp.ones(())
        >>> shifted = shift_biases(Calibration((one,), (one / 2,), (0 * one,)), num_steps=4)
        >>> shifted.starts[0].item(), shifted.biases[0].item()
        (0.0, 0.125)

    Source: Deng and Gu, Optimal conversion of conventional artificial neural networks to spiking
    neural networks, 2021 (OPT).
    """
    steps = check_count(num_steps, "num_steps")
    pairs = zip(calibration.biases, calibration.thresholds, strict=True)
    return calibration._replace(
        starts=tuple(jnp.zeros_like(start) for start in calibration.starts),
        biases=tuple(bias + th / (2 * steps) for bias, th in pairs),
    )


def _relu_activations(net: SpikingNetwork, prepared: Prepared) -> tuple[jax.Array, ...]:
    """Each layer's activations with max(x, 0) in place of neurons, in units of its scale."""

    def activate(i: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (a := jnp.maximum(x, 0)), a

    return net.propagate(prepared, activate)[0]


def _convert(f: Callable[..., Any], args: tuple[Any, ...], nonaffine: Nonaffine) -> SpikingNetwork:
    """Converts f as it is where it has quantizers; else with thresholds of 1 for its ReLUs."""
    closed, _ = to_jaxpr(f, *args)
    if not contains(closed.jaxpr, is_mark):
        # Thresholds of 1: what is measured is in the units of the function.
        clipped = quantize(f, activation="clipped_relu", pools=nonaffine == "refuse")
        f = functools.partial(clipped, 1.0)
    return spiking(f, *args, nonaffine=nonaffine)


def _layer_by_layer(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    calibration: Calibration,
    num_steps: int,
    nonaffine: Nonaffine,
    adjust: Callable[[jax.Array, jax.Array, jax.Array], Pair],
) -> Calibration:
    """Runs T steps of each layer, adjusts it by mean(ANN) - mean(SNN), and passes on its spikes."""
    steps = check_count(num_steps, "num_steps")
    net = _convert(f, args, nonaffine)
    prepared = net.prepare(*args)
    wanted = _relu_activations(net, prepared)

    def fire(i: int, x: jax.Array) -> tuple[Any, jax.Array]:
        threshold, *found = (values[i] for values in calibration)

        def run(start: jax.Array, bias: jax.Array) -> jax.Array:
            state = net.neuron.init(net.layers[i].shape, threshold, start)
            state = jax.tree.map(lambda s: shard_like(s, jax.typeof(x[0])), state)
            # The network is the one without the biases: its currents lack them.
            return jax.lax.scan(lambda s, c: net.neuron.step(s, c, threshold), state, x + bias)[1]

        # Two runs: what is missing is measured on the first, and the next layer sees the second.
        adjusted = adjust(wanted[i] - run(*found).mean(0), *found)
        return (threshold, *adjusted), run(*adjusted)

    kept, _ = net.propagate(prepared, fire, steps=steps)
    return Calibration(*zip(*kept, strict=True))
