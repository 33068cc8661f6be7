"""The transformation of a function with quantized activations into a spiking network.

As `jax.grad(f)` differentiates f, `spiking(f, *args)` replaces every quantized activation in f by a
neuron with a state. The function is traced and its operations are split in two: the *static* part,
which no spike reaches (the first layer on the analog input, every transform of a weight), is
evaluated once by `prepare`; the *spiking* part runs at every time step.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import core

from nadaptor._execution.batching import bind_steps
from nadaptor._execution.convolution import choose_way, faster_convolution, no_events
from nadaptor._execution.currents import layer_current
from nadaptor._execution.frames import OverTime, first_frames, frame_at
from nadaptor._execution.means import Averages, Means, step_numbers
from nadaptor._execution.placement import shard_like
from nadaptor._jaxpr.affine import describe
from nadaptor._jaxpr.layers import Layer, find_layers, fitting_neuron
from nadaptor._jaxpr.plan import MEAN, Plan, check_outputs, is_mean, kind_of, plan
from nadaptor._jaxpr.trace import Atom, Op, Trace, to_jaxpr, trace, variables
from nadaptor.neurons import Coding, Neuron, State

Prepared = tuple[jax.Array, ...]
Activate = Callable[[int, jax.Array], tuple[Any, jax.Array]]
Nonaffine = Literal["refuse", "running_mean"]


@dataclasses.dataclass(frozen=True, eq=False)
class SpikingNetwork:
    """A function turned into a spiking network; made by `spiking`.

    Its methods are pure: state goes in and comes out. `propagate` is what the others are made of.
    """

    layers: tuple[Layer, ...]
    neuron: Neuron
    coding: Coding
    output_shapes: Any  # the function's result as `jax.ShapeDtypeStruct`s
    _trace: Trace = dataclasses.field(repr=False)
    _plan: Plan = dataclasses.field(repr=False)
    _in_avals: tuple[Any, ...] = dataclasses.field(repr=False)
    _in_tree: Any = dataclasses.field(repr=False)
    _out_tree: Any = dataclasses.field(repr=False)

    @property
    def communicates(self) -> bool:
        """Whether devices wait for each other at every step, as for a `psum` of spikes."""
        return self._plan.communicates

    @property
    def analog(self) -> tuple[str, ...]:
        """The operations that act on running means, "max_pool at net.py:12": no spikes leave them.

        Each line of the user's code and function that it calls is named once.
        """
        kinds = self._plan.kinds
        ops = (op for op in self._plan.stepwise if is_mean(op, kinds))
        return tuple(dict.fromkeys(f"{describe(op)} at {op.location.source}" for op in ops))

    @property
    def mean_outputs(self) -> tuple[bool, ...]:
        """Of each array that the function returns, whether it is a running mean already."""
        return tuple(kind_of(self._plan.kinds, i) == MEAN for i in self._trace.outputs)

    def prepare(self, *args: Any, shared: Mapping[int, jax.Array] | None = None) -> Prepared:
        """Evaluates the static part, once for all time steps.

        Args:
            *args: as those of the function, with the shapes and dtypes it was traced for.
            shared: from `prepare_shared`, what need not be evaluated again.

        Returns:
            The arrays that the spiking part reads: weights, and currents from the analog input.

        Raises:
            ValueError: the arguments are not of the structure or shapes that were traced.
        """
        leaves = self._check_arguments(args)
        values = {**self._trace.consts, **dict(zip(self._trace.inputs, leaves, strict=True))}
        values.update(shared or {})
        _evaluate([op for op in self._plan.static if op.outputs[0] not in values], values)
        return tuple(jnp.asarray(values[i]) for i in self._plan.boundary)

    def prepare_shared(self, args: tuple[Any, ...], varying: Sequence[bool]) -> dict[int, Any]:
        """Evaluates what of the static part depends on some arguments alone, such as the weights.

        Args:
            args: as those of the function; of the varying ones only the shapes count.
            varying: for each leaf of `args`, whether it is to be another in each `prepare`.

        Returns:
            What `prepare` takes as `shared`.
        """
        leaves = self._check_arguments(args)
        inputs = zip(self._trace.inputs, leaves, varying, strict=True)
        known = {**self._trace.consts, **{i: leaf for i, leaf, varies in inputs if not varies}}
        shared: list[Op] = []
        available = set(known)
        for op in self._plan.static:
            if available.issuperset(variables(op.inputs)):
                shared.append(op)
                available.update(op.outputs)
        _evaluate(shared, known)
        return {i: known[i] for op in shared for i in op.outputs}

    def init(self, prepared: Prepared) -> tuple[State, ...]:
        """Returns the state before the first time step.

        It has one entry for each layer, and one more for the time and the running means if there
        are any, or arguments that vary over time.
        """
        neurons = [self.neuron.init(x.shape, x.threshold, x.start) for x in self.layers]
        means = self.init_means()
        return self.shard(neurons) + (() if means is None else (means,))

    def init_means(self) -> Means | None:
        """Returns time and running means before the first step; None where neither is needed."""

        def zeros(avals: Mapping[int, Any]) -> dict[int, jax.Array]:
            return {i: shard_like(jnp.zeros(x.shape, jnp.float32), x) for i, x in avals.items()}

        if not (self._plan.averaged or self._plan.frames):
            return None
        return Means(jnp.float32(0), zeros(self._plan.averaged), zeros(self._plan.fed))

    def shard(self, entries: Sequence[Any]) -> tuple[Any, ...]:
        """Gives a pytree for each layer the sharding that the layer has.

        What a scan carries has to begin where it ends: on an explicit mesh with the layer's
        sharding, and inside `shard_map` with the axes along which the layer varies.
        """
        avals = [op.avals[0] for op in self._plan.stepwise if op.mark is not None]
        return tuple(
            jax.tree.map(functools.partial(shard_like, like=aval), entry)
            for entry, aval in zip(entries, avals, strict=True)
        )

    def step(self, state: tuple[State, ...], prepared: Prepared) -> tuple[tuple[State, ...], Any]:
        """Runs one time step through all layers.

        Args:
            state: one entry for each layer, from `init` or the step before.
            prepared: from `prepare`.

        Returns:
            The new state, and the function's output for this step's spikes: the network's output
            after t steps is the mean of the outputs so far. With sum coding it is the function's
            output for all spikes so far, which is the network's output.
        """
        neurons, (means,) = state[: len(self.layers)], state[len(self.layers) :] or (None,)
        kept, out, means = self.advance(
            prepared, means, lambda i, x: self.neuron.step(neurons[i], x, self.layers[i].threshold)
        )
        return kept + (() if means is None else (means,)), out

    def propagate(
        self, prepared: Prepared, activate: Activate, steps: int | None = None
    ) -> tuple[tuple[Any, ...], Any]:
        """Evaluates the spiking part with `activate` in the place of each quantized activation.

        Args:
            prepared: from `prepare`.
            activate: takes the layer's number and its input x, float32 and in units of the scale;
                returns what to keep of the layer and what it passes on, in the units of x, as the
                body of `lax.scan` returns its carry and its output.
            steps: number of time steps to evaluate together. With it every spiking value, and so
                the x and result of `activate` and the output, has a leading axis of that length.

        Returns:
            What was kept, one entry for each layer, and the function's output. Running means begin
            at the first of these steps.
        """
        return self.advance(prepared, self.init_means(), activate, steps)[:2]

    def advance(
        self, prepared: Prepared, means: Means | None, activate: Activate, steps: int | None = None
    ) -> tuple[tuple[Any, ...], Any, Means | None]:
        """Does what `propagate` does, from the running means of the steps before.

        Args:
            prepared: from `prepare`.
            means: from `init_means` or the step before.
            activate: as for `propagate`.
            steps: as for `propagate`.

        Returns:
            What was kept, the function's output, and the running means after the last step.
        """
        values = dict(zip(self._plan.boundary, prepared, strict=True))
        averages = None if means is None else Averages(means, steps)
        if means is not None:
            t = step_numbers(means.time, steps)
            values.update({i: frame_at(values[i], t) for i in self._plan.frames})
        layers, kept = enumerate(self.layers), []
        for op in self._plan.stepwise:
            operands = [_read(values, atom) for atom in op.inputs]
            kinds = [kind_of(self._plan.kinds, atom) for atom in op.inputs]
            if op.mark is not None:
                i, layer = next(layers)
                x, dtype = operands[0], operands[0].dtype
                if averages is not None and layer.from_mean:
                    x = averages.current(op.inputs[0], x)
                current = layer_current(x, layer, steps, self.coding)
                keep, out = activate(i, current)
                kept.append(keep)
                # NaN is at no threshold: else a neuron would make a plausible zero of it.
                outputs = [jnp.where(jnp.isnan(current), current, out).astype(dtype)]
            else:
                if averages is not None and is_mean(op, self._plan.kinds):
                    operands = [
                        x if kind in (None, MEAN) else averages.mean(i, x)
                        for i, x, kind in zip(op.inputs, operands, kinds, strict=True)
                    ]
                outputs = bind_steps(op, operands, kinds, steps)
            values.update(zip(op.outputs, outputs, strict=True))
        outputs = [_read(values, atom) for atom in self._trace.outputs]
        after = None if averages is None else averages.after
        return tuple(kept), self._out_tree.unflatten(outputs), after

    def _check_arguments(self, args: tuple[Any, ...]) -> list[Any]:
        leaves, tree = jax.tree.flatten(args)
        if tree != self._in_tree:
            raise ValueError(
                f"the arguments have the structure {tree}, but the network was traced for "
                f"{self._in_tree}; call nadaptor.spiking again with arguments like these"
            )
        for leaf, aval in zip(leaves, self._in_avals, strict=True):
            shape = leaf.shape if hasattr(leaf, "shape") else jnp.shape(leaf)
            dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf), allow_extended_dtype=True)
            if shape != aval.shape or dtype != aval.dtype:
                raise ValueError(
                    f"an argument is {dtype}{list(shape)}, but the "
                    f"network was traced for {aval.dtype}{list(aval.shape)}; call "
                    "nadaptor.spiking again with arguments like these"
                )
        return leaves


def spiking(
    f: Callable[..., Any],
    *args: Any,
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    over_time: OverTime = (),
    fast_convolution: bool = False,
    events: bool = False,
) -> SpikingNetwork:
    """Turns a function with quantized activations into a spiking network (section 2.3, Eq. 6).

    Every activation of `nadaptor` in `f` becomes a layer of neurons with the threshold
    `levels * scale`; all else stays as it is. Calls, `jit`, `remat` and custom derivatives are
    looked through, and a `lax.scan` over layers is unrolled. A call traces `f` anew: for speed,
    `jax.jit` the function that calls it.

    Spikes carry a number by their mean over the steps ("rate": every operation between two neurons
    has to be affine) or by their sum ("sum": any operation will do, and after some steps the
    network is the quantized one exactly).

    Args:
        f: any JAX function, with any pytrees of arrays as arguments and result.
        *args: arguments of `f`, arrays or `jax.ShapeDtypeStruct`s, as for `jax.make_jaxpr`.
        neuron: the neuron to use in all layers; None for the one of the coding,
            `IntegrateAndFire()` or `StBif()`.
        coding: "rate", or "sum".
        nonaffine: what to do where an operation on rates is not affine: "refuse", or let it act on
            the "running_mean" of its inputs, and what follows it up to the next neuron too (see
            `analog`). The outputs approach those of the network with clipped ReLUs as 1/T.
        over_time: which arguments vary over time: they have a leading axis with a frame for each
            step, which `f` gets without it. What depends on frames alone, and on no spike, may be
            any operation.
        fast_convolution: whether 3x3 convolutions of spikes at stride 1, between 32 channels or
            more and 8 pixels or larger, go through Winograd's F(4x4, 3x3) or F(4, 3). It is faster
            on a CPU, and less exact: a few spikes may flip.
        events: whether 3x3 and 1x1 convolutions of spikes in float32 multiply spikes alone, by a
            C++ kernel made at its first use: on a CPU faster the fewer they are; a few may flip.
            A warning says why where none can. Gradients go densely.

    Returns:
        The network: `prepare`, `init`, `step` and the list of its `layers`.

    `jax.debug.print` and `jax.debug.callback` run at every step.

    Raises:
        ValueError: the function cannot be converted. The message names the operation, the line of
            the user's code and the remedy: an operation on spikes that is not affine, an output
            that no spike reaches, random numbers drawn outside a quantizer, a quantizer inside a
            `while`, `cond`, `shard_map` or `pmap`, no quantizer at all, or with sum coding a neuron
            made for rates, arguments that vary over time or more levels than float32 counts. Or
            both of the last two options are set.

    Example:
        >>> import nadaptor
        >>> f = lambda w, x: nadaptor.lsq(x, 0.5, levels=2) @ w
        >>> w, x = jnp.ones((3, 1)), jnp.array([0.2, 0.6, 2.0])
        >>> net = nadaptor.spiking(f, w, x)
        >>> prepared = net.prepare(w, x)
        >>> state, out = net.step(net.init(prepared), prepared)
        >>> out
        Array([2.], dtype=float32)

    Source: Noise Adaptor, Eq. 1, 2 and 6.
    """
    way = choose_way(fast_convolution, events)
    step, frames = first_frames(args, over_time)
    closed, shapes = to_jaxpr(f, *step)
    backend = jax.default_backend()
    traced = trace(closed, lambda eqn, spikes: faster_convolution(eqn, spikes, backend, way))
    if events and not any(op.primitive.name == "event_convolution" for op in traced.ops):
        warnings.warn(f"events=True changes nothing: {no_events(backend)}", stacklevel=2)
    if nonaffine not in ("refuse", "running_mean" if coding == "rate" else "refuse"):
        raise ValueError(
            f"nonaffine must be 'refuse' or, for rates, 'running_mean', not {nonaffine!r}; sums "
            "may go through any operation as they are"
        )
    each = zip(traced.inputs, closed.in_avals, frames, strict=True)
    parts = plan(traced, coding, nonaffine, {i: aval for i, aval, varies in each if varies})
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)]
    check_outputs(traced, zip(traced.outputs, names, strict=True))
    layers = find_layers(parts)
    return SpikingNetwork(
        layers=layers,
        neuron=fitting_neuron(neuron, coding, layers),
        coding=coding,
        output_shapes=shapes,
        _trace=traced,
        _plan=parts,
        _in_avals=tuple(jax.tree.leaves(jax.eval_shape(lambda x: x, args))),
        _in_tree=jax.tree.structure(args),
        _out_tree=jax.tree.structure(shapes),
    )


def _evaluate(ops: Sequence[Op], values: dict[int, Any]) -> None:
    """Adds to `values` what the operations make of them."""
    for op in ops:
        outputs = op.bind(*(_read(values, atom) for atom in op.inputs))
        values.update(zip(op.outputs, outputs, strict=True))


def _read(values: dict[int, Any], atom: Atom) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]
