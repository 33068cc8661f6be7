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
from nadaptor._execution.frames import OverTime, axes_with_time, check_frames
from nadaptor._execution.placement import explicit_axes, shard_like
from nadaptor._execution.shards import in_shards
from nadaptor._execution.steps import Carry, last_spike, run_chunk
from nadaptor._execution.sums import nothing_sent
from nadaptor._execution.tiles import (
    SHARED,
    batch_axis,
    check_example_outputs,
    choose_sizes,
    example_axes,
    in_tiles,
    merge_axes,
)
from nadaptor._jaxpr.examples import Operand, check_apart
from nadaptor._jaxpr.plan import VARYING
from nadaptor.neurons import Coding, Neuron, State
from nadaptor.transformation import Nonaffine, Prepared, SpikingNetwork, spiking

R = TypeVar("R")


class Correction(Protocol):
    """What the simulator asks of a correction: a better start state, bought with some steps."""

    num_steps: int

    def start(self, net: SpikingNetwork, prepared: Prepared) -> tuple[State, ...]:
        """Returns the state from which the counted steps begin."""
        ...


class Simulation(NamedTuple):
    """What a simulation of T steps gives."""

    # A pytree of [T, ...]. At index t - 1: the mean of the outputs of steps 1 to t, and with sum
    # coding the output for the sums of the spikes of steps 1 to t.
    outputs: Any
    spike_counts: tuple[jax.Array, ...]  # a layer: int32, spikes of each neuron in T steps
    total_steps: int | jax.Array  # T, and the steps that the correction spent
    # With sum coding only: those of `spike_counts` that are negative, and the last step at which
    # any neuron sent one; where that is below T, the outputs are the quantized network's.
    negative_counts: tuple[jax.Array, ...] | None = None
    settled: jax.Array | None = None


class Sizes(NamedTuple):
    """How much to do at a time; None for what suits the machine."""

    num_steps: int  # T
    steps_per_chunk: int | None
    tile_size: int | None


def simulate(
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
    steps_per_chunk: int | None = None,
    in_axes: int | Sequence[Any] | None = None,
    tile_size: int | None = None,
    over_time: OverTime = (),
    devices: Sequence[Any] | None = None,
    fast_convolution: bool = False,
    events: bool = False,
) -> Simulation:
    """Simulates a function with quantized activations as a spiking network over T time steps.

    The analog input is the same at every step, or has a frame for each (`over_time`). The output at
    step t is the mean over the steps so far. With sum coding it is what `f` makes of the sums of
    all spikes so far; once no neuron fires any more the network is the quantized one, and the steps
    left over are not run. A call traces `f` anew: for speed, `jax.jit` the function that calls it,
    once for each shape. A neuron has a gradient only by its `surrogate`: without one, gradients are
    zero before the last neurons.

    Args:
        f: function whose activations are quantizers of `nadaptor`; see `nadaptor.spiking`.
        *args: its arguments, pytrees of arrays.
        num_steps: T, the number of time steps.
        neuron: the neuron of all layers; None for the one of the coding.
        coding: how spikes carry a number, "rate" or "sum"; see `nadaptor.spiking`.
        nonaffine: what to do where an operation on rates is not affine, "refuse" or
            "running_mean"; see `nadaptor.spiking`.
        correction: prepares the start state, such as `OffsetSpikes` or `Srp`; None for none. They
            are made for rates.
        steps_per_chunk: K, the steps folded into one evaluation of the operations between
            neurons; None for 1, and with `in_axes` for a number that suits the machine. T need not
            be a multiple. The result is the same up to the rounding of sums that XLA regroups.
        in_axes: as in `jax.vmap`, declares that `f` treats the examples along these axes of its
            arguments independently, and that its outputs have them along axis 0; a sum over them
            is refused where it is seen. None for no assumption.
        tile_size: number of examples to simulate at a time (needs `in_axes`); None for as many as
            stay in the cache on a CPU, and for all elsewhere or without `in_axes`.
        over_time: which arguments vary over time, a number or several as in `argnums` of
            `jax.grad`: they have a leading axis of T frames, one for each step, which `f` gets
            without it and `in_axes` does not count. A correction reads the first frames first, and
            the counted steps read all of them. Rates only.
        devices: where to run equal parts of the examples (needs `in_axes`); None for where the
            arguments are. On a CPU of several cores this is much faster than one device, with
            `jax.config.update("jax_num_cpu_devices", cores)` before jax is first used.
        fast_convolution: as in `nadaptor.spiking`: faster on a CPU, and a few spikes may flip.
        events: as in `nadaptor.spiking`: faster on a CPU where spikes are few, by a kernel in C++.

    Returns:
        A `Simulation`: `outputs` with time as the leading axis, `spike_counts` and `total_steps`,
        and with sum coding `negative_counts` and `settled`.

    Raises:
        ValueError: a count is not a positive int, `tile_size` or `devices` is given without
            `in_axes`, the examples do not divide by the devices, there is a correction with sum
            coding, there is not one frame for each step, or `f` cannot be converted (see
            `nadaptor.spiking`).

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 0.5, levels=2)
        >>> sim = nadaptor.simulate(f, jnp.array([0.2, 0.6, 2.0]), num_steps=4)
        >>> sim.outputs[3], sim.spike_counts
        (Array([0.25, 0.5 , 1.  ], dtype=float32), (Array([1, 2, 4], dtype=int32),))
        >>> sim = nadaptor.simulate(f, jnp.array([0.2, 0.6, 2.0]), num_steps=4, coding="sum")
        >>> sim.outputs[3], sim.settled.item()
        (Array([0. , 0.5, 1. ], dtype=float32), 2)

    Source: Noise Adaptor, Eq. 1, 2 and section 5.1; You et al., 2024 (sum coding).
    """
    num_steps = check_count(num_steps, "num_steps")
    check_frames(args, over_time, num_steps, correction)
    in_axes = axes_with_time(in_axes, over_time, len(args))

    def run(net: SpikingNetwork, prepared: Prepared, chunk: int) -> Simulation:
        sim = run_network(net, prepared, num_steps, chunk, correction)
        # With an axis, along which tiles and devices are joined; `_together` takes the last.
        return sim if sim.settled is None else sim._replace(settled=sim.settled[None])

    options = dict(neuron=neuron, coding=coding, nonaffine=nonaffine, over_time=over_time)
    ways = {"fast_convolution": fast_convolution, "events": events}
    convert = functools.partial(spiking, f, **options, **ways)
    sizes = Sizes(num_steps, steps_per_chunk, tile_size)

    def out_axes(whole: SpikingNetwork, part: SpikingNetwork) -> Any:
        pairs = zip(part.layers, whole.layers, strict=True)
        # Axis 0 of the outputs is time.
        axes = Simulation(1, tuple(batch_axis(a.shape, b.shape) for a, b in pairs), SHARED)
        sums = axes._replace(negative_counts=axes.spike_counts, settled=0)
        return sums if coding == "sum" else axes

    def run_part(*args: Any) -> Simulation:
        return run_in_tiles(run, convert, args, in_axes, sizes, out_axes)

    if devices is None:
        return _together(run_part(*args))
    check_independent("devices", list(devices), in_axes)
    check_no_mesh(args, "devices")
    axes, number = example_axes(in_axes, args)
    # Of the whole only the shapes: its layers say where the examples are.
    net = convert(*args)
    check_examples(net, args, axes, number)

    def out_axes_of(*args: Any) -> Any:
        part = convert(*args)
        check_example_outputs(part.output_shapes, number // len(devices))
        return out_axes(net, part)

    return _together(in_shards(run_part, args, axes, number, devices, out_axes_of))


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
        check_independent("tile_size", tile_size, in_axes)
    net = convert(*args)
    if in_axes is None:
        return run(net, net.prepare(*args), min(steps_per_chunk or 1, num_steps))
    axes, number = example_axes(in_axes, args)
    check_examples(net, args, axes, number)
    shapes = [layer.shape for layer in net.layers]
    tile, chunk = choose_sizes(shapes, number, num_steps, jax.default_backend())
    leaves = jax.tree.leaves(args)
    if any(a is not None and explicit_axes(x, a) for x, a in zip(leaves, axes, strict=True)):
        _ = tile_size is None or check_no_mesh(args, "tile_size")
        # Each device has a part of the examples already, and XLA does not fold steps into it.
        tile, chunk = number, 1
    tile, chunk = tile_size or tile, min(steps_per_chunk or chunk, num_steps)
    if tile >= number:
        return run(net, net.prepare(*args), chunk)

    # First that of a whole tile, then that of what is left over.
    parts: list[SpikingNetwork] = []

    def start(*args: Any) -> Callable[..., Any]:
        part = convert(*args)
        check_example_outputs(part.output_shapes, number % tile if parts else tile)
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
    if net.coding == "rate":
        return Simulation(outputs, carry.counts, spent)
    counts = tuple(sent.positive + sent.negative for sent in carry.counts)
    negative = tuple(sent.negative for sent in carry.counts)
    return Simulation(outputs, counts, spent, negative, last_spike(carry))


def start_carry(net: SpikingNetwork, prepared: Prepared, correction: Correction | None) -> Carry:
    """Returns what the first chunk begins with; the steps of the correction are run here."""
    if net.coding == "sum" and correction:
        raise ValueError(
            f"{correction} corrects rates, and sum coding ends at the quantized network without "
            "it; pass correction=None"
        )
    first, means = net.init(prepared), net.init_means()
    out = jax.eval_shape(lambda *args: net.step(*args), first, prepared)[1]
    # The entry of the running means is carried apart from those of the layers.
    state = net.shard(correction.start(net, prepared)) if correction else first[: len(net.layers)]
    leaves, tree = jax.tree.flatten(out)
    # What is averaged here is added up in float32 at least; a mean or a sum stays as it comes.
    as_is = [net.coding == "sum" or is_mean for is_mean in net.mean_outputs]
    dtypes = [
        x.dtype if same else jnp.promote_types(x.dtype, jnp.float32)
        for x, same in zip(leaves, as_is, strict=True)
    ]
    total = [
        shard_like(jnp.zeros(x.shape, dtype), x) for x, dtype in zip(leaves, dtypes, strict=True)
    ]
    shapes = [layer.shape for layer in net.layers]
    none = [nothing_sent(x) if net.coding == "sum" else jnp.zeros(x, jnp.int32) for x in shapes]
    counts = net.shard(none)
    return Carry(state, means, tree.unflatten(total), counts, jnp.int32(0))


def _together(sim: Simulation) -> Simulation:
    """The parts of a batch have settled when the last has."""
    return sim if sim.settled is None else sim._replace(settled=sim.settled.max())


def check_no_mesh(args: Any, name: str) -> None:
    """Raises a ValueError where an explicit mesh shares the examples already."""
    for x in jax.tree.leaves(args):
        if axes := explicit_axes(x):
            raise ValueError(
                f"an argument lies on an explicit mesh, of axes {axes}, which shares the examples "
                f"already: leave {name} out, or call simulate inside jax.shard_map"
            )


def check_examples(
    net: SpikingNetwork, args: tuple[Any, ...], axes: Sequence[int | None], number: int
) -> None:
    """Raises a ValueError where the examples are mixed, as far as it is seen, or outputs lack them.

    Args:
        net: the network of all examples.
        args: the function's arguments, with frames where the network is traced for one of them.
        axes: axis of the examples in each leaf of the arguments, or None.
        number: number of examples.
    """
    check_example_outputs(net.output_shapes, number)
    operands = []
    for i, x, axis in zip(net._trace.inputs, jax.tree.leaves(args), axes, strict=True):
        # The network was traced for one frame, without the axis of time in front.
        time = net._plan.kinds.get(i) == VARYING
        axis = None if axis is None else axis % jnp.ndim(x) - time
        operands.append(Operand(jnp.shape(x)[time:], axis))
    check_apart(net._trace, operands)


def check_independent(name: str, value: Any, in_axes: Any) -> None:
    """Raises a ValueError for an option that parts the examples, without `in_axes`."""
    if in_axes is None:
        raise ValueError(
            f"{name}={value} needs in_axes, as in jax.vmap, to say which axes of the arguments "
            "hold independent examples; for f(params, images): in_axes=(None, 0)"
        )
