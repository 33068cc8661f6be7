"""Evaluation of a traced function with something else in the place of some of its equations.

Only calls that hold such a place are entered, and they are built again: `remat` stays `remat` and
`scan` stays `scan`. All other equations are bound as they are, so custom derivatives stay, under
the line and the named scope they had.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Literal

from nadaptor._jaxpr.flat import Path, inner_body, scan_counts, under
from nadaptor._jaxpr.found import Plan, QuantizedLayer
from nadaptor._jaxpr.patterns import is_max_pool
from nadaptor._jaxpr.places import NOWHERE, Location, enter, locate

Replace = Callable[[QuantizedLayer, jax.Array, Any], tuple[jax.Array, Any]]


class _Where(NamedTuple):
    """The call that is being evaluated."""

    path: Path
    location: Location
    traceback: Any  # of the user's call of a library function, inside one


def rewrite(
    closed: ClosedJaxpr,
    plans: Mapping[Path, Plan],
    replace: Replace,
    leaves: Sequence[Any],
    given: Mapping[str, Any],
) -> tuple[list[Any], dict[str, Any]]:
    """Evaluates a function with layers in the place of its ReLUs.

    Args:
        closed: the function.
        plans: from `find`.
        replace: takes a layer, the ReLU's operand and what is given for the layer; returns what
            takes the ReLU's place and what to keep.
        leaves: the function's arguments.
        given: a pytree for each layer's name; in scans with a leading axis for each.

    Returns:
        The function's results, and what was kept by layer; in scans with a leading axis for each.
    """
    entered = {path[:i] for path in plans for i in range(len(path))}
    rewriter = _Rewriter(plans, replace, frozenset(entered))
    return rewriter.body(closed, leaves, given, _Where((), NOWHERE, None))


class _Rewriter(NamedTuple):
    plans: Mapping[Path, Plan]
    replace: Replace
    entered: frozenset[Path]

    def body(
        self, closed: ClosedJaxpr, values: Sequence[Any], given: Mapping[str, Any], where: _Where
    ) -> tuple[list[Any], dict[str, Any]]:
        """Evaluates the equations in order."""
        jaxpr, kept = closed.jaxpr, {}
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *values], strict=True))
        for number, eqn in enumerate(jaxpr.eqns):
            operands = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
            # Under the scopes that it had: else `spiking` would find layers without names.
            stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
            # In a library's function, whose trace is reused, the line may be that of another call.
            traceback = where.traceback if where.location.call else eqn.source_info.traceback
            here = where._replace(path=(*where.path, number), traceback=traceback)
            with source_info_util.user_context(traceback, name_stack=stack), eqn.ctx.manager:
                outputs, more = self.equation(eqn, operands, given, here)
            kept.update(more)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars], kept

    def equation(
        self, eqn: Any, operands: list[Any], given: Mapping[str, Any], where: _Where
    ) -> tuple[list[Any], dict[str, Any]]:
        """Evaluates one equation, or what takes its place."""
        plan = self.plans.get(where.path)
        if plan is not None:
            return self.planned(eqn, plan, operands[plan.operand], given)
        if where.path in self.entered:
            return self.call(eqn, operands, given, where)
        out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        return (list(out) if eqn.primitive.multiple_results else [out]), {}

    def planned(
        self, eqn: Any, plan: Plan, v: jax.Array, given: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Evaluates what takes the place of a ReLU or of a pool."""
        if plan.layer is None:
            return [v], {}
        if is_max_pool(eqn):
            return [_mean_over_windows(eqn, v)], {}
        name = plan.layer.name
        out, keep = self.replace(plan.layer, v, given.get(name))
        return [out], {name: keep}

    def call(
        self, eqn: Any, operands: list[Any], given: Mapping[str, Any], where: _Where
    ) -> tuple[list[Any], dict[str, Any]]:
        """Builds a call again around what takes the place of its parts."""
        body, name = inner_body(eqn), eqn.primitive.name
        assert body is not None
        inside = where._replace(location=enter(body, locate(eqn, where.location)))
        if name == "scan":
            return self.scan(eqn, body, operands, given, inside)
        # Its derivative is that of the function with the ReLU, and wrong for what takes its place.
        if name.startswith("custom_"):
            self._refuse(eqn, where)

        def run(operands: list[Any], given: Mapping[str, Any]) -> Any:
            return self.body(body, operands, given, inside)

        # Of the calls that only group, `remat` alone says something of the backward pass.
        if name in ("remat2", "checkpoint"):
            names = ("prevent_cse", "policy")
            run = jax.checkpoint(run, **{name: eqn.params[name] for name in names})
        return run(operands, given)

    def scan(
        self,
        eqn: Any,
        body: ClosedJaxpr,
        operands: list[Any],
        given: Mapping[str, Any],
        where: _Where,
    ) -> tuple[list[Any], dict[str, Any]]:
        """Builds a scan that takes and keeps an entry of each layer at each turn."""
        fixed, carry = scan_counts(eqn)
        consts, start, xs = (
            operands[:fixed],
            operands[fixed : fixed + carry],
            operands[fixed + carry :],
        )
        plans = (self.plans[path] for path in under(self.plans, where.path))
        # Layers outside of the scan have no axis of turns to slice.
        names = {plan.layer.name for plan in plans if plan.layer is not None}

        def turn(carried: list[Any], slices: Any) -> Any:
            xs, given = slices
            outputs, kept = self.body(body, [*consts, *carried, *xs], given, where)
            return outputs[:carry], (outputs[carry:], kept)

        own = {name: value for name, value in given.items() if name in names}
        options = ("length", "reverse", "unroll", "_split_transpose")
        kwargs = {name: eqn.params[name] for name in options if name in eqn.params}
        last, (ys, kept) = jax.lax.scan(turn, start, (xs, own), **kwargs)
        return [*last, *ys], kept

    def _refuse(self, eqn: Any, where: _Where) -> None:
        plan = next(self.plans[path] for path in under(self.plans, where.path))
        source = f" ({plan.layer.source})" if plan.layer is not None else ""
        raise ValueError(
            f"cannot quantize: {eqn.primitive.name.removesuffix('_call')} of "
            f"{eqn.params.get('name', 'a function')} holds a ReLU{source}, and its own derivative "
            "would be lost; move the ReLU out of it, or keep it by select"
        )


def _mean_over_windows(eqn: Any, x: jax.Array) -> jax.Array:
    """The mean over the windows of a max-pool, padded zeros counted as `flax.linen.avg_pool`."""
    p = eqn.params
    windows = p["window_dimensions"], p["window_strides"], p["padding"]
    zero, dilation = np.zeros((), x.dtype), p["window_dilation"]
    total = jax.lax.reduce_window(x, zero, jax.lax.add, *windows, None, dilation)
    return total / math.prod(p["window_dimensions"])
