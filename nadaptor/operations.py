"""How many operations a spiking network takes, and how much energy, compared with its ANN.

The operations between the neurons are evaluated on counts instead of values: a weight counts as 1,
a constant as 0. Of each neuron that gives its fan-out, the number of synapses that a spike of it
goes through. Spikes times fan-out are the synaptic operations (SynOps), integers without rounding.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from nadaptor._checks import check_data_argnum
from nadaptor._jaxpr.affine import describe
from nadaptor._jaxpr.plan import MEAN, Plan, kind_of, plan
from nadaptor._jaxpr.trace import (
    Op,
    Trace,
    contains,
    reached,
    sub_jaxprs,
    to_jaxpr,
    trace,
    variables,
)
from nadaptor.neurons import Coding, Neuron
from nadaptor.recording import record
from nadaptor.simulation import Correction
from nadaptor.transformation import Nonaffine

OUTPUT = "output"
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_POOLS = {"reduce_sum", "reduce_window_sum"}
_SUMS = {"add", "sub", "add_any"}
_SCALINGS = {"mul", "div"}
_SAME = {"neg", "convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient"}
_SAME |= {"name", "optimization_barrier", "sharding_constraint"}
_JOINS = {"concatenate", "pad", "reshape", "squeeze", "expand_dims", "transpose", "tile"}
_JOINS |= {"broadcast_in_dim", "slice", "split", "rev", "stack", "unstack"}
# The operands at other positions say where to, and keep their values.
_POSITIONS = {
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
}
# What float32 counts to.
_EXACT = 2**24


class EnergyTable(NamedTuple):
    """Energy per operation in pJ: 32-bit floating point in 45 nm, unless you know better.

    A multiplication takes 3.7 pJ and an addition 0.9 pJ: M. Horowitz, "Computing's energy problem
    (and what we can do about it)", ISSCC 2014, Figure 1.1.9. Memory accesses are left out.
    """

    mac: float = 4.6  # a multiplication and an addition
    ac: float = 0.9  # an addition: what a spike costs at a synapse


class LayerEnergy(NamedTuple):
    """Operations that lead to one layer of neurons, for the whole batch, and their energy in pJ."""

    synops: np.ndarray  # [T] int64, from the first step up to t
    analog_macs: int  # of what no spike reaches, for one evaluation
    mean_macs: int  # of what acts on running means, for one step
    ann_macs: int  # of the network with activations in place of neurons
    energy: np.ndarray  # [T] float64, up to t, the analog layers computed once
    energy_every_step: np.ndarray  # [T] float64, up to t, the analog layers computed at every step
    ann_energy: float


class Energy(NamedTuple):
    """What `energy` counted."""

    layers: dict[str, LayerEnergy]  # by the layer they lead to; "output" for those after the last
    total: LayerEnergy
    spikes: dict[str, np.ndarray]  # [T] int64, those that each layer sends up to t


def energy(
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    data_argnum: int = -1,
    table: EnergyTable | None = None,
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
) -> Energy:
    """Counts SynOps and MACs of a network at every time step, and gives the energy of them.

    After t steps, with s_i(t) the spikes of neuron i so far and n_i its fan-out,

        SynOps(t) = sum_i s_i(t) n_i,    E(t) = ac SynOps(t) + mac (analog_macs + t mean_macs).

    A synapse counts by its position, whatever its weight; one that would lead out of the border
    does not exist, and padding sends no spikes. Each element that a pool or sum adds up is a
    synapse, too. Scales, biases and the additions of residuals are none. Where operations follow
    each other without neurons in between, a spike goes along every path. A negative spike counts
    as any other. The MACs of the ANN are those of the same synapses with a value at each.

    The spike trains of all neurons are held, one byte per neuron and step.

    Args:
        f: function whose activations are quantizers of `nadaptor`.
        *args: its arguments.
        num_steps: T.
        data_argnum: which argument is the data; what depends on it before the first neurons is
            the analog layer.
        table: energy per operation; None for `EnergyTable()`.
        neuron: as in `nadaptor.simulate`.
        coding: as in `nadaptor.simulate`.
        nonaffine: as in `nadaptor.simulate`.
        correction: as in `nadaptor.simulate`; its own steps are not counted.

    Returns:
        An `Energy`: by layer, in total, and the spikes of each layer.

    Raises:
        ValueError: as `nadaptor.simulate`, there is no such argument, or an operation has no known
            count; the message names it and its line.

    Example:
        >>> import nadaptor
        >>> f = lambda w, x: nadaptor.lsq(x, 0.5, levels=2) @ w
        >>> found = nadaptor.energy(f, jnp.ones((2, 3)), jnp.array([0.25, 0.5]), num_steps=4)
        >>> found.total.synops.tolist()
        [3, 6, 9, 9]
        >>> found.total.ann_macs
        6

    Source: SynOps as in Merolla et al., Science 345, 2014; energies of `EnergyTable`.
    """
    data = check_data_argnum(data_argnum, args)
    rec = record(
        f,
        *args,
        num_steps=num_steps,
        quantities=("spikes",),
        neuron=neuron,
        coding=coding,
        nonaffine=nonaffine,
        correction=correction,
    )
    # Not as `spiking` traces it: a convolution that was rewritten for speed has other operations.
    traced = trace(to_jaxpr(f, *args)[0])
    counter = _Counter(traced, plan(traced, coding, nonaffine), args, data)
    trains = [np.asarray(layer.spikes) for layer in rec.values()]
    table = EnergyTable() if table is None else table
    names, rows = [*rec, OUTPUT], []
    macs = counter.macs()
    for target in range(len(names)):
        synops = _events(trains, counter.fan_out(target))
        rows.append(_row(np.cumsum(synops), *macs[target], table))
    analog, mean, ann = map(sum, zip(*macs, strict=True))
    total = _row(np.sum([row.synops for row in rows], 0), analog, mean, ann, table)
    sent = {
        name: np.cumsum(_events([z], {0: np.ones(z.shape[1:])}))
        for name, z in zip(rec, trains, strict=True)
    }
    return Energy(dict(zip(names, rows, strict=True)), total, sent)


def _events(trains: Sequence[np.ndarray], fan_out: Mapping[int, np.ndarray]) -> np.ndarray:
    """The number of synapses that each step's spikes go through, int64 [T]."""
    result = np.zeros(len(trains[0]), np.int64)
    for i, fan in fan_out.items():
        # float64 counts to 2**53.
        steps = [np.vdot(np.abs(z).astype(np.float64), fan) for z in trains[i]]
        result += np.asarray(steps, np.int64)
    return result


def _row(synops: np.ndarray, analog: int, mean: int, ann: int, table: EnergyTable) -> LayerEnergy:
    t = np.arange(1, len(synops) + 1)
    spiking = table.ac * synops + table.mac * mean * t
    once, every_step = spiking + table.mac * analog, spiking + table.mac * analog * t
    return LayerEnergy(synops, analog, mean, ann, once, every_step, table.mac * ann)


class _Counter:
    """Counts the operations of a traced function by the layer that they lead to."""

    def __init__(self, traced: Trace, parts: Plan, args: tuple[Any, ...], data: int) -> None:
        self.parts = parts
        self.ops = (*parts.static, *parts.stepwise)
        leaves = dict(zip(traced.inputs, jax.tree.leaves(args), strict=True))
        self.values = {**traced.consts, **leaves}
        for op in parts.static:
            outputs = op.bind(*map(self._value, op.inputs))
            self.values.update(zip(op.outputs, outputs, strict=True))
        first = len(jax.tree.leaves(args[:data]))
        number = len(jax.tree.leaves(args[data]))
        self.data = traced.inputs[first : first + number]
        self.marks = {op.outputs[0]: i for i, op in enumerate(o for o in self.ops if o.mark)}
        self.targets = _targets(self.ops, self.marks, variables(traced.outputs))

    def fan_out(self, target: int) -> dict[int, np.ndarray]:
        """Of each layer that leads to one layer, the synapses of each neuron on the way."""
        ops = self._leading_to(target)
        read = {i for op in ops for i in variables(op.inputs)} & self.marks.keys()
        if not any(map(self._is_synaptic, ops)):
            return {}

        def events(sources: dict[int, jax.Array]) -> jax.Array:
            counts, total = dict(sources), jnp.float32(0)
            for op in ops:
                outputs = self._count(op, counts)
                if outputs is None:
                    raise _unknown(op)
                counts.update(zip(op.outputs, outputs, strict=True))
                if self._is_synaptic(op) and self._target(op) == target:
                    total += outputs[0].sum()
            return total

        shapes = {op.outputs[0]: op.avals[0].shape for op in self.ops if op.mark}
        fans = jax.jit(jax.grad(events))({i: jnp.zeros(shapes[i], jnp.float32) for i in read})
        return {self.marks[i]: _integers(fan) for i, fan in fans.items()}

    def macs(self) -> list[tuple[int, int, int]]:
        """By layer: MACs of what no spike reaches, of what acts on means, and of all in the ANN."""
        result = np.zeros((len(self.marks) + 1, 3), np.int64)
        avals = {i: jnp.shape(self.values[i]) for i in self.data}
        there = {i: jnp.ones(shape, jnp.float32) for i, shape in avals.items()}
        for k, op in enumerate(self.ops):
            if not op.outputs or not (op.mark or any(reached(there.keys(), op.inputs))):
                continue
            analog = k < len(self.parts.static)
            exact = not analog and kind_of(self.parts.kinds, op.outputs[0]) != MEAN
            outputs = None if op.mark else self._count(op, there)
            if outputs is None and op.mark is None and (exact or _holds_product(op)):
                raise _unknown(op)
            if outputs is None:
                outputs = [jnp.ones(aval.shape, jnp.float32) for aval in op.avals]
            elif op.primitive.name in _PRODUCTS or (exact and op.primitive.name in _POOLS):
                macs = int(_integers(outputs[0]).sum())
                result[self._target(op)] += np.array([analog, not (analog or exact), 1]) * macs
            # A value is there or not, by however many paths: it is multiplied once.
            there.update((i, jnp.minimum(x, 1)) for i, x in zip(op.outputs, outputs, strict=True))
        return [(int(a), int(b), int(c)) for a, b, c in result]

    def _count(self, op: Op, counts: Mapping[int, jax.Array]) -> list[jax.Array] | None:
        """What an operation makes of counts; None for one of which that is not known."""
        name, shapes = op.primitive.name, [aval.shape for aval in op.avals]
        counted = reached(counts.keys(), op.inputs)
        here = [counts[i] for i in variables(op.inputs) if i in counts]
        if name in _PRODUCTS:
            operands = [self._operand(atom, counts, 1) for atom in op.inputs]
            # A product in fewer bits, as accelerators have it, would round counts.
            return _bind(op, operands, precision=jax.lax.Precision.HIGHEST)
        scaled = counted == [True, False] or (name == "mul" and counted == [False, True])
        if name in _SUMS or (name in _SCALINGS and scaled):
            return [jnp.broadcast_to(sum(here[1:], here[0]), shapes[0])]
        if name in _SAME or (name == "integer_pow" and op.params["y"] == 1):
            return [self._operand(atom, counts, 0) for atom in op.inputs]
        if name in _JOINS or name in _POOLS:
            return _bind(op, [self._operand(atom, counts, 0) for atom in op.inputs])
        positions = range(1, len(counted)) if name == "select_n" else _POSITIONS.get(name, ())
        if not positions or any(c and i not in positions for i, c in enumerate(counted)):
            return None
        operands = [
            self._operand(atom, counts, 0) if i in positions else self._value(atom)
            for i, atom in enumerate(op.inputs)
        ]
        return _bind(op, operands, fill_value=0)

    def _leading_to(self, target: int) -> list[Op]:
        """The operations on spikes from the neurons before a layer up to it, in order."""
        needed, ops = set[int](), []
        for op in reversed(self.parts.stepwise):
            if op.mark or not op.outputs or self.parts.kinds[op.outputs[0]] == MEAN:
                continue
            if self._target(op) == target or not needed.isdisjoint(op.outputs):
                needed.update(variables(op.inputs))
                ops.append(op)
        return ops[::-1]

    def _target(self, op: Op) -> int:
        # What only has an effect leads nowhere.
        return min((self.targets[i] for i in op.outputs if i in self.targets), default=-1)

    def _is_synaptic(self, op: Op) -> bool:
        return op.primitive.name in _PRODUCTS | _POOLS

    def _operand(self, atom: Any, counts: Mapping[int, jax.Array], otherwise: int) -> jax.Array:
        if not isinstance(atom, Literal) and atom in counts:
            return counts[atom]
        return jnp.full(jnp.shape(self._value(atom)), otherwise, jnp.float32)

    def _value(self, atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else self.values[atom]


def _targets(ops: Sequence[Op], marks: Mapping[int, int], outputs: Iterable[int]) -> dict[int, int]:
    """The first layer that each variable leads to; the number of layers for the output."""
    targets = dict.fromkeys(outputs, len(marks))
    for op in reversed(ops):
        after = [targets[i] for i in op.outputs if i in targets]
        if op.mark:
            after = [marks[op.outputs[0]]]
        for i in variables(op.inputs) if after else ():
            targets[i] = min(after + ([targets[i]] if i in targets else []))
    return targets


def _bind(op: Op, operands: Sequence[jax.Array], **replaced: Any) -> list[jax.Array]:
    """Evaluates an operation in float32, with some of its parameters replaced if it has them."""
    replaced["preferred_element_type"] = np.dtype(np.float32)
    changed = {name: x for name, x in replaced.items() if name in op.params}
    return op._replace(params={**op.params, **changed}).bind(*operands)


def _holds_product(op: Op) -> bool:
    """Says whether there are MACs inside an operation that has a body of its own."""
    products = ("dot_general", "conv_general_dilated")
    return op.primitive.name.endswith(products) or any(
        contains(sub, lambda eqn: eqn.primitive.name.endswith(products))
        for sub in sub_jaxprs(op.params)
    )


def _integers(counts: jax.Array) -> np.ndarray:
    result = np.asarray(counts, np.float64)
    if result.size and result.max() >= _EXACT:
        raise ValueError(
            f"a neuron has {result.max():.3g} synapses, and float32 counts to 2**24 only; count "
            "the operations of a smaller part of the network"
        )
    return np.rint(result)


def _unknown(op: Op) -> ValueError:
    where = f" at {op.location.source}" if op.location.source else ""
    return ValueError(
        f"cannot count operations: {describe(op)}{where} has no known number of synapses; write it "
        "as matrix products, convolutions, pools and additions"
    )
