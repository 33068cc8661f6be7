"""One operation at several time steps: together, as a batch, wherever it can be mapped."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nadaptor._jaxpr.trace import Op

# Operations that `jax.vmap` cannot map, or not over all of their operands.
_NO_BATCHING = {"linear_call", "ragged_dot_general"}


def bind_steps(
    op: Op, operands: Sequence[Any], kinds: Sequence[str | None], steps: int | None
) -> list[Any]:
    """Evaluates an operation at one step, or at several along a leading axis."""
    if steps is None:
        return op.bind(*operands)
    axes = [None if kind is None else 0 for kind in kinds]
    # A callback has to see each step by itself, in the order of the steps.
    if op.effects or op.primitive.name in _NO_BATCHING:
        each = [
            op.bind(*(x if axis is None else x[i] for x, axis in zip(operands, axes, strict=True)))
            for i in range(steps)
        ]
        return [jnp.stack(outputs) for outputs in zip(*each, strict=True)]
    return jax.vmap(op.bind, axes, axis_size=steps)(*operands)
