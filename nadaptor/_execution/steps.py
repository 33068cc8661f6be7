"""Some time steps of a spiking network at once, in either coding.

The operations between neurons run on the spikes of K steps together, and the neurons go through
them one by one. With rates the outputs of the steps are averaged; with sums they are what they are,
and of a neuron that never pauses steps in which none would fire are not run.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from nadaptor._execution.means import Means
from nadaptor._execution.sums import add_steps
from nadaptor.neurons import Coding, Neuron, State


class Network(Protocol):
    """What is asked of a network here: `nadaptor.SpikingNetwork` is one."""

    @property
    def layers(self) -> Sequence[Any]:
        """The layers of neurons, each with a `threshold`."""
        ...

    @property
    def neuron(self) -> Neuron:
        """The neuron of all layers."""
        ...

    @property
    def coding(self) -> Coding:
        """How spikes carry a number."""
        ...

    @property
    def communicates(self) -> bool:
        """Whether devices wait for each other at every step."""
        ...

    @property
    def mean_outputs(self) -> Sequence[bool]:
        """Of each output, whether it is a running mean already."""
        ...

    def advance(
        self,
        prepared: Any,
        means: Means | None,
        activate: Callable[..., Any],
        steps: int | None = None,
    ) -> tuple[tuple[Any, ...], Any, Means | None]:
        """Evaluates one step, or several together, with `activate` as the activation."""
        ...


class Carry(NamedTuple):
    """What goes from one chunk of steps to the next."""

    state: tuple[State, ...]
    means: Means | None
    total: Any  # of the outputs so far; of those that are means already, or sums, the last
    counts: tuple[Any, ...]  # a layer: the spikes of each neuron, or a `Sent`
    time: jax.Array


def run_chunk(net: Network, prepared: Any, carry: Carry, size: int) -> tuple[Carry, Any]:
    """Runs `size` steps together; returns the new carry and the network's output at each."""
    if net.coding == "rate":
        return _run_rates(net, prepared, carry, size)

    def rest(carry: Carry) -> tuple[Carry, Any]:
        same = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), carry.total)
        # Time goes on, by which an early exit ends at T.
        return carry._replace(time=carry.time + size), same

    run = functools.partial(_run_sums, net, prepared, size=size)
    # Devices that wait for each other have to run the same steps, and a neuron may only pause.
    if net.communicates or not getattr(net.neuron, "never_pauses", False):
        return run(carry)
    # One step without a spike is the last: every neuron would find what it found before.
    silent = (carry.time > 0) & (last_spike(carry) < carry.time)
    return jax.lax.cond(silent, rest, run, carry)


def _run_rates(net: Network, prepared: Any, carry: Carry, size: int) -> tuple[Carry, Any]:
    def fire(i: int, x: jax.Array) -> tuple[Any, jax.Array]:
        state, out = _run_layer(net, i, carry.state[i], x)
        # XLA may divide by a constant through its reciprocal: 21 / 7 need not be 3.
        spikes = jnp.round(_sum_steps(jnp.abs(out)) / net.layers[i].threshold).astype(jnp.int32)
        return (state, carry.counts[i] + spikes), out

    kept, out, means = net.advance(prepared, carry.means, fire, steps=size)
    state, counts = zip(*kept, strict=True)
    steps = carry.time + 1 + jnp.arange(size)
    total, outputs = _average(net.mean_outputs, carry.total, out, steps)
    return Carry(state, means, total, counts, carry.time + size), outputs


def _run_sums(net: Network, prepared: Any, carry: Carry, size: int) -> tuple[Carry, Any]:
    def fire(i: int, x: jax.Array) -> tuple[Any, jax.Array]:
        state, totals = _run_layer(net, i, carry.state[i], x)
        return (state, add_steps(carry.counts[i], totals, carry.time)), totals

    kept, out, means = net.advance(prepared, carry.means, fire, steps=size)
    state, counts = zip(*kept, strict=True)
    last = jax.tree.map(lambda x: x[-1], out)
    return Carry(state, means, last, counts, carry.time + size), out


def _run_layer(net: Network, i: int, state: State, x: jax.Array) -> tuple[State, jax.Array]:
    """Runs the neurons of one layer through the steps along the leading axis of x."""
    threshold = net.layers[i].threshold
    # A few steps are unrolled: XLA then fuses the neurons with what counts their spikes.
    return jax.lax.scan(
        lambda s, current: net.neuron.step(s, current, threshold), state, x, unroll=_is_short(x)
    )


def _is_short(x: jax.Array) -> bool:
    return len(x) <= 8


def _sum_steps(x: jax.Array) -> jax.Array:
    """The sum of x [K, ...] over the steps."""
    # Of one step no slice: where ONNX has one, onnx's own evaluator has lost the axis of steps.
    if len(x) == 1:
        return x.reshape(x.shape[1:])
    # On a CPU XLA takes a sum over a leading axis out of the fusion around it, to a library that
    # needs more time for it than all convolutions of spikes.
    return functools.reduce(operator.add, x) if _is_short(x) else x.sum(0)


def last_spike(carry: Carry) -> jax.Array:
    """The last step at which any layer has sent a spike, with sum coding."""
    return jnp.stack([sent.last for sent in carry.counts]).max()


def _average(are_means: Sequence[bool], total: Any, out: Any, steps: jax.Array) -> tuple[Any, Any]:
    """Adds outputs [K, ...] to their total; returns it, and the mean up to each step."""
    tree, leaves = jax.tree.structure(out), jax.tree.leaves(out)
    last, averaged = [x[-1] for x in leaves], leaves
    adding = [i for i, is_mean in enumerate(are_means) if not is_mean]
    before = jax.tree.leaves(total)
    # One after the other, as at one step a time: the sum does not depend on the chunk.
    rates = [before[i] for i in adding], [leaves[i] for i in adding]
    # The length, as all outputs may be means, and nothing is then left to scan over.
    sums, each = jax.lax.scan(_add, *rates, length=len(steps))
    for i, after, x in zip(adding, sums, each, strict=True):
        number = steps.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        last[i], averaged[i] = after, x / number
    return tree.unflatten(last), tree.unflatten(averaged)


def _add(total: Any, out: Any) -> tuple[Any, Any]:
    # The total of outputs in half precision is float32.
    total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, out)
    return total, total
