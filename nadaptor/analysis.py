"""What a simulation cost and how good it was: firing rates, layer errors.

Everything here reads what `nadaptor.simulate` returns or a traced network, and changes neither.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nadaptor._checks import check_count
from nadaptor.neurons import Coding, Neuron
from nadaptor.quantizers import round_half_up
from nadaptor.simulation import Correction, Simulation, start_carry
from nadaptor.transformation import Nonaffine, Prepared, SpikingNetwork, spiking

Reference = Literal["rounded", "clipped"]
# The histogram of occasional noise has a bin for each number of spikes from -8 to 8.
MOST_NOISE = 8


class LayerReport(NamedTuple):
    """What the conversion of a layer lost, over T steps."""

    silent: jax.Array  # fraction of the neurons that never spike
    saturated: jax.Array  # fraction of the neurons that send their most
    rate: jax.Array  # spikes per neuron and step, negative ones included
    error: jax.Array  # [T], mean |r_t - q| as in `layer_errors`, after t steps
    noise: jax.Array  # int32 [17], neurons with -8 to 8 spikes too many; the ends hold those beyond


def firing_rates(sim: Simulation, num_steps: int) -> tuple[jax.Array, ...]:
    """Returns each layer's mean firing rate: spikes a neuron and time step, 0 to 1.

    Negative spikes count as spikes. Steps that a correction spent are not among the counted ones.

    Args:
        sim: a simulation of T steps.
        num_steps: T.

    Returns:
        One scalar a layer.

    Raises:
        ValueError: `num_steps` is not a positive int.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> sim = nadaptor.simulate(f, jnp.array([0.0, 0.5, 1.0]), num_steps=4)
        >>> [float(rate) for rate in firing_rates(sim, num_steps=4)]
        [0.5]
    """
    steps = check_count(num_steps, "num_steps")
    return tuple(counts.mean() / steps for counts in sim.spike_counts)


def layer_errors(
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    reference: Reference = "rounded",
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
) -> dict[str, jax.Array]:
    """Measures how far each layer's time-averaged spikes are from the activations they stand for.

    With r = (spikes minus negative spikes)/T a neuron's rate and q = a/th the activation of the
    network without spikes, both as fractions of the threshold, the error of a layer is
    `mean|r - q|`. With sum coding r is (spikes minus negative spikes)/p.
    Where the list first grows is where the conversion loses the network.

    Args:
        f: function whose activations are quantizers of `nadaptor`.
        *args: its arguments.
        num_steps: T.
        reference: "rounded" compares with round(clip(x, 0, p)), the activations of `lsq`, `qcfs`
            and the noise adaptor; "clipped" with clip(x, 0, p), their limit over time and the
            activation of `clipped_relu`.
        neuron: as in `nadaptor.simulate`.
        coding: as in `nadaptor.simulate`.
        nonaffine: as in `nadaptor.simulate`.
        correction: as in `nadaptor.simulate`.

    Returns:
        The error of each layer by its name, in the order of evaluation.

    Raises:
        ValueError: as `nadaptor.simulate`, or an unknown reference.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> errors = layer_errors(f, jnp.array([0.2, 0.6]), num_steps=2)
        >>> [float(error) for error in errors.values()]
        [0.0]
    """
    _check_reference(reference)
    net = spiking(f, *args, neuron=neuron, coding=coding, nonaffine=nonaffine)
    prepared = net.prepare(*args)
    wanted = analog_activations(net, prepared, reference)
    rates = _rates(net, prepared, check_count(num_steps, "num_steps"), correction)
    return {
        layer.name: jnp.abs(rate - q / layer.threshold).mean()
        for layer, rate, q in zip(net.layers, rates, wanted, strict=True)
    }


def analog_activations(
    net: SpikingNetwork, prepared: Prepared, reference: Reference = "clipped"
) -> tuple[jax.Array, ...]:
    """Evaluates a network once, with its activations in place of neurons.

    Args:
        net: from `nadaptor.spiking`.
        prepared: from `net.prepare`.
        reference: the activation, as in `layer_errors`.

    Returns:
        Each layer's activations, in units of its scale.
    """

    def activate(i: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        clipped = jnp.clip(x, 0, net.layers[i].threshold)
        a = round_half_up(clipped) if reference == "rounded" else clipped
        return a, a

    return net.propagate(prepared, activate)[0]


def _rates(
    net: SpikingNetwork, prepared: Prepared, num_steps: int, correction: Correction | None
) -> list[jax.Array]:
    """What every neuron has sent after T steps as a fraction of its threshold, signs included."""
    start = start_carry(net, prepared, correction)
    totals = net.shard([jnp.zeros(layer.shape, jnp.float32) for layer in net.layers])
    sums = net.coding == "sum"

    def step(carry: Any, _: None) -> tuple[Any, None]:
        state, totals, means = carry

        def fire(i: int, x: jax.Array) -> tuple[Any, jax.Array]:
            after, out = net.neuron.step(state[i], x, net.layers[i].threshold)
            # With sum coding x and out are totals already.
            return (after, out if sums else totals[i] + out), out

        kept, _, means = net.advance(prepared, means, fire)
        return (*zip(*kept, strict=True), means), None

    first = (start.state, totals, start.means)
    (_, totals, _), _ = jax.lax.scan(step, first, length=num_steps)
    pairs = zip(totals, net.layers, strict=True)
    return [total / ((1 if sums else num_steps) * layer.threshold) for total, layer in pairs]


def conversion_report(
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    reference: Reference = "rounded",
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
) -> dict[str, LayerReport]:
    """Measures of each layer what its neurons do, its error at every t, and its occasional noise.

    Occasional noise is the number of spikes c_i(T) of a neuron, negative ones taken off, minus what
    the same neuron would send if the same current arrived evenly, the same at every step:

        c_i(T) - clip(floor((sum_t x_i(t) + start) / th), 0, T).

    It is 0 where the current is constant, as that of an analog first layer. With sum coding it is
    what is missing to the quantized activation, in levels.

    Args:
        f: function whose activations are quantizers of `nadaptor`.
        *args: its arguments.
        num_steps: T.
        reference: what the error is against, as in `layer_errors`: "clipped" for `clipped_relu`, as
            a calibration makes it.
        neuron: as in `nadaptor.simulate`.
        coding: as in `nadaptor.simulate`.
        nonaffine: as in `nadaptor.simulate`.
        correction: as in `nadaptor.simulate`; its own steps are not counted, and the noise is that
            of a neuron which starts as without it.

    Returns:
        A `LayerReport` by the layer's name, in the order of evaluation.

    Raises:
        ValueError: as `nadaptor.simulate`, or an unknown reference.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> found = conversion_report(f, jnp.array([0.0, 0.5, 1.0, 2.0]), num_steps=4)["layer0"]
        >>> found.silent.item(), found.saturated.item(), found.noise[MOST_NOISE].item()
        (0.25, 0.5, 4)

    Source: Noise Adaptor, sections 1 and 3; Bu et al., QCFS, 2022 ("unevenness error").
    """
    _check_reference(reference)
    net = spiking(f, *args, neuron=neuron, coding=coding, nonaffine=nonaffine)
    prepared, steps = net.prepare(*args), check_count(num_steps, "num_steps")
    wanted = analog_activations(net, prepared, reference)
    start, sums = start_carry(net, prepared, correction), net.coding == "sum"
    zeros = net.shard([jnp.zeros(layer.shape, jnp.float32) for layer in net.layers])

    def step(carry: Any, t: jax.Array) -> tuple[Any, list[jax.Array]]:
        state, totals, fired, currents, means = carry

        def fire(i: int, x: jax.Array) -> tuple[Any, jax.Array]:
            threshold = net.layers[i].threshold
            after, out = net.neuron.step(state[i], x, threshold)
            total = out if sums else totals[i] + out
            spikes = jnp.abs(out - totals[i] if sums else out / threshold)
            current = x if sums else currents[i] + x
            return (after, total, fired[i] + spikes, current), out

        kept, _, means = net.advance(prepared, means, fire)
        state, totals, fired, currents = zip(*kept, strict=True)
        each = [
            jnp.abs(total / layer.threshold / (1 if sums else t) - q / layer.threshold).mean()
            for total, layer, q in zip(totals, net.layers, wanted, strict=True)
        ]
        return (state, totals, fired, currents, means), each

    first = (start.state, zeros, zeros, zeros, start.means)
    times = jnp.arange(1, steps + 1, dtype=jnp.float32)
    (_, totals, fired, currents, _), errors = jax.lax.scan(step, first, times)
    parts = zip(net.layers, totals, fired, currents, errors, strict=True)
    return {
        layer.name: _layer_report(layer, total, spikes, current, error, steps, sums)
        for layer, total, spikes, current, error in parts
    }


def _check_reference(reference: str) -> None:
    if reference not in ("rounded", "clipped"):
        raise ValueError(f"reference must be 'rounded' or 'clipped', not {reference!r}")


def _layer_report(
    layer: Any,
    total: jax.Array,
    spikes: jax.Array,
    current: jax.Array,
    error: jax.Array,
    steps: int,
    sums: bool,
) -> LayerReport:
    unit, most = (1, layer.threshold) if sums else (layer.threshold, steps)
    start = layer.start / layer.threshold if sums else layer.start
    expected = jnp.clip(jnp.floor((current + start) / unit), 0, most)
    # XLA may divide by a constant through its reciprocal.
    sent = jnp.round(total / unit)
    noise = jnp.clip(sent - expected, -MOST_NOISE, MOST_NOISE).astype(jnp.int32)
    return LayerReport(
        (spikes == 0).mean(dtype=jnp.float32),
        (sent == most).mean(dtype=jnp.float32),
        spikes.mean() / steps,
        error,
        jnp.bincount(noise.ravel() + MOST_NOISE, length=2 * MOST_NOISE + 1).astype(jnp.int32),
    )
