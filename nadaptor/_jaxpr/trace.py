"""A traced function as a flat list of operations, with every call inlined but the marks.

Variables are integers and constants are `Literal`s. Each operation remembers where in the user's
code it was written and which library call (`softmax`, `relu`) it is a part of, for error messages.
"""

import functools
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from nadaptor._jaxpr.marks import Mark, read_mark

Atom = int | Literal
Rewrite = Callable[[Any, Sequence[bool]], ClosedJaxpr | None]

# Calls that only group operations, and the parameter that holds their body.
_BODIES = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
}
# Operations that change the shape of their operand, or the order of its axes.
_MOVES = {"transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims"}
_LIBRARIES = ("jax", "flax", "equinox", "haiku", "nadaptor")
_INTERACTIVE = ("<stdin>", "<ipython-input", "<python-input")
# Frames between a library function and the tracer, which are no name for what the user called.
_PLUMBING = {"current", "custom_jvp", "custom_vjp", "ufunc", "bind", "wrapper"}
_PLUMBING |= {"scope_fn", "run_interceptors"}
_MODELS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "models") + os.sep


class Place(NamedTuple):
    """Where an operation comes from."""

    source: str  # "file.py:12", or "" where it is not known
    call: str  # the outermost library function around it ("softmax"), or ""
    scope: str  # named scopes around it ("ResNet/act1"), or ""


class Op(NamedTuple):
    """One operation; `mark` is set where it is a quantizer's mark."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]  # of the outputs
    context: Any
    place: Place
    mark: Mark | None

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


def trace(closed: ClosedJaxpr, rewrite: Rewrite | None = None) -> Trace:
    """Inlines a closed jaxpr and drops the operations that no output needs.

    Args:
        closed: the function.
        rewrite: takes an equation and, for each operand, whether spikes reach it; returns what to
            put in its place, or None to keep it.
    """
    inliner = _Inliner([], {}, set(), itertools.count(), rewrite)
    inputs = tuple(next(inliner.fresh) for _ in closed.jaxpr.invars)
    outputs = _inline(inliner, closed, inputs, Place("", "", ""))
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


def reached(spiking: Set[int], atoms: Sequence[Atom]) -> list[bool]:
    """Says of each atom whether it is one of the spiking variables."""
    return [not isinstance(atom, Literal) and atom in spiking for atom in atoms]


class _Inliner(NamedTuple):
    ops: list[Op]
    consts: dict[int, Any]
    spiking: set[int]
    fresh: Iterator[int]
    rewrite: Rewrite | None


def _inline(
    inliner: _Inliner, closed: ClosedJaxpr, inputs: Sequence[Atom], place: Place
) -> list[Atom]:
    """Appends the operations of `closed` to the inliner; returns the atoms of its outputs."""
    consts = [next(inliner.fresh) for _ in closed.consts]
    inliner.consts.update(zip(consts, closed.consts, strict=True))
    jaxpr = closed.jaxpr
    atoms = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(var: Any) -> Atom:
        return var if isinstance(var, Literal) else atoms[var]

    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        here = _place(eqn, place)
        body = _body(eqn, reached(inliner.spiking, operands), inliner.rewrite)
        if body is not None:
            outputs = _inline(inliner, body, operands, _enter(eqn, body, here))
        elif is_mark(eqn):
            outputs = _append(inliner, eqn, [_aligned(inliner, eqn, operands[0], here)], here)
        else:
            outputs = _append(inliner, eqn, operands, here)
        atoms.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _append(inliner: _Inliner, eqn: Any, inputs: Sequence[Atom], place: Place) -> list[int]:
    """Appends one operation to the inliner; returns the variables of its results."""
    mark = read_mark(eqn.params["name"]) if is_mark(eqn) else None
    outputs = [next(inliner.fresh) for _ in eqn.outvars]
    if mark is not None or any(reached(inliner.spiking, inputs)):
        inliner.spiking.update(outputs)
    avals = tuple(var.aval for var in eqn.outvars)
    inliner.ops.append(
        Op(eqn.primitive, eqn.params, tuple(inputs), tuple(outputs), avals, eqn.ctx, place, mark)
    )
    return outputs


def _aligned(inliner: _Inliner, mark: Any, x: Atom, place: Place) -> Atom:
    """The input x of a mark, with its axes in the order of the mark's output.

    Under `vmap` a mark that draws noise moves the batch axis of x, to meet that of the noise. The
    neuron in its place draws none, so the moves in the mark's body are made before it.
    """
    body = mark.params["jaxpr"].jaxpr
    moved = {body.invars[0]: x}
    for eqn in body.eqns:
        source = [moved[var] for var in eqn.invars if not isinstance(var, Literal) and var in moved]
        if source and eqn.primitive.name in _MOVES:
            source = _append(inliner, eqn, source, place)
        moved.update(zip(eqn.outvars, source, strict=False))
    return moved[body.outvars[0]]


def _body(eqn: Any, spikes: list[bool], rewrite: Rewrite | None) -> ClosedJaxpr | None:
    """The body to inline in place of an equation, or None to keep it as one operation."""
    name = eqn.primitive.name
    if is_mark(eqn):
        return None
    if name == "scan" and eqn.params["length"]:
        unroll = any(spikes) or contains(eqn.params["jaxpr"].jaxpr, is_mark)
        return _unrolled(eqn) if unroll else None
    if name not in _BODIES:
        return rewrite(eqn, spikes) if rewrite else None
    body = eqn.params[_BODIES[name]]
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def _unrolled(eqn: Any) -> ClosedJaxpr:
    """A scan over layers as straight code: each turn has neurons of its own."""
    closed, length, backwards = (eqn.params[name] for name in ("jaxpr", "length", "reverse"))
    body = jaxpr_as_fun(closed)
    # Operands are constants, carry, xs; results carry, ys; xs and ys alone have the length's axis.
    num_carry = _count_same_rank(eqn.outvars, closed.out_avals)
    num_fixed = _count_same_rank(eqn.invars, closed.in_avals)
    order = range(length)[::-1] if backwards else range(length)

    def unrolled(*operands):
        fixed, xs = operands[:num_fixed], operands[num_fixed:]
        consts, carry = fixed[: num_fixed - num_carry], fixed[num_fixed - num_carry :]
        turns = {}
        for i in order:
            out = body(*consts, *carry, *(x[i] for x in xs))
            carry, turns[i] = out[:num_carry], out[num_carry:]
        return [*carry, *map(jnp.stack, zip(*(turns[i] for i in range(length)), strict=True))]

    return jax.make_jaxpr(unrolled)(*(var.aval for var in eqn.invars))


def _count_same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    return sum(var.aval.ndim == aval.ndim for var, aval in zip(outer, inner, strict=True))


def _live(ops: list[Op], outputs: Sequence[Atom]) -> tuple[Op, ...]:
    needed = set(variables(outputs))
    kept = []
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            needed.update(variables(op.inputs))
            kept.append(op)
    return tuple(reversed(kept))


def _place(eqn: Any, outer: Place) -> Place:
    """The place of an equation; inside a library call, the place where the user called it.

    A library function is traced once and its trace reused, so the traceback of an equation inside
    it may be that of another call.
    """
    # A name stack is written "vmap(Net)/act1": only the names are of use.
    names = re.sub(r"\w+\(|\)", "", str(eqn.source_info.name_stack)).split("/")
    scope = "/".join(filter(None, (outer.scope, *names)))
    if outer.call:
        return outer._replace(scope=scope)
    source, call = _user_frame(eqn.source_info.traceback)
    return Place(source or outer.source, call, scope)


def _enter(eqn: Any, body: ClosedJaxpr, here: Place) -> Place:
    """The place inside a call: of a library's function its name, of the user's each line."""
    function = eqn.params["jaxpr"] if eqn.primitive.name == "scan" else body
    name, _, path = (function.jaxpr.debug_info.func_src_info or "").partition(" at ")
    if path and not _in_library(path.rpartition(":")[0]):
        return here._replace(call="")
    return here if here.call or not path else here._replace(call=name.rpartition(".")[2])


def _user_frame(traceback: Any) -> tuple[str, str]:
    """The innermost line outside the libraries, "file.py:12", and the library function it calls."""
    calls: list[str] = []
    for frame in traceback.frames if traceback is not None else ():
        if not _in_library(frame.file_name):
            return f"{frame.file_name}:{frame.line_num}", calls[-1] if calls else ""
        name = frame.function_name.removesuffix(".__call__")
        if name.isidentifier() and not name.startswith("_") and name not in _PLUMBING:
            calls.append(name)
    return "", ""


@functools.cache
def _library_folders() -> tuple[str, ...]:
    specs = filter(None, map(importlib.util.find_spec, _LIBRARIES))
    return tuple(os.path.dirname(spec.origin) + os.sep for spec in specs if spec.origin)


def _in_library(path: str) -> bool:
    # The models are a user of the library: the line to name is the one in the model.
    user = path.startswith((_MODELS, *_INTERACTIVE))
    return path.startswith(("<", *_library_folders())) and not user
