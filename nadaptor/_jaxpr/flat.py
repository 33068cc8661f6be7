"""A traced function as a flat list of operations, each with its path in the nested jaxprs.

`find` looks for ReLUs here, where no boundary of a call is in the way, and `rewrite` finds the
equations again by their paths. Unlike `trace` this view unrolls nothing: the body of a scan stands
in it once, and links carry values in, round and out.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal

from nadaptor._jaxpr.places import NOWHERE, Location, enter, in_library, locate
from nadaptor._jaxpr.trace import BODIES, Atom, count_same_rank, is_mark, variables

Path = tuple[int, ...]


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


# Operations that pass their operands on: but for precision or place, each result is what one is.
IDENTITY = words(
    "link copy copy_p sharding_constraint device_put optimization_barrier reduce_precision pvary "
    "pcast name"
)
CONVERTS = IDENTITY | {"convert_element_type"}
MOVES = CONVERTS | words("broadcast_in_dim reshape squeeze expand_dims transpose")
# Links that carry another value at each turn of a scan: carried round, sliced or stacked.
_TURNS = ("carry", "turn")


class FlatOp(NamedTuple):
    """One operation, or a link into or out of a scan, whose `eqn` is None."""

    name: str
    eqn: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    path: Path
    location: Location
    calls: frozenset[str]  # names of the library functions around it
    turns: tuple[int, ...]  # lengths of the scans around it


class Call(NamedTuple):
    """A call with a derivative of its own, which `FlatOp`s with longer paths stand in."""

    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]


class Flat:
    """A function as operations in order; variables are integers, constants are `Literal`s."""

    def __init__(self, closed: ClosedJaxpr) -> None:
        """Flattens a closed jaxpr."""
        self.ops: list[FlatOp] = []
        self.consts: dict[int, Any] = {}
        self.calls: dict[Path, Call] = {}
        self._fresh = itertools.count()
        self.inputs = self._new(closed.jaxpr.invars)
        self.out_avals: tuple[Any, ...] = tuple(var.aval for var in closed.jaxpr.outvars)
        self.outputs = tuple(self._inline(closed, self.inputs, (), NOWHERE, frozenset(), ()))
        self.producers: dict[int, FlatOp] = {}
        self._readers: dict[int, list[FlatOp]] = collections.defaultdict(list)
        for op in self.ops:
            for v in op.outputs:
                self.producers.setdefault(v, op)  # of a carry, the link that brings it in
        live = self.backward(variables(self.outputs), lambda op: True)
        for op in self.ops:
            # Dead readers would make a ReLU's parts look as if something else read them, too.
            if live.intersection(op.outputs):
                for v in set(variables(op.inputs)):
                    self._readers[v].append(op)
        self.live = live

    def readers(self, v: Atom) -> list[FlatOp]:
        """The operations that read a variable and that an output needs."""
        return [] if isinstance(v, Literal) else self._readers.get(v, [])

    def forward(self, start: Iterable[int]) -> set[int]:
        """The variables that depend on some of `start`, those included."""
        return self._spread(start, self.ops, lambda op: (op.inputs, op.outputs))

    def backward(self, start: Iterable[int], through: Callable[[FlatOp], bool]) -> set[int]:
        """The variables that `start` depends on by operations for which `through` is true."""
        ops = [op for op in reversed(self.ops) if through(op)]
        return self._spread(start, ops, lambda op: (op.outputs, op.inputs))

    def origin(self, v: Atom, through: frozenset[str] = IDENTITY) -> Atom:
        """The variable of which v is a copy."""
        # Not through a carry or turn, which is another value at each turn.
        while (op := self.producer(v)) is not None and op.name in through:
            v = op.inputs[0]
        return v

    def producer(self, v: Atom) -> FlatOp | None:
        """The operation that made a variable, None for inputs and constants."""
        return None if isinstance(v, Literal) else self.producers.get(v)

    def constant(self, v: Atom) -> float | None:
        """The number that all entries of v are, or None where it is not known or not one."""
        v = self.origin(v, MOVES)
        value = v.val if isinstance(v, Literal) else self.consts.get(v)
        # Inside another trace a constant may be a tracer, which has no value yet.
        if value is None or isinstance(value, Tracer):
            return None
        if not jnp.issubdtype(jnp.result_type(value), jnp.number) or not np.size(value):
            return None
        values = np.asarray(value)
        return float(values.flat[0]) if (values == values.flat[0]).all() else None

    def _spread(
        self,
        start: Iterable[int],
        ops: Sequence[FlatOp],
        ends: Callable[[FlatOp], tuple[Sequence[Atom], Sequence[Atom]]],
    ) -> set[int]:
        found, before = set(start), -1
        while before != len(found):  # a carry goes round
            before = len(found)
            for op in ops:
                near, far = ends(op)
                if not found.isdisjoint(variables(near)):
                    found.update(variables(far))
        return found

    def _new(self, like: Sequence[Any]) -> tuple[int, ...]:
        return tuple(next(self._fresh) for _ in like)

    def _inline(
        self,
        closed: ClosedJaxpr,
        inputs: Sequence[Atom],
        path: Path,
        location: Location,
        calls: frozenset[str],
        turns: tuple[int, ...],
    ) -> list[Atom]:
        jaxpr = closed.jaxpr
        consts = self._new(jaxpr.constvars)
        self.consts.update(zip(consts, closed.consts, strict=False))
        atoms = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(var: Any) -> Atom:
            return var if isinstance(var, Literal) else atoms[var]

        for number, eqn in enumerate(jaxpr.eqns):
            here, operands = (*path, number), tuple(map(read, eqn.invars))
            outer, body = locate(eqn, location), inner_body(eqn)
            name = eqn.primitive.name
            if name in IDENTITY:
                # One for each result: `device_put` and a barrier pass several values on.
                outputs = [self._link("link", v, turns) for v in operands]
            elif body is None:
                outputs = self._new(eqn.outvars)
                self.ops.append(FlatOp(name, eqn, operands, outputs, here, outer, calls, turns))
            else:
                inside = enter(body, outer), calls | library_name(body)
                if name == "scan":
                    outputs = self._scan(eqn, body, operands, here, *inside, turns)
                else:
                    outputs = self._inline(body, operands, here, *inside, turns)
                if name.startswith("custom_"):
                    self.calls[here] = Call(operands, tuple(outputs))
            atoms.update(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _scan(self, eqn, body, operands, path, location, calls, turns) -> list[Atom]:
        fixed, carry = scan_counts(eqn)
        # What is known of a constant holds inside, too; a carry or slice is another at each turn.
        kinds = ["link"] * fixed + ["carry"] * carry + ["turn"] * (len(operands) - fixed - carry)
        entering = [self._link(*pair, turns) for pair in zip(kinds, operands, strict=True)]
        inner = (*turns, eqn.params["length"])
        results = self._inline(body, entering, path, location, calls, inner)
        # The carry goes round: a second link leads to the variable by which it came in.
        for result, back in zip(results[:carry], entering[fixed : fixed + carry], strict=True):
            self.ops.append(self._link_op("carry", result, back, inner))
        return [self._link("turn", result, turns) for result in results]

    def _link(self, kind: str, source: Atom, turns: tuple[int, ...]) -> int:
        out = next(self._fresh)
        self.ops.append(self._link_op(kind, source, out, turns))
        return out

    def _link_op(self, kind: str, source: Atom, out: int, turns: tuple[int, ...]) -> FlatOp:
        return FlatOp(kind, None, (source,), (out,), (), NOWHERE, frozenset(), turns)


ACROSS_TURNS = MOVES | frozenset(_TURNS)


def inner_body(eqn: Any) -> ClosedJaxpr | None:
    """The body to look into; None for one operation, which a quantizer is already."""
    name = eqn.primitive.name
    if is_mark(eqn) or (name == "scan" and not eqn.params["length"]):
        return None
    body = eqn.params.get("jaxpr" if name == "scan" else BODIES.get(name))
    if body is None:
        return None
    body = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())
    is_quantizer = name == "custom_vjp_call" and any(is_mark(e) for e in body.jaxpr.eqns)
    return None if is_quantizer else body


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan its body takes whole: constants, carry."""
    closed = eqn.params["jaxpr"]
    carry = count_same_rank(eqn.outvars, closed.out_avals)
    return count_same_rank(eqn.invars, closed.in_avals) - carry, carry


def library_name(body: ClosedJaxpr) -> frozenset[str]:
    """The name of the library function that a call is of, as a set of one or none."""
    return _library_name(body.jaxpr.debug_info.func_src_info or "")


@functools.lru_cache(maxsize=4096)
def _library_name(source: str) -> frozenset[str]:
    name, _, path = source.partition(" at ")
    known = path and in_library(path.rpartition(":")[0])
    return frozenset([name.rpartition(".")[2]] if known else [])


def under(paths: Iterable[Path], path: Path) -> Iterator[Path]:
    """The paths that stand in the call at `path`."""
    return (other for other in paths if other[: len(path)] == path)
