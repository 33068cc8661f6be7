"""Whether a function mixes its examples: the axis that holds them, followed from its arguments.

A sum along that axis, or a product that contracts it, makes an output depend on other examples, and
is refused. What is not followed is not refused: past a reshape that merges the axis with another, a
gather, a reduction that is no sum, a loop, or an operation that no rule is here for, nothing is
said. So what is refused mixes for certain, and what is not may do so all the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from nadaptor._jaxpr.affine import INFERENCE, describe
from nadaptor._jaxpr.flat import CONVERTS, words
from nadaptor._jaxpr.trace import BODIES, Op, Trace, trace, variables


class Operand(NamedTuple):
    """What is known of a variable."""

    shape: tuple[int, ...]
    axis: int | None  # of the examples; None where there are none, or it is not known


_MIXED = -1  # in the place of an axis: the result is of several examples
_Rule = Callable[[Any, Sequence[Operand], tuple[int, ...]], int | None]


def check_apart(traced: Trace, inputs: Sequence[Operand]) -> None:
    """Raises a ValueError where an output adds up over the examples.

    Args:
        traced: the function.
        inputs: what is known of its inputs.
    """
    _follow(traced, inputs)


def _follow(traced: Trace, inputs: Sequence[Operand]) -> list[int | None]:
    """The axis of the examples in each output."""
    known = {i: Operand(tuple(jnp.shape(x)), None) for i, x in traced.consts.items()}
    known.update(zip(traced.inputs, inputs, strict=True))

    def read(atom: Any) -> Operand:
        return Operand(jnp.shape(atom.val), None) if isinstance(atom, Literal) else known[atom]

    needed = _needed(traced)
    for op in traced.ops:
        operands = [read(atom) for atom in op.inputs]
        axes: Sequence[int | None] = [None] * len(op.outputs)
        # What is only printed mixes nothing.
        if any(x.axis is not None for x in operands) and not needed.isdisjoint(op.outputs):
            axes = _results(op, operands)
        for i, aval, axis in zip(op.outputs, op.avals, axes, strict=True):
            known[i] = Operand(tuple(getattr(aval, "shape", ())), axis)
    return [read(atom).axis for atom in traced.outputs]


def _needed(traced: Trace) -> set[int]:
    needed = set(variables(traced.outputs))
    for op in reversed(traced.ops):
        if not needed.isdisjoint(op.outputs):
            needed.update(variables(op.inputs))
    return needed


def _results(op: Op, operands: Sequence[Operand]) -> Sequence[int | None]:
    name = op.primitive.name
    if name in BODIES and op.mark is None:
        body = op.params[BODIES[name]]
        body = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())
        return _follow(trace(body), operands)
    if name in CONVERTS:
        return [x.axis for x in operands[: len(op.outputs)]]
    rule = _elementwise if op.mark is not None else _RULES.get(name)
    if rule is None:
        return [None] * len(op.outputs)
    axis = rule(op.params, operands, tuple(op.avals[0].shape))
    if axis == _MIXED:
        where = f" at {op.location.source}" if op.location.source else ""
        raise ValueError(
            f"in_axes says that the examples are independent, and {describe(op)}{where} adds up "
            f"over them: {INFERENCE}; or leave in_axes out"
        )
    return [axis] * len(op.outputs)


def _elementwise(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    axes = {x.axis for x in operands if x.axis is not None and len(x.shape) == len(out)}
    return axes.pop() if len(axes) == 1 else None


def _reduced(sums: bool) -> _Rule:
    def rule(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
        axis = operands[0].axis
        if axis is None:
            return None
        if axis in params["axes"]:
            return _MIXED if sums else None
        return axis - sum(isinstance(a, int) and a < axis for a in params["axes"])

    return rule


def _cumulative(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    return _MIXED if params["axis"] == operands[0].axis else operands[0].axis


def _broadcast(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    shape, axis = operands[0]
    if axis is None:
        return None
    to = params["broadcast_dimensions"][axis]
    return to if out[to] == shape[axis] else None


def _reshape(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    shape, axis = operands[0]
    # It is the same axis where as many entries stand before it, and it is as long.
    if axis is None or shape[axis] == 1 or params["dimensions"] is not None:
        return None
    before = math.prod(shape[:axis])
    same = (i for i, n in enumerate(out) if n == shape[axis] and math.prod(out[:i]) == before)
    return next(same, None)


def _transpose(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    axis = operands[0].axis
    return None if axis is None else tuple(params["permutation"]).index(axis)


def _squeeze(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    axis, gone = operands[0].axis, params["dimensions"]
    return None if axis is None or axis in gone else axis - sum(a < axis for a in gone)


def _dot(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    contracted, batch = params["dimension_numbers"]
    found = set[int]()
    first = len(batch[0])
    for (shape, axis), summed, shared in zip(operands, contracted, batch, strict=True):
        free = [a for a in range(len(shape)) if a not in summed and a not in shared]
        if axis in summed:
            return _MIXED
        if axis is not None:
            shares = axis in shared
            found.add(list(shared).index(axis) if shares else first + free.index(axis))
        first += len(free)
    return found.pop() if len(found) == 1 else None


def _convolution(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    spec, axis = params["dimension_numbers"], operands[0].axis
    whole = axis == spec.lhs_spec[0] and params["batch_group_count"] == 1
    return spec.out_spec[0] if whole and operands[1].axis is None else None


def _concatenate(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    axis = _elementwise(params, operands, out)
    return None if axis == params["dimension"] else axis


def _pool(params: Any, operands: Sequence[Operand], out: tuple[int, ...]) -> int | None:
    axis = operands[0].axis
    return None if axis is None or params["window_dimensions"][axis] != 1 else axis


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        words(
            "add sub mul div max min neg abs sign square pow integer_pow sqrt rsqrt exp exp2 log "
            "log1p expm1 tanh logistic erf select_n clamp stop_gradient add_any gt ge lt le eq ne"
        ),
        _elementwise,
    ),
    **dict.fromkeys(words("reduce_sum psum"), _reduced(sums=True)),
    **dict.fromkeys(words("reduce_max reduce_min"), _reduced(sums=False)),
    **dict.fromkeys(words("reduce_window_sum reduce_window_max"), _pool),
    "cumsum": _cumulative,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "concatenate": _concatenate,
}
