"""A traced function as a flat list of operations, with every call inlined but the marks.

Variables are integers and constants are `Literal`s. Each operation remembers where in the user's
code it was written and which library call (`softmax`, `relu`) it is a part of, for error messages.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from nadaptor._jaxpr.marks import Mark, read_mark
from nadaptor._jaxpr.places import NOWHERE, Location, enter, locate

Atom = int | Literal
Rewrite = Callable[[Any, Sequence[bool]], ClosedJaxpr | None]

# Calls that only group operations, and the parameter that holds their body.
_GROUPS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_vmap_call": "call",
}
# Calls with a derivative of their own, which is kept with them unless they hold a mark.
_CUSTOM = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
# The name of a function of ours whose derivative is the true one: simulation has ways of its own.
OPEN = "nadaptor_convolution"
# Calls that are bound whole, and the parameter that holds what they do with spikes.
_KEPT = {**_CUSTOM, "linear_call": "callee"}
BODIES = {**_GROUPS, **_CUSTOM}
# From so many turns on, the user is told what a scan with quantizers costs.
_MANY_TURNS = 100
# Operations that change the shape of their operand, or the order of its axes.
_MOVES = {"transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims"}


class Op(NamedTuple):
    """One operation; `mark` is set where it is a quantizer's mark."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]  # of the outputs
    context: Any
    location: Location
    mark: Mark | None
    bodies: "tuple[Trace, ...]"  # of a call that is kept whole, where spikes reach it
    effects: frozenset[str]  # what it does beside its results: DebugEffect, IOEffect, ...

    def bind(self, *values: Any) -> list[Any]:
        """Evaluates the operation on values; always returns a list."""
        with self.context.manager:
            out = self.primitive.bind(*values, **self.primitive.get_bind_params(self.params))
        return list(out) if self.primitive.multiple_results else [out]


class Trace(NamedTuple):
    """A function as operations in order, over numbered variables."""

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    consts: dict[int, Any]
    outputs: tuple[Atom, ...]
    spiking: frozenset[int]  # the variables that a mark's output reaches


def to_jaxpr(f: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Traces a user's function; returns its jaxpr, and its result as `jax.ShapeDtypeStruct`s."""
    # JAX keeps a trace by the identity of its function, but f may be a closure over weights that
    # have been trained since: a function object of its own is traced anew. Without `jit` there
    # would be no marks.
    with jax.disable_jit(False):
        return jax.make_jaxpr(lambda *args: f(*args), return_shape=True)(*args)


def trace(closed: ClosedJaxpr, rewrite: Rewrite | None = None) -> Trace:
    """Inlines a closed jaxpr and drops the operations that no output needs.

    Args:
        closed: the function.
        rewrite: takes an equation and, for each operand, whether spikes reach it; returns what to
            put in its place, or None to keep it.
    """
    return _trace(closed, [False] * len(closed.jaxpr.invars), NOWHERE, rewrite)


def _trace(
    closed: ClosedJaxpr, spikes: Sequence[bool], location: Location, rewrite: Rewrite | None = None
) -> Trace:
    inliner = _Inliner(rewrite)
    inputs = tuple(next(inliner.fresh) for _ in closed.jaxpr.invars)
    inliner.spiking.update(i for i, reached_ in zip(inputs, spikes, strict=True) if reached_)
    outputs = inliner.inline(closed, inputs, location)
    ops, spiking = _live(inliner.ops, outputs), frozenset(inliner.spiking)
    return Trace(ops, inputs, inliner.consts, tuple(outputs), spiking)


def sub_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yields every jaxpr among the parameters of an operation, not those inside them."""
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
        if isinstance(leaf, ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, Jaxpr):
            yield leaf


def contains(jaxpr: Jaxpr, wanted: Callable[[Any], bool]) -> bool:
    """Says whether an equation for which `wanted` is true stands anywhere inside."""
    return any(
        wanted(eqn) or any(contains(sub, wanted) for sub in sub_jaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def is_mark(eqn: Any) -> bool:
    """Says whether an equation is a quantizer's mark."""
    return eqn.primitive.name in ("jit", "pjit") and read_mark(eqn.params["name"]) is not None


def variables(atoms: Sequence[Atom]) -> list[int]:
    """The atoms that are variables: literals have no hash on all versions of jax."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def reached(spiking: Set[Any], atoms: Sequence[Any]) -> list[bool]:
    """Says of each atom whether it is one of the spiking variables."""
    return [not isinstance(atom, Literal) and atom in spiking for atom in atoms]


class _Inliner:
    """Appends operations one after the other, and follows the spikes through them."""

    def __init__(self, rewrite: Rewrite | None) -> None:
        self.ops: list[Op] = []
        self.consts: dict[int, Any] = {}
        self.spiking: set[int] = set()
        self.fresh = itertools.count()
        self.rewrite = rewrite

    def inline(self, closed: ClosedJaxpr, inputs: Sequence[Atom], location: Location) -> list[Atom]:
        """Appends the operations of a closed jaxpr; returns the atoms of its outputs."""
        consts = [next(self.fresh) for _ in closed.consts]
        self.consts.update(zip(consts, closed.consts, strict=True))
        jaxpr = closed.jaxpr
        atoms = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(var: Any) -> Atom:
            return var if isinstance(var, Literal) else atoms[var]

        for eqn in jaxpr.eqns:
            outputs = self._inline_equation(eqn, [read(var) for var in eqn.invars], location)
            atoms.update(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _inline_equation(
        self, eqn: Any, operands: Sequence[Atom], outer: Location
    ) -> Sequence[Atom]:
        here = locate(eqn, outer)
        body = _body(eqn, reached(self.spiking, operands), self.rewrite)
        if body is not None:
            function = eqn.params["jaxpr"] if eqn.primitive.name == "scan" else body
            if eqn.primitive.name == "scan":
                _warn_of_many_turns(eqn.params["length"], here)
            return self.inline(body, operands, enter(function, here))
        if is_mark(eqn):
            operands = [self._aligned(eqn, operands[0], here)]
        return self._append(eqn, operands, here)

    def _append(self, eqn: Any, inputs: Sequence[Atom], location: Location) -> list[int]:
        """Appends one operation; returns the variables of its results."""
        mark = read_mark(eqn.params["name"]) if is_mark(eqn) else None
        outputs = tuple(next(self.fresh) for _ in eqn.outvars)
        spikes = reached(self.spiking, inputs)
        bodies = _kept_bodies(eqn, spikes, location) if any(spikes) and mark is None else ()
        if mark is not None or any(spikes):
            self.spiking.update(outputs)
        avals = tuple(var.aval for var in eqn.outvars)
        rest = (tuple(inputs), outputs, avals, eqn.ctx, location, mark, bodies, _effects(eqn))
        self.ops.append(Op(eqn.primitive, eqn.params, *rest))
        return list(outputs)

    def _aligned(self, mark: Any, x: Atom, location: Location) -> Atom:
        """The input x of a mark, with its axes in the order of the mark's output.

        Under `vmap` a mark that draws noise moves the batch axis of x, to meet that of the noise.
        The neuron in its place draws none, so the moves in the mark's body are made before it.
        """
        body = mark.params["jaxpr"].jaxpr
        moved = {body.invars[0]: x}
        for eqn in body.eqns:
            source = [moved[v] for v in eqn.invars if not isinstance(v, Literal) and v in moved]
            if source and eqn.primitive.name in _MOVES:
                source = self._append(eqn, source, location)
            # What else is in the body is elementwise: its result lies as x does.
            moved.update(zip(eqn.outvars, source, strict=False))
        return moved[body.outvars[0]]


def _body(eqn: Any, spikes: list[bool], rewrite: Rewrite | None) -> ClosedJaxpr | None:
    """The body to inline in place of an equation, or None to keep it as one operation."""
    name = eqn.primitive.name
    if is_mark(eqn):
        return None
    # With quantizers it has neurons at every turn; without, it stays one operation, however long.
    if name == "scan" and eqn.params["length"]:
        return _unrolled(eqn) if contains(eqn.params["jaxpr"].jaxpr, is_mark) else None
    if name not in BODIES:
        return rewrite(eqn, spikes) if rewrite else None
    body = _closed(eqn.params[BODIES[name]])
    kept = name in _CUSTOM and not _is_open(body) and not contains(body.jaxpr, is_mark)
    return None if kept else body


def _is_open(body: ClosedJaxpr) -> bool:
    """Says of a call with a derivative of its own whether it is but a faster way to the same."""
    return (body.jaxpr.debug_info.func_src_info or "").partition(" at ")[0] == OPEN


def _closed(body: Any) -> ClosedJaxpr:
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def _kept_bodies(eqn: Any, spikes: list[bool], location: Location) -> tuple[Trace, ...]:
    """What a call that is kept whole does with spikes; none for what is no such call."""
    name = eqn.primitive.name
    if any(contains(sub, is_mark) for sub in sub_jaxprs(eqn.params)):
        return ()
    if name in _KEPT:
        body = _closed(eqn.params[_KEPT[name]])
        return (_trace(body, spikes, enter(body, location)),)
    # A branch that spikes choose is refused for that, whatever stands in it.
    if name == "cond" and not spikes[0]:
        branches = map(_closed, eqn.params["branches"])
        return tuple(_trace(body, spikes[1:], enter(body, location)) for body in branches)
    if name == "scan":
        return (_scanned(eqn, spikes, location),)
    return ()


def _scanned(eqn: Any, spikes: list[bool], location: Location) -> Trace:
    """The body of a scan, with the spikes that its carry brings back."""
    closed = eqn.params["jaxpr"]
    num_carry, num_fixed = _count_carry(eqn)
    spikes, first = list(spikes), num_fixed - num_carry
    # What spikes put into the carry reaches all that the next turn makes of it.
    while True:
        body = _trace(closed, spikes, enter(closed, location))
        after = reached(body.spiking, body.outputs)[:num_carry]
        grown = [a or b for a, b in zip(after, spikes[first:num_fixed], strict=True)]
        if grown == spikes[first:num_fixed]:
            return body
        spikes[first:num_fixed] = grown


def _effects(eqn: Any) -> frozenset[str]:
    # The name of a mapped axis is an effect only in name.
    return frozenset(type(effect).__name__ for effect in eqn.effects) - {"NamedAxisEffect"}


def _warn_of_many_turns(length: int, here: Location) -> None:
    if length >= _MANY_TURNS:
        warnings.warn(
            f"a scan of {length} turns at {here.source or 'an unknown line'} holds a quantizer: it "
            f"is unrolled into {length} times its layers, each with a state of its own, and the "
            "time to trace and to compile grows with it",
            stacklevel=2,
        )


def _count_carry(eqn: Any) -> tuple[int, int]:
    """The number of carries of a scan, and that of its operands before the xs."""
    # Operands are constants, carry, xs; results carry, ys; xs and ys alone have the length's axis.
    closed = eqn.params["jaxpr"]
    num_carry = count_same_rank(eqn.outvars, closed.out_avals)
    return num_carry, count_same_rank(eqn.invars, closed.in_avals)


def _unrolled(eqn: Any) -> ClosedJaxpr:
    """A scan over layers as straight code: each turn has neurons of its own."""
    closed, length, backwards = (eqn.params[name] for name in ("jaxpr", "length", "reverse"))
    body = jaxpr_as_fun(closed)
    num_carry, num_fixed = _count_carry(eqn)
    order = range(length)[::-1] if backwards else range(length)

    def unrolled(*operands):
        fixed, xs = operands[:num_fixed], operands[num_fixed:]
        consts, carry = fixed[: num_fixed - num_carry], fixed[num_fixed - num_carry :]
        turns = {}
        for i in order:
            out = body(*consts, *carry, *(x[i] for x in xs))
            carry, turns[i] = out[:num_carry], out[num_carry:]
        return [*carry, *map(jnp.stack, zip(*(turns[i] for i in range(length)), strict=True))]

    return to_jaxpr(unrolled, *(var.aval for var in eqn.invars))[0]


def count_same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many operands of a scan its body takes with all their axes."""
    return sum(var.aval.ndim == aval.ndim for var, aval in zip(outer, inner, strict=True))


def _live(ops: list[Op], outputs: Sequence[Atom]) -> tuple[Op, ...]:
    needed = set(variables(outputs))
    kept = []
    for op in reversed(ops):
        # An effect is wanted where no output needs it.
        if op.effects or needed.intersection(op.outputs):
            needed.update(variables(op.inputs))
            kept.append(op)
    return tuple(reversed(kept))
