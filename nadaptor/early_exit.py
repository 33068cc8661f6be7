"""Early exit: each example stops at the first time step at which its prediction is sure enough.

`early_exit` reads it off a whole simulation, for many confidences at once;
`simulate_with_early_exit` does not run the steps that no example needs any more.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nadaptor._checks import check_count
from nadaptor._execution.frames import OverTime, axes_with_time, check_frames
from nadaptor._execution.placement import gather
from nadaptor._execution.shards import in_shards
from nadaptor._execution.steps import Carry, run_chunk
from nadaptor._execution.tiles import example_axes
from nadaptor.neurons import Coding, Neuron
from nadaptor.simulation import (
    Correction,
    Sizes,
    check_independent,
    check_no_mesh,
    run_in_tiles,
    start_carry,
)
from nadaptor.transformation import Nonaffine, Prepared, SpikingNetwork, spiking

# Of both fields: the examples.
_AXES: Any = (0, 0)


class EarlyExit(NamedTuple):
    """When each example stops and what it has then been classified as, for M thresholds."""

    steps: jax.Array  # [M, ...] int32: time steps run, 1 to T
    predictions: jax.Array  # [M, ...] int32: class at that step


def early_exit(outputs: jax.Array, thresholds: jax.Array) -> EarlyExit:
    """Stops each example at the first step at which its confidence reaches a threshold.

    The confidence at step t is the largest softmax probability of the running mean of the logits.
    An example that never reaches the threshold runs for all T steps. One simulation of T steps
    serves all thresholds: accuracy is `(predictions == labels).mean(-1)`, and the price
    `steps.mean(-1)`.

    Args:
        outputs: running means of the logits, [T, ..., classes], as in `Simulation.outputs`.
        thresholds: [M], confidences between 0 and 1; above 1 no example stops early.

    Returns:
        The steps and predictions, [M, ...].

    Raises:
        ValueError: `outputs` is not at least [T, classes], or `thresholds` is not a vector.

    Example:
        >>> outputs = jnp.array([[[1.0, 0.0], [0.1, 0.0]], [[1.0, 0.0], [0.0, 2.0]]])
        >>> exits = early_exit(outputs, jnp.array([0.7, 1.1]))
        >>> exits.steps.tolist(), exits.predictions.tolist()
        ([[1, 2], [2, 2]], [[0, 1], [0, 1]])

    Source: Li, Jones and Furber, Unleashing the potential of spiking neural networks by dynamic
    confidence, 2023.
    """
    outputs, thresholds = jnp.asarray(outputs), jnp.asarray(thresholds)
    if outputs.ndim < 2 or thresholds.ndim != 1:
        raise ValueError(
            "early_exit needs outputs [T, ..., classes] and a vector of thresholds, not shapes "
            f"{outputs.shape} and {thresholds.shape}"
        )
    confidence = jax.nn.softmax(outputs).max(-1)
    sure = confidence >= thresholds.reshape(-1, *[1] * confidence.ndim)
    last = outputs.shape[0] - 1
    # argmax gives the first of equal values: the first step that is sure.
    index = jnp.where(sure.any(1), sure.argmax(1), last)
    classes = outputs.argmax(-1)
    predictions = jax.vmap(lambda i: jnp.take_along_axis(classes, i[None], 0)[0])(index)
    return EarlyExit((index + 1).astype(jnp.int32), predictions.astype(jnp.int32))


def simulate_with_early_exit(
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    confidence: float,
    in_axes: int | Sequence[Any] | None = None,
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
    steps_per_chunk: int | None = None,
    tile_size: int | None = None,
    over_time: OverTime = (),
    devices: Sequence[Any] | None = None,
    fast_convolution: bool = False,
    events: bool = False,
) -> EarlyExit:
    """Simulates until every example of a tile is sure of its class, and for T steps at most.

    The result is that of `early_exit` on the outputs of `nadaptor.simulate`: a tile runs on until
    its last example stops, and in whole chunks of steps, but what runs then is not looked at.

    Args:
        f: as for `nadaptor.simulate`, a function that returns logits [B, classes].
        *args: its arguments.
        num_steps: T.
        confidence: the largest softmax probability of the running mean at which an example stops.
        in_axes: as for `nadaptor.simulate`: without it the whole batch runs until its last example
            stops.
        neuron: as for `nadaptor.simulate`.
        coding: as for `nadaptor.simulate`. With sum coding a tile stops, too, once no neuron in it
            fires any more.
        nonaffine: as for `nadaptor.simulate`.
        correction: as for `nadaptor.simulate`; its steps are run for all and not counted.
        steps_per_chunk: as for `nadaptor.simulate`.
        tile_size: as for `nadaptor.simulate`.
        over_time: as for `nadaptor.simulate`.
        devices: as for `nadaptor.simulate`; each stops when its own examples have.
        fast_convolution: as for `nadaptor.simulate`.
        events: as for `nadaptor.simulate`.

    Returns:
        The steps and predictions, [1, B]: those of one confidence.

    Raises:
        ValueError: as `nadaptor.simulate`, or for outputs that are not [B, classes].

    Example:
        >>> import nadaptor
        >>> f = lambda v: nadaptor.lsq(v, 1.0, levels=2)
        >>> v = jnp.array([[4.0, 0.0], [0.3, 0.2]])
        >>> exits = simulate_with_early_exit(f, v, num_steps=8, confidence=0.8)
        >>> exits.steps.tolist(), exits.predictions.tolist()
        ([[1, 8]], [[0, 0]])

    Source: Li, Jones and Furber, Unleashing the potential of spiking neural networks by dynamic
    confidence, 2023.
    """
    num_steps = check_count(num_steps, "num_steps")
    check_frames(args, over_time, num_steps, correction)
    in_axes = axes_with_time(in_axes, over_time, len(args))

    def run(net: SpikingNetwork, prepared: Prepared, chunk: int) -> EarlyExit:
        carry = start_carry(net, prepared, correction)
        if getattr(carry.total, "ndim", None) != 2:
            raise ValueError(
                "simulate_with_early_exit needs a function that returns logits [B, classes], not "
                f"{jax.tree.map(jnp.shape, carry.total)}"
            )
        running = jnp.zeros(carry.total.shape[0], jnp.int32)

        def body(loop: tuple[Carry, EarlyExit]) -> tuple[Carry, EarlyExit]:
            carry, means = run_chunk(net, prepared, loop[0], chunk)
            means = gather(means)
            times = carry.time - chunk + 1 + jnp.arange(chunk)
            return carry, _stop(loop[1], means, times, confidence, num_steps)

        _, exits = jax.lax.while_loop(
            lambda loop: (loop[1].steps == 0).any(), body, (carry, EarlyExit(running, running))
        )
        return exits

    options = dict(neuron=neuron, coding=coding, nonaffine=nonaffine, over_time=over_time)
    ways = {"fast_convolution": fast_convolution, "events": events}
    convert = functools.partial(spiking, f, **options, **ways)
    sizes = Sizes(num_steps, steps_per_chunk, tile_size)

    def run_part(*args: Any) -> EarlyExit:
        return run_in_tiles(run, convert, args, in_axes, sizes, lambda *_: EarlyExit(*_AXES))

    if devices is None:
        found = run_part(*args)
    else:
        check_independent("devices", list(devices), in_axes)
        check_no_mesh(args, "devices")
        axes, number = example_axes(in_axes, args)
        found = in_shards(run_part, args, axes, number, devices, lambda *_: EarlyExit(*_AXES))
    return jax.tree.map(lambda x: x[None], found)


def _stop(
    exits: EarlyExit, means: jax.Array, times: jax.Array, confidence: float, num_steps: int
) -> EarlyExit:
    """Adds the examples that stop in a chunk of steps; `steps` is 0 for those that have not."""
    sure = jax.nn.softmax(means).max(-1) >= confidence
    # At step T all stop, and so ends the loop; a chunk may run beyond it.
    sure |= (times >= num_steps)[:, None]
    first = sure.argmax(0)
    classes = jnp.take_along_axis(means.argmax(-1), first[None], 0)[0]
    now = sure.any(0) & (exits.steps == 0)
    return EarlyExit(
        jnp.where(now, times[first], exits.steps).astype(jnp.int32),
        jnp.where(now, classes, exits.predictions).astype(jnp.int32),
    )
