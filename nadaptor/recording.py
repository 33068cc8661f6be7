"""What the neurons of a spiking network do at each step: spike trains, potentials and currents.

The network is stepped as `nadaptor.simulate` steps it, and the scan stacks what is asked for: the
memory is that of the chosen quantities of the chosen neurons times T, and of nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor._checks import check_count
from nadaptor._execution.frames import OverTime, check_frames
from nadaptor.neurons import Coding, Count, Neuron, State
from nadaptor.simulation import Correction, start_carry
from nadaptor.transformation import Nonaffine, SpikingNetwork, spiking

QUANTITIES = ("spikes", "potentials", "currents")


class LayerRecording(NamedTuple):
    """What was recorded of one layer; None for what was not asked for."""

    spikes: jax.Array | None  # [T, ...] int8: 1, -1 for a spike taken back, 0 for none
    potentials: jax.Array | None  # [T, ...] float32, after the step's reset, in units of the scale
    currents: jax.Array | None  # [T, ...] float32, what arrives at the step, in the same units


Recording = dict[str, LayerRecording]
"""Each recorded layer by its name, in the order of evaluation."""


def record(
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    layers: Sequence[str] | Mapping[str, Any] | None = None,
    quantities: Sequence[str] = QUANTITIES,
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
    over_time: OverTime = (),
) -> Recording:
    """Records what chosen neurons do in each of T time steps.

    With `IntegrateAndFire`, z the spikes, x the currents and u the potentials are those of Eq. 1
    and 2, `u_t = u_{t-1} + x_t - threshold * z_t`. With sum coding a spike is worth 1, the scale,
    and `u_t = u_{t-1} + x_t - z_t`. The first step begins at the layer's start potential, or where
    the correction leaves it. `nadaptor.simulate` gives the outputs.

    Args:
        f: function whose activations are quantizers of `nadaptor`.
        *args: its arguments.
        num_steps: T.
        layers: names of layers, those of `nadaptor.spiking(f, *args).layers`; or a mapping from
            names to an index of the layer's array, batch axis included, that picks neurons, such
            as `{"layer0": np.s_[0, :, :, 3]}`. None for all neurons of all layers.
        quantities: what to record, some of "spikes", "potentials" and "currents".
        neuron: as in `nadaptor.simulate`. Potentials are known of this package's neurons, and of
            yours if their state is the potential or has an attribute `potential`.
        coding: as in `nadaptor.simulate`.
        nonaffine: as in `nadaptor.simulate`.
        correction: as in `nadaptor.simulate`; its own steps are not recorded.
        over_time: as in `nadaptor.simulate`.

    Returns:
        A `LayerRecording` for each chosen layer by its name, time leading.

    Raises:
        ValueError: as `nadaptor.simulate`, or there is no such layer, neuron or quantity.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> rec = nadaptor.record(f, jnp.array([0.25, 0.5]), num_steps=4)
        >>> rec["layer0"].spikes.T.tolist()
        [[0, 1, 0, 0], [1, 0, 1, 0]]
        >>> rec["layer0"].potentials[:, 0].tolist()
        [1.5, 0.0, 0.5, 1.0]

    Source: Noise Adaptor, Eq. 1 and 2.
    """
    num_steps = check_count(num_steps, "num_steps")
    unknown = [name for name in quantities if name not in QUANTITIES]
    if unknown or not quantities:
        raise ValueError(f"quantities={quantities!r}: name some of {', '.join(QUANTITIES)}")
    check_frames(args, over_time, num_steps, correction)
    net = spiking(f, *args, neuron=neuron, coding=coding, nonaffine=nonaffine, over_time=over_time)
    chosen = _choose(net, layers)
    prepared = net.prepare(*args)
    start = start_carry(net, prepared, correction)

    def step(carry: Any, _: None) -> tuple[Any, Recording]:
        state, means = carry

        def fire(i: int, x: jax.Array) -> tuple[Any, jax.Array]:
            layer = net.layers[i]
            after, out = net.neuron.step(state[i], x, layer.threshold)
            if layer.name not in chosen:
                return (after, None), out
            kept = _observe(net, i, after, x, out, quantities)
            return (after, jax.tree.map(lambda a: a[chosen[layer.name]], kept)), out

        kept, _, means = net.advance(prepared, means, fire)
        state, seen = zip(*kept, strict=True)
        pairs = zip(net.layers, seen, strict=True)
        return (state, means), {layer.name: s for layer, s in pairs if s is not None}

    _, stacked = jax.lax.scan(step, (start.state, start.means), length=num_steps)
    # A dict that has passed a scan is sorted by name.
    names = [layer.name for layer in net.layers if layer.name in chosen]
    return {name: _finish(net, stacked[name]) for name in names}


def spike_counts(recording: Recording) -> dict[str, jax.Array]:
    """Returns each recorded neuron's number of spikes, negative ones included, int32 [...].

    Args:
        recording: from `record`, with "spikes".

    Raises:
        ValueError: the spikes were not recorded.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> rec = nadaptor.record(f, jnp.array([0.25, 0.5]), num_steps=4)
        >>> spike_counts(rec)["layer0"].tolist()
        [1, 2]
    """
    trains = _trains(recording)
    return {name: jnp.abs(z).sum(0, dtype=jnp.int32) for name, z in trains.items()}


def mean_rates(recording: Recording) -> dict[str, jax.Array]:
    """Returns each layer's firing rate: spikes per recorded neuron and time step, a scalar.

    Args:
        recording: from `record`, with "spikes".

    Raises:
        ValueError: the spikes were not recorded.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> rec = nadaptor.record(f, jnp.array([0.25, 0.5]), num_steps=4)
        >>> mean_rates(rec)["layer0"].item()
        0.375
    """
    trains = _trains(recording)
    return {name: jnp.abs(z).mean(dtype=jnp.float32) for name, z in trains.items()}


def first_spikes(recording: Recording) -> dict[str, jax.Array]:
    """Returns the step of each recorded neuron's first spike, int32 [...]: 1 to T, 0 for none.

    Args:
        recording: from `record`, with "spikes".

    Raises:
        ValueError: the spikes were not recorded.

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> rec = nadaptor.record(f, jnp.array([0.0, 0.25, 0.5]), num_steps=4)
        >>> first_spikes(rec)["layer0"].tolist()
        [0, 2, 1]
    """

    def first(z: jax.Array) -> jax.Array:
        return jnp.where((z != 0).any(0), jnp.argmax(z != 0, 0) + 1, 0).astype(jnp.int32)

    return {name: first(z) for name, z in _trains(recording).items()}


def _choose(
    net: SpikingNetwork, layers: Sequence[str] | Mapping[str, Any] | None
) -> dict[str, Any]:
    """The index of the chosen neurons by the layer's name."""
    shapes = {layer.name: layer.shape for layer in net.layers}
    if isinstance(layers, str):
        layers = (layers,)
    if isinstance(layers, Mapping):
        chosen: dict[str, Any] = dict(layers)
    else:
        names: Sequence[str] = list(shapes) if layers is None else layers
        chosen = {name: ... for name in names}
    for name, index in chosen.items():
        if name not in shapes:
            raise ValueError(f"there is no layer {name!r}; the layers are {', '.join(shapes)}")
        try:
            # An array of the layer's shape that takes no memory, to try the index on.
            np.broadcast_to(np.int8(0), shapes[name])[index]
        except IndexError as error:
            raise ValueError(
                f"{index!r} does not index layer {name!r} of shape {list(shapes[name])}: {error}"
            ) from error
    return chosen


def _observe(
    net: SpikingNetwork,
    i: int,
    after: State,
    x: jax.Array,
    out: jax.Array,
    quantities: Sequence[str],
) -> LayerRecording:
    """What one step shows of a layer; with sum coding, what was sent and arrived so far."""
    threshold = 1 if net.coding == "sum" else net.layers[i].threshold
    return LayerRecording(
        jnp.round(out / threshold) if "spikes" in quantities else None,
        _potential(after, x) if "potentials" in quantities else None,
        x if "currents" in quantities else None,
    )


def _potential(state: State, x: jax.Array) -> jax.Array:
    """The potential in a neuron's state after a step."""
    if isinstance(state, Count):
        # What has arrived and is not sent: x - c + 1/2.
        return x - state.sent + state.start
    potential = getattr(state, "potential", state)
    if not isinstance(potential, jax.Array):
        raise ValueError(
            f"the potential in a state of type {type(state).__name__} is not known; call it "
            "potential there, or leave 'potentials' out of quantities"
        )
    return potential


def _finish(net: SpikingNetwork, stacked: LayerRecording) -> LayerRecording:
    """Turns what was stacked over time into what happened at each step."""
    spikes, potentials, currents = stacked
    if net.coding == "sum":
        spikes, currents = _differences(spikes), _differences(currents)
    return LayerRecording(None if spikes is None else spikes.astype(jnp.int8), potentials, currents)


def _differences(totals: jax.Array | None) -> jax.Array | None:
    return None if totals is None else jnp.diff(totals, axis=0, prepend=jnp.zeros_like(totals[:1]))


def _trains(recording: Recording) -> dict[str, jax.Array]:
    trains = {name: x.spikes for name, x in recording.items() if x.spikes is not None}
    if len(trains) < len(recording):
        raise ValueError("the recording holds no spikes; add 'spikes' to quantities")
    return trains
