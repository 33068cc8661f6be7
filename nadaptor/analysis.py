"""What a simulation cost and how good it was: firing rates, layer errors.

Everything here reads what `nadaptor.simulate` returns or a traced network, and changes neither.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nadaptor._checks import check_count
from nadaptor.neurons import Coding, Neuron
from nadaptor.quantizers import round_half_up
from nadaptor.simulation import Correction, Simulation, start_carry
from nadaptor.transformation import Nonaffine, Prepared, SpikingNetwork, spiking

Reference = Literal["rounded", "clipped"]


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
    if reference not in ("rounded", "clipped"):
        raise ValueError(f"reference must be 'rounded' or 'clipped', not {reference!r}")
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
            return (after, out if sums else totals[i] + out), out

        kept, _, means = net.advance(prepared, means, fire)
        return (*zip(*kept, strict=True), means), None

    first = (start.state, totals, start.means)
    (_, totals, _), _ = jax.lax.scan(step, first, length=num_steps)
    pairs = zip(totals, net.layers, strict=True)
    return [total / ((1 if sums else num_steps) * layer.threshold) for total, layer in pairs]
