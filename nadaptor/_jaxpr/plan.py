"""Which operations of a traced function run once, and which at every time step.

Spikes carry a number by their mean over time ("rate") or by their sum ("sum"). Sums may go through
any operation, because it then acts on the sums themselves. Spikes that stand for a mean may go
through affine operations; any other can be given the running mean of its inputs, and what follows
it stays in means up to the next quantizer. What depends on arguments that vary over time, and on no
spike, is evaluated a step at a time, whatever its operations.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.extend.core import Literal

from nadaptor._jaxpr.affine import (
    check_affine,
    check_apart,
    check_effects,
    check_no_batch_statistics,
    check_no_inner_mark,
    check_not_random,
    is_affine,
)
from nadaptor._jaxpr.trace import Atom, Op, Trace, contains, reached, sub_jaxprs, variables

# Operations in which devices wait for each other.
_COLLECTIVES = {"psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_gather"}
_COLLECTIVES |= {"all_gather_invariant", "all_gather_reduced", "all_to_all", "ragged_all_to_all"}
_COLLECTIVES |= {"reduce_scatter", "unreduced_psum", "unreduced_reduce_scatter"}
# What a variable is that spikes reach, another value at every step or a mean of all steps so far,
# and one that no spikes but the frames of a varying argument reach.
SPIKING, MEAN, VARYING = "spiking", "mean", "varying"


class Plan(NamedTuple):
    """The operations of a function in order, in two parts."""

    static: tuple[Op, ...]  # no spike reaches them: evaluated once
    stepwise: tuple[Op, ...]  # evaluated at every time step
    kinds: dict[int, str]  # what each variable is, but for the static ones
    boundary: tuple[int, ...]  # the variables that `stepwise` reads and does not make
    communicates: bool  # whether devices wait for each other in `stepwise`
    averaged: dict[int, Any]  # the variables of which a mean is taken, and their types
    fed: dict[int, Any]  # the means that go into a quantizer, and their types
    frames: tuple[int, ...]  # those of `boundary` that are another value at every step


def plan(
    traced: Trace,
    coding: str,
    nonaffine: str = "refuse",
    varying: Mapping[int, Any] = MappingProxyType({}),
) -> Plan:
    """Parts the operations of a function, and checks that spikes may go through them.

    Args:
        traced: the function.
        coding: "rate" or "sum".
        nonaffine: what to do with such an operation on rates, "refuse" or "running_mean".
        varying: the inputs that are another value at every step, and their types at one.

    Raises:
        ValueError: an operation cannot be converted; the message names it, its line and a remedy.
    """
    if coding == "sum" and varying:
        raise ValueError(
            "over_time needs rates: sums end at the network of one input, and here there is one "
            "for each step; use coding='rate'"
        )
    static, stepwise, kinds = [], [], dict.fromkeys(varying, VARYING)
    results = set(variables(traced.outputs))
    for op in traced.ops:
        last = not results.isdisjoint(op.outputs)
        kind = SPIKING if op.mark is not None else _kind(op, kinds, coding, nonaffine, last)
        (static if kind is None else stepwise).append(op)
        if kind is not None:
            kinds.update(dict.fromkeys(op.outputs, kind))
    made = {i: aval for op in stepwise for i, aval in zip(op.outputs, op.avals, strict=True)}
    read = {i for op in stepwise for i in variables(op.inputs)}
    averaged, fed, types = dict[int, Any](), dict[int, Any](), {**made, **varying}
    # A mean is taken where a value of each step meets an operation on means; a quantizer ends it.
    for op in stepwise:
        for i in variables(op.inputs):
            if op.mark is not None and kinds.get(i) == MEAN:
                fed[i] = types[i]
            elif is_mean(op, kinds) and kinds.get(i) in (SPIKING, VARYING):
                averaged[i] = types[i]
    return Plan(
        tuple(static),
        tuple(stepwise),
        kinds,
        tuple(sorted(read - made.keys())),
        any(map(_communicates, stepwise)),
        averaged,
        fed,
        tuple(sorted(read & varying.keys())),
    )


def kind_of(kinds: dict[int, str], atom: Atom) -> str | None:
    """What a variable or literal is; None for static."""
    return None if isinstance(atom, Literal) else kinds.get(atom)


def is_mean(op: Op, kinds: dict[int, str]) -> bool:
    """Says whether an operation works on means; one without results looks at the spikes."""
    return bool(op.outputs) and kinds[op.outputs[0]] == MEAN


def check_outputs(traced: Trace, outputs: Iterable[tuple[Any, str]]) -> None:
    """Raises a ValueError unless there is a quantizer, and spikes reach each (atom, name)."""
    if not any(op.mark for op in traced.ops):
        raise ValueError(
            "cannot convert to spikes: in the function as traced no quantizer is left on which "
            "an output depends; use nadaptor.lsq or another in it, and convert the function "
            "itself: a derivative (jax.grad, jax.vjp), a simulation and a quantizer replaced by "
            "its plain operations keep none"
        )
    for atom, name in outputs:
        if not reached(traced.spiking, [atom])[0]:
            raise ValueError(
                f"cannot convert to spikes: no spike reaches {name or 'the output'} of the "
                "function's result; return only what depends on quantized activations"
            )


def _kind(op: Op, kinds: dict[int, str], coding: str, nonaffine: str, last: bool) -> str | None:
    """What an operation that is no mark makes of its operands."""
    spikes = reached(kinds.keys(), op.inputs)
    found = {kind_of(kinds, atom) for atom in op.inputs} - {None}
    check_effects(op)
    check_no_batch_statistics(op)
    # Frames alone: as no spike passes, the operation need not be affine.
    if found == {VARYING}:
        check_no_inner_mark(op)
        check_not_random(op, spikes)
        return VARYING
    if VARYING in found:
        check_apart(op)
    if any(spikes) and coding == "rate" and nonaffine == "refuse":
        check_affine(op, spikes, last)
        return SPIKING
    check_no_inner_mark(op)
    check_not_random(op)
    if op.effects and not op.outputs:
        return SPIKING  # what only looks, as jax.debug.print does, looks at every step
    if not any(spikes):
        return None
    return MEAN if coding == "rate" and (MEAN in found or not is_affine(op, spikes)) else SPIKING


def _communicates(op: Op) -> bool:
    return op.primitive.name in _COLLECTIVES or any(
        contains(sub, lambda eqn: eqn.primitive.name in _COLLECTIVES)
        for sub in sub_jaxprs(op.params)
    )
