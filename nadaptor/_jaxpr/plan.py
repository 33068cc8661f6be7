"""Which operations of a traced function run once, and which at every time step.

Spikes carry a number by their mean over time ("rate") or by their sum ("sum"). A mean of spikes may
go through affine operations alone; a sum may go through any, because the operation then acts on the
sums themselves.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from nadaptor._jaxpr.affine import check_affine, check_no_inner_mark, check_not_random
from nadaptor._jaxpr.trace import Op, Trace, contains, reached, sub_jaxprs, variables

_COLLECTIVES = {"psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_gather"}
_COLLECTIVES |= {"all_gather_invariant", "all_gather_reduced", "all_to_all", "ragged_all_to_all"}
_COLLECTIVES |= {"reduce_scatter", "unreduced_psum", "unreduced_reduce_scatter"}
# Of a variable: spikes reach it, and it has another value at every step.
SPIKING = "spiking"


class Plan(NamedTuple):
    """The operations of a function in order, in two parts."""

    static: tuple[Op, ...]  # no spike reaches them: evaluated once
    stepwise: tuple[Op, ...]  # evaluated at every time step
    kinds: dict[int, str]  # what each variable is, but for the static ones
    boundary: tuple[int, ...]  # the variables that `stepwise` reads and does not make
    communicates: bool  # whether devices wait for each other in `stepwise`


def plan(traced: Trace, coding: str) -> Plan:
    """Parts the operations of a function, and checks that spikes may go through them.

    Args:
        traced: the function.
        coding: "rate" or "sum".

    Raises:
        ValueError: an operation cannot be converted; the message names it, its line and a remedy.
    """
    static, stepwise, kinds = [], [], dict[int, str]()
    for op in traced.ops:
        kind = SPIKING if op.mark is not None else _kind(op, kinds, coding)
        (static if kind is None else stepwise).append(op)
        if kind is not None:
            kinds.update(dict.fromkeys(op.outputs, kind))
    made = {i for op in stepwise for i in op.outputs}
    read = {i for op in stepwise for i in variables(op.inputs)}
    boundary = tuple(sorted(read - made))
    return Plan(tuple(static), tuple(stepwise), kinds, boundary, any(map(_communicates, stepwise)))


def check_outputs(traced: Trace, outputs: Iterable[tuple[Any, str]]) -> None:
    """Raises a ValueError unless there is a quantizer, and spikes reach each (atom, name)."""
    if not any(op.mark for op in traced.ops):
        raise ValueError(
            "cannot convert to spikes: no output of the function depends on a quantized "
            "activation, so nothing would spike; use nadaptor.lsq or another quantizer in it"
        )
    for atom, name in outputs:
        if not reached(traced.spiking, [atom])[0]:
            raise ValueError(
                f"cannot convert to spikes: no spike reaches {name or 'the output'} of the "
                "function's result; return only what depends on quantized activations"
            )


def _kind(op: Op, kinds: dict[int, str], coding: str) -> str | None:
    """What an operation that is no mark makes of its operands."""
    spikes = reached(kinds.keys(), op.inputs)
    if any(spikes) and coding == "rate":
        check_affine(op, spikes)
        return SPIKING
    check_no_inner_mark(op)
    check_not_random(op)
    return SPIKING if any(spikes) else None


def _communicates(op: Op) -> bool:
    return op.primitive.name in _COLLECTIVES or any(
        contains(sub, lambda eqn: eqn.primitive.name in _COLLECTIVES)
        for sub in sub_jaxprs(op.params)
    )
