"""What training carries from one step to the next."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nadaptor._execution.once import jit_once
from nadaptor.models import start_scales

# Elements of a batch of images.
_FEW = 2**20


class TrainState(NamedTuple):
    """The whole state of a run, a pytree: nothing else changes from step to step."""

    step: jax.Array  # int32, updates done
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = None  # moving average of the parameters; None where it is off

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is evaluated with: the averaged parameters where they are kept."""
        # The statistics are those of the last parameters: the average has none of its own.
        params = self.params if self.average is None else self.average
        return {"params": params, "batch_stats": self.batch_stats}


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    images: jax.Array,
    key: jax.Array,
    pretrained: Mapping[str, Any] | None = None,
    *,
    averaged: bool = False,
) -> TrainState:
    """Makes the state before the first step.

    Args:
        model: the network, for one device.
        optimizer: its optimizer.
        images: the first training batch, in which the scales of quantized activations are measured
            with the moments of the batch, as in the first training step that follows.
        key: typed PRNG key, consumed.
        pretrained: variables of the full-precision network to start from; None for random weights.
        averaged: whether to keep a moving average of the parameters.

    Returns:
        The state at step 0.

    Raises:
        ValueError: `pretrained` lacks more than the scales.
    """
    if pretrained is None:
        # With stored moments, still 0 and 1, the scales would silence deep layers.
        # Random weights are little work and much to compile; scales are measured in all images.
        compiled = jit_once if images.size < _FEW else jax.jit
        variables = compiled(lambda k, x: model.init(k, x, train=True))(key, images)
    else:
        variables = jax.jit(lambda v, x, k: start_scales(model, v, x, k, train=True))(
            pretrained, images, key
        )
    params, batch_stats = variables["params"], variables.get("batch_stats", {})

    def beside(params: Any) -> tuple[Any, Any]:
        # A copy: the step donates the state, and one buffer cannot be given away twice.
        return optimizer.init(params), jax.tree.map(jnp.copy, params) if averaged else None

    # As one program, and not one for each shape of a leaf.
    return TrainState(jnp.int32(0), params, batch_stats, *jit_once(beside)(params))
