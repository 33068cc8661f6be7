"""The activations that `quantize` knows by name."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from nadaptor.quantizers import clipped_relu, lsq, noise_adaptor, qcfs, slip_relu


class Entry(NamedTuple):
    """An activation by its name."""

    forward: Callable[..., jax.Array]  # of (factor, v, scale, levels, key)
    scaled: bool = False  # whether the gradient of its scale is multiplied by 1/sqrt(N*p)
    by_threshold: bool = False  # whether its scale is the threshold


def _noise_adaptor(
    factor: float, v: jax.Array, scale: jax.Array, levels: int, key: jax.Array | None
) -> jax.Array:
    if key is None:
        return lsq(v, scale, levels, gradient_scale=factor)
    return noise_adaptor(key, v, scale, levels, gradient_scale=factor)


ACTIVATIONS = {
    "noise_adaptor": Entry(_noise_adaptor, scaled=True),
    "lsq": Entry(
        lambda factor, v, scale, levels, key: lsq(v, scale, levels, gradient_scale=factor),
        scaled=True,
    ),
    "clipped_relu": Entry(
        lambda factor, v, scale, levels, key: clipped_relu(v, scale), by_threshold=True
    ),
    "qcfs": Entry(lambda factor, v, scale, levels, key: qcfs(v, scale * levels, levels)),
    "slip_relu": Entry(lambda factor, v, scale, levels, key: slip_relu(v, scale * levels, levels)),
}
