"""What a layer of neurons takes in."""

import jax
import jax.numpy as jnp

from nadaptor._jaxpr.layers import Layer
from nadaptor._jaxpr.summable import summable
from nadaptor.neurons import Coding


def layer_current(x: jax.Array, layer: Layer, steps: int | None, coding: Coding) -> jax.Array:
    """The float32 current of a layer at one step or several; a static x is the same at each."""
    shape = layer.shape if steps is None else (steps, *layer.shape)
    current = jnp.broadcast_to(x, shape).astype(jnp.float32)
    if layer.bias is not None:
        current = current + layer.bias
    # A total is rounded as the quantizer does it. The threshold of a calibrated layer is an array,
    # and off every grid, as is a current from a mean.
    exact = coding == "rate" and isinstance(layer.threshold, int) and not layer.from_mean
    return summable(current, layer.threshold) if exact else current
