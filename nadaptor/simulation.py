"""The simulation of a spiking network over time: one `lax.scan` that carries the membrane state.

Several time steps may be folded into the batch (`steps_per_chunk`): each operation between neurons
then runs once on the spikes of K steps, and only the neurons go through them one by one. Memory
grows with K and not with the number of steps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from nadaptor._checks import check_count
from nadaptor._execution.placement import shard_like
from nadaptor._execution.shards import in_shards
from nadaptor._execution.tiles import (
    SHARED,
    batch_axis,
    choose_sizes,
    example_axes,
    in_tiles,
    merge_axes,
)
from nadaptor.neurons import IntegrateAndFire, Neuron, State
from nadaptor.transformation import Prepared, SpikingNetwork, spiking

R = TypeVar("R")


class Correction(Protocol):
    """What the simulator asks of a correction: a better start state, bought with some steps."""

    num_steps: int

    def start(self, net: SpikingNetwork, prepared: Prepared) -> tuple[State, ...]:
        """Returns the state from which the counted steps begin."""
        ...


class Simulation(NamedTuple):
    """What a simulation of T steps gives."""

    outputs: Any  # pytree of [T, ...]: at index t - 1, the mean of the outputs of steps 1 to t
    spike_counts: tuple[jax.Array, ...]  # a layer: int32, spikes of each neuron in T steps
    total_steps: int | jax.Array  # T, and the steps that the correction spent


class Sizes(NamedTuple):
    """How much to do at a time; None for what suits the machine."""

    num_steps: int  # T
    steps_per_chunk: int | None
    tile_size: int | None


class Carry(NamedTuple):
    """What goes from one chunk of steps to the next."""

    state: tuple[State, ...]
    total: Any
    counts: tuple[jax.Array, ...]
    time: jax.Array


def simulate(
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    neuron: Neuron = IntegrateAndFire(),
    correction: Correction | None = None,
    steps_per_chunk: int | None = None,
    in_axes: int | Sequence[Any] | None = None,
    tile_size: int | None = None,
    devices: Sequence[Any] | None = None,
    fast_convolution: bool = False,
) -> Simulation:
    """Simulates a function with quantized activations as a spiking network over T time steps.

    The analog input is the same at every step, and the output at step t is the mean over the steps
    so far. A call traces `f` anew: for speed, `jax.jit` the function that calls it, once for each
    shape.

    Args:
        f: function whose activations are quantizers of `nadaptor`; see `nadaptor.spiking`.
        *args: its arguments, pytrees of arrays.
        num_steps: T, the number of time steps.
        neuron: the neuron of all layers.
        correction: prepares the start state, such as `OffsetSpikes` or `Srp`; None for none.
        steps_per_chunk: K, the steps folded into one evaluation of the operations between
            neurons; None for 1, and with `in_axes` for a number that suits the machine. T need not
            be a multiple. The result is the same up to the rounding of sums that XLA regroups.
        in_axes: as in `jax.vmap`, declares that `f` treats the examples along these axes of its
            arguments independently, and that its outputs have them along axis 0. None for no
            assumption.
        tile_size: number of examples to simulate at a time (needs `in_axes`); None for as many as
            stay in the cache on a CPU, and for all elsewhere or without `in_axes`.
        devices: where to run equal parts of the examples (needs `in_axes`); None for where the
            arguments are. On a CPU of several cores this is much faster than one device, with
            `jax.config.update("jax_num_cpu_devices", cores)` before jax is first used.
        fast_convolution: as in `nadaptor.spiking`: faster on a CPU, and a few spikes may flip.

    Returns:
        A `Simulation`: running means `outputs` with time as the leading axis, `spike_counts` and
        `total_steps`.

    Raises:
        ValueError: a count is not a positive int, `tile_size` or `devices` is given without
            `in_axes`, the examples do not divide by the devices, or `f` cannot be converted (see
            `nadaptor.spiking`).

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> sim = nadaptor.simulate(f, jnp.array([0.2, 0.6, 2.0]), num_steps=4)
        >>> sim.outputs[3], sim.spike_counts
        (Array([0.25, 0.5 , 1.  ], dtype=float32), (Array([1, 2, 4], dtype=int32),))

    Source: Noise Adaptor, Eq. 1, 2 and section 5.1.
    """
    num_steps = check_count(num_steps, "num_steps")

    def run(net: SpikingNetwork, prepared: Prepared, chunk: int) -> Simulation:
        return run_network(net, prepared, num_steps, chunk, correction)

    convert = functools.partial(spiking, f, neuron=neuron, fast_convolution=fast_convolution)
    sizes = Sizes(num_steps, steps_per_chunk, tile_size)

    def out_axes(whole: SpikingNetwork, part: SpikingNetwork) -> Any:
        pairs = zip(part.layers, whole.layers, strict=True)
        return Simulation(1, tuple(batch_axis(a.shape, b.shape) for a, b in pairs), SHARED)

    def run_part(*args: Any) -> Simulation:
        return run_in_tiles(run, convert, args, in_axes, sizes, out_axes)

    if devices is None:
        return run_part(*args)
    _check_independent("devices", list(devices), in_axes)
    axes, number = example_axes(in_axes, args)
    net = convert(*args)
    return in_shards(
        run_part, args, axes, number, devices, lambda *part: out_axes(net, convert(*part))
    )


def run_in_tiles(
    run: Callable[[SpikingNetwork, Prepared, int], R],
    convert: Callable[..., SpikingNetwork],
    args: tuple[Any, ...],
    in_axes: int | Sequence[Any] | None,
    sizes: Sizes,
    out_axes: Callable[[SpikingNetwork, SpikingNetwork], Any],
) -> R:
    """Runs a network on all examples, or on a tile of them at a time where `in_axes` allows it.

    Args:
        run: runs a converted and prepared network by chunks of so many steps.
        convert: converts the function for arguments of given shapes.
        args: the function's arguments.
        in_axes: as in `simulate`.
        sizes: how much to do at a time.

    Raises:
        ValueError: a size is not a positive int, or there is a `tile_size` without `in_axes`.
    """
    num_steps, steps_per_chunk, tile_size = sizes
    for name, value in (("steps_per_chunk", steps_per_chunk), ("tile_size", tile_size)):
        _ = value is None or check_count(value, name)
    if tile_size is not None:
        _check_independent("tile_size", tile_size, in_axes)
    net = convert(*args)
    if in_axes is None:
        return run(net, net.prepare(*args), min(steps_per_chunk or 1, num_steps))
    axes, number = example_axes(in_axes, args)
    shapes = [layer.shape for layer in net.layers]
    tile, chunk = choose_sizes(shapes, number, num_steps, jax.default_backend())
    tile, chunk = tile_size or tile, min(steps_per_chunk or chunk, num_steps)
    if tile >= number:
        return run(net, net.prepare(*args), chunk)

    parts: list[SpikingNetwork] = []

    def start(*args: Any) -> Callable[..., Any]:
        part = convert(*args)
        parts.append(part)
        shared = part.prepare_shared(args, [axis is not None for axis in axes])
        return lambda *args: run(part, part.prepare(*args, shared=shared), chunk)

    return in_tiles(start, args, axes, number, tile, lambda: out_axes(net, parts[0]))


def run_network(
    net: SpikingNetwork,
    prepared: Prepared,
    num_steps: int,
    steps_per_chunk: int = 1,
    correction: Correction | None = None,
) -> Simulation:
    """Simulates a network that is already converted and prepared; `simulate` says the rest.

    Args:
        net: from `nadaptor.spiking`.
        prepared: from `net.prepare`.
        num_steps: T.
        steps_per_chunk: K, at most T.
        correction: prepares the start state, or None.

    Returns:
        A `Simulation`.
    """
    carry = start_carry(net, prepared, correction)
    chunks, rest = divmod(num_steps, steps_per_chunk)

    def body(carry: Carry, _: None) -> tuple[Carry, Any]:
        return run_chunk(net, prepared, carry, steps_per_chunk)

    carry, outputs = jax.lax.scan(body, carry, length=chunks)
    outputs = jax.tree.map(lambda x: merge_axes(x, 0), outputs)
    if rest:
        carry, last = run_chunk(net, prepared, carry, rest)
        outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
    spent = num_steps + (correction.num_steps if correction else 0)
    return Simulation(outputs, carry.counts, spent)


def start_carry(net: SpikingNetwork, prepared: Prepared, correction: Correction | None) -> Carry:
    """Returns what the first chunk begins with; the steps of the correction are run here."""
    state = net.shard(correction.start(net, prepared)) if correction else net.init(prepared)
    out = jax.eval_shape(lambda *args: net.step(*args), state, prepared)[1]

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return shard_like(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), x)

    counts = net.shard([jnp.zeros(layer.shape, jnp.int32) for layer in net.layers])
    return Carry(state, jax.tree.map(zeros, out), counts, jnp.int32(0))


def run_chunk(
    net: SpikingNetwork, prepared: Prepared, carry: Carry, size: int
) -> tuple[Carry, Any]:
    """Runs `size` steps together; returns the new carry and the running mean at each of them."""

    def fire(i: int, x: jax.Array) -> tuple[Any, jax.Array]:
        threshold = net.layers[i].threshold
        state, out = jax.lax.scan(
            lambda s, current: net.neuron.step(s, current, threshold),
            carry.state[i],
            x,
            unroll=size <= 8,
        )
        # XLA may divide by a constant through its reciprocal: 21 / 7 need not be 3.
        spikes = jnp.round(jnp.abs(out).sum(0) / threshold).astype(jnp.int32)
        return (state, carry.counts[i] + spikes), out

    kept, out = net.propagate(prepared, fire, steps=size)
    state, counts = zip(*kept, strict=True)
    total, sums = jax.lax.scan(_add, carry.total, out)
    steps = carry.time + 1 + jnp.arange(size)
    means = jax.tree.map(lambda x: x / steps.reshape(-1, *[1] * (x.ndim - 1)), sums)
    return Carry(state, total, counts, carry.time + size), means


def _check_independent(name: str, value: Any, in_axes: Any) -> None:
    if in_axes is None:
        raise ValueError(
            f"{name}={value} needs in_axes, as in jax.vmap, to say which axes of the arguments "
            "hold independent examples; for f(params, images): in_axes=(None, 0)"
        )


def _add(total: Any, out: Any) -> tuple[Any, Any]:
    total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, out)
    return total, total
