"""How a ReLU, a bounded ReLU and a max-pool are written, as operations of a traced function."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.extend.core import Literal

from nadaptor._jaxpr.flat import CONVERTS, Flat, FlatOp
from nadaptor._jaxpr.trace import Atom


class Relu(NamedTuple):
    """A ReLU: the operations it is written with, and the operand of each that is passed on."""

    parts: tuple[tuple[FlatOp, int], ...]
    bound: float | None = None

    def operand(self, op: FlatOp) -> int:
        """The operand of an operation that is passed on."""
        return next(i for part, i in self.parts if part is op)


def is_max_pool(eqn: Any) -> bool:
    """Says whether an equation is the maximum over windows."""
    name, params = eqn.primitive.name, eqn.params
    # Between the values of a dilated input are holes, which a mean over the window would count.
    if name not in ("reduce_window_max", "reduce_window") or set(params["base_dilation"]) != {1}:
        return False
    # Where JAX does not know the start for a maximum's, it writes a general `reduce_window`.
    body = getattr(params.get("jaxpr"), "jaxpr", params.get("jaxpr"))
    return name == "reduce_window_max" or [e.primitive.name for e in body.eqns] == ["max"]


def find_relu(flat: Flat, op: FlatOp) -> Relu | None:
    """The ReLU that an operation is, or the last one of."""
    pattern = _PATTERNS.get(op.name)
    return None if pattern is None else pattern(flat, op)


def _maximum(flat: Flat, op: FlatOp) -> Relu | None:
    for i, v in enumerate(op.inputs):
        is_whole = op.eqn.invars[i].aval.shape == op.eqn.outvars[0].aval.shape
        if flat.constant(op.inputs[1 - i]) != 0 or not is_whole or flat.constant(v) is not None:
            continue
        # Bounded only where it has one reader: another would see what is above the bound.
        after = flat.readers(op.outputs[0])
        last = op.outputs[0] in flat.outputs
        if len(after) == 1 and not last and (cut := _cut(flat, after[0])) is not None:
            return Relu(((op, i), (after[0], cut[0])), cut[1])  # min(max(x, 0), c)
        before, alone = flat.producer(v), len(flat.readers(v)) == 1 and v not in flat.outputs
        if before is not None and alone and (cut := _cut(flat, before)) is not None:
            return Relu(((before, cut[0]), (op, i)), cut[1])  # max(min(x, c), 0)
        return Relu(((op, i),))
    return None


def _cut(flat: Flat, op: FlatOp) -> tuple[int, float] | None:
    """The operand and the bound, above zero, of a minimum with a constant."""
    for i in range(2 if op.name == "min" else 0):
        bound = flat.constant(op.inputs[1 - i])
        if bound is not None and bound > 0 and flat.constant(op.inputs[i]) is None:
            return i, bound
    return None


def _clamp(flat: Flat, op: FlatOp) -> Relu | None:
    low, high = flat.constant(op.inputs[0]), flat.constant(op.inputs[2])
    return Relu(((op, 1),), high) if low == 0 and high is not None and high > 0 else None


def _select(flat: Flat, op: FlatOp) -> Relu | None:
    """`where(x > 0, x, 0)` or `where(x < 0, 0, x)`."""
    if len(op.inputs) != 3 or (test := _test(flat, op.inputs[0])) is None:
        return None
    # The case of a predicate that is false comes first.
    zero, kept = (1, 2) if test[0] == "g" else (2, 1)
    same = _same(flat.origin(op.inputs[kept]), test[1])
    return Relu(((op, kept),)) if same and flat.constant(op.inputs[zero]) == 0 else None


def _product(flat: Flat, op: FlatOp) -> Relu | None:
    """`x * (x > 0)`."""
    for i in range(2):
        test = _test(flat, op.inputs[1 - i])
        if test is not None and test[0] == "g" and _same(flat.origin(op.inputs[i]), test[1]):
            return Relu(((op, i),))
    return None


def _test(flat: Flat, v: Atom) -> tuple[str, Atom] | None:
    """What v, maybe converted, is a test of: ("g", x) for x > 0 and x >= 0, ("l", x) for less."""
    op = flat.producer(flat.origin(v, CONVERTS))
    if op is None or op.name not in ("gt", "ge", "lt", "le"):
        return None
    if flat.constant(op.inputs[1]) == 0:
        return op.name[0], flat.origin(op.inputs[0])
    if flat.constant(op.inputs[0]) == 0:
        # With zero on the left the comparison is turned round.
        return "lg"["lg".index(op.name[0]) - 1], flat.origin(op.inputs[1])
    return None


def _same(a: Atom, b: Atom) -> bool:
    return not isinstance(a, Literal) and not isinstance(b, Literal) and a == b


_PATTERNS: dict[str, Callable[[Flat, FlatOp], Relu | None]] = {
    "max": _maximum,
    "clamp": _clamp,
    "select_n": _select,
    "mul": _product,
}
