"""Corrections of occasional noise at inference: some steps are spent to find a better start state.

A correction is a value with `num_steps`, what it spends, and one method `start(net, prepared)` that
returns the state from which the counted steps begin. It works on whatever `nadaptor.spiking`
accepts. The third correction of the paper, negative spikes, is a neuron: `SignedIntegrateAndFire`.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nadaptor._checks import check_count
from nadaptor._execution.placement import shard_like
from nadaptor.neurons import IntegrateAndFire, State, Threshold
from nadaptor.transformation import Prepared, SpikingNetwork

Saturated = Literal["capped", "published"]


# For infinity, which `jax_debug_infs` takes for a fault.
_LARGEST = float(jnp.finfo(jnp.float32).max)


class _Record(NamedTuple):
    """What one neuron did in the first stage, in units of its threshold."""

    potential: jax.Array  # after the last step
    fired: jax.Array  # whether it has fired at all
    lowest_fired: jax.Array  # smallest potential, before the reset, at which it fired
    highest_silent: jax.Array  # largest potential at which it did not


@dataclasses.dataclass(frozen=True)
class OffsetSpikes:
    """Shifts the start potential of neurons that fired once too often or too seldom.

    Layer by layer, each neuron first runs for `num_steps` steps. Where it ends below zero and has
    fired, its start falls by `max(1, m+ - 0.999)`, m+ the smallest potential at which it fired,
    and so one spike is gone; where it ends at the threshold or above, its start rises by
    `max(1, 1.001 - m-)`, m- the largest potential at which it was silent, and one spike is gained;
    all in units of the threshold. It then runs again from that start on the same currents, and
    the next layer sees the corrected spikes. Nothing is stored over the counted steps.

    Attributes:
        num_steps: rho, the steps of the first stage; the authors use 4 on CIFAR and 8 on ImageNet.
        saturated: what to do with a neuron that fired at every step and ends at the threshold or
            above, where m- is undefined. "capped" shifts by 1; "published" is the authors' code,
            whose m- starts at -1000, so that the output is biased for about 1000 steps.

    Raises:
        ValueError: `num_steps` is not a positive int, or an unknown `saturated`.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 1.0, levels=4)
        >>> sim = nadaptor.simulate(f, jnp.ones(3), num_steps=4, correction=OffsetSpikes(4))
        >>> sim.outputs[-1], int(sim.total_steps)
        (Array([1., 1., 1.], dtype=float32), 8)

    Source: Hao et al., Bridging the gap between ANNs and SNNs by calibrating offset spikes, 2023.
    """

    num_steps: int
    saturated: Saturated = "capped"

    def __post_init__(self) -> None:
        """Checks the options."""
        check_count(self.num_steps, "num_steps")
        if self.saturated not in ("capped", "published"):
            raise ValueError(f"saturated must be 'capped' or 'published', not {self.saturated!r}")

    def start(self, net: SpikingNetwork, prepared: Prepared) -> tuple[State, ...]:
        """Returns the corrected start state of every layer."""
        # Both stages run plain neurons; the network's own begin where these lead.
        neuron = IntegrateAndFire()

        def fire(i: int, x: jax.Array) -> tuple[State, jax.Array]:
            layer = net.layers[i]
            begin = neuron.init(layer.shape, layer.threshold, layer.start)
            begin = shard_like(begin, jax.typeof(x[0]))
            corrected = begin + layer.threshold * self._shift(_observe(begin, x, layer.threshold))
            _, out = jax.lax.scan(lambda u, c: neuron.step(u, c, layer.threshold), corrected, x)
            return net.neuron.init(layer.shape, layer.threshold, corrected), out

        return net.propagate(prepared, fire, steps=self.num_steps)[0]

    def _shift(self, seen: _Record) -> jax.Array:
        # A neuron that was never silent has no m-: 0.001 makes its shift 1.
        undefined = 0.001 if self.saturated == "capped" else -1000.0
        silent = jnp.where(seen.highest_silent == -_LARGEST, undefined, seen.highest_silent)
        # So shifted, m+ is 0.999 and fires no more, and m- is 1.001 and fires.
        lower = jnp.maximum(1.0, seen.lowest_fired - 0.999)
        higher = jnp.maximum(1.0, 1.001 - silent)
        surplus = (seen.potential < 0) & seen.fired
        return jnp.where(surplus, -lower, jnp.where(seen.potential >= 1, higher, 0.0))


@dataclasses.dataclass(frozen=True)
class Srp:
    """Silences the neurons whose potential ends at or below zero after a first run.

    The whole network runs for `num_steps` steps; neurons left with a potential of at most 0.001
    thresholds are silent from then on, and the others begin again from their ordinary start. Only
    the second stage counts.

    Attributes:
        num_steps: tau, the steps of the first stage; the authors use 4 on CIFAR, 8-14 on ImageNet.

    Raises:
        ValueError: `num_steps` is not a positive int.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 1.0, levels=4)
        >>> sim = nadaptor.simulate(f, jnp.array([-1.0, 1.0]), num_steps=4, correction=Srp(4))
        >>> sim.outputs[-1]
        Array([0., 1.], dtype=float32)

    Source: Hao et al., Reducing ANN-SNN conversion error through residual membrane potential, 2023.
    """

    num_steps: int

    def __post_init__(self) -> None:
        """Checks the option."""
        check_count(self.num_steps, "num_steps")

    def start(self, net: SpikingNetwork, prepared: Prepared) -> tuple[State, ...]:
        """Returns the ordinary start state, the least number for silenced neurons."""
        # Plain neurons, whose state is the potential.
        plain = dataclasses.replace(net, neuron=IntegrateAndFire())
        potentials, _ = jax.lax.scan(
            lambda state, _: (plain.step(state, prepared)[0], None),
            plain.init(prepared),
            length=self.num_steps,
        )
        return tuple(
            # From so far below no current can lift a neuron to its threshold.
            net.neuron.init(
                layer.shape,
                layer.threshold,
                jnp.where(u > 1e-3 * layer.threshold, layer.start, -_LARGEST),
            )
            # A network with running means has an entry for them after those of its layers.
            for layer, u in zip(net.layers, potentials, strict=False)
        )


def _observe(begin: jax.Array, currents: jax.Array, threshold: Threshold) -> _Record:
    """Runs the first stage of one layer and records what `OffsetSpikes` needs."""
    neuron = IntegrateAndFire()

    def step(seen: tuple[jax.Array, _Record], x: jax.Array) -> tuple[tuple, None]:
        u, record = seen
        after, out = neuron.step(u, x, threshold)
        before, fired = (u + x) / threshold, out > 0
        return (
            after,
            _Record(
                after / threshold,
                record.fired | fired,
                jnp.minimum(record.lowest_fired, jnp.where(fired, before, _LARGEST)),
                jnp.maximum(record.highest_silent, jnp.where(fired, -_LARGEST, before)),
            ),
        ), None

    like = jax.typeof(begin)
    largest, none = jnp.full_like(begin, _LARGEST), jnp.zeros_like(begin, bool)
    largest, none = shard_like(largest, like), shard_like(none, like)
    record = _Record(begin / threshold, none, largest, -largest)
    return jax.lax.scan(step, (begin, record), currents)[0][1]
