"""The noise adaptor's draw: a counter-based generator that compiles into the quantizer's own loop.

A key gives two words by its own generator; element i then takes the mixed bits of `start + i *
stride`, the words being start and stride (made odd). A dozen integer operations an element and no
array of bits: with the 20 rounds of threefry for each element a training step took twice as long.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def uniform_noise(key: jax.Array, shape: tuple[int, ...], amplitude: float) -> jax.Array:
    """Draws from U(-amplitude, amplitude), on a grid of 2**24 values that is symmetric about 0.

    Args:
        key: one typed PRNG key, consumed.
        shape: of the draw; up to 2**32 elements are distinct draws.
        amplitude: half-width of the noise, not negative.

    Returns:
        The noise, float32. The same key and number of elements give the same, also within vmap.

    Example:
        >>> eps = uniform_noise(jax.random.key(0), (100, 100), 0.5)
        >>> bool(abs(eps).max() < 0.5) and abs(float(eps.mean())) < 0.01
        True

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014: a stride of
    its own for each stream; the mixing constants are those of Wellons' lowbias32, 2018. Not for
    cryptography.
    """
    start, stride = jax.random.bits(key, (2,), jnp.uint32)
    counter = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = start + counter * (stride | 1)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    # lowbias32 ends in one more xor with a shift, which changes the low half alone: here unused.
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    # Odd integers between -2**24 and 2**24: exact in float32, and neither 0 nor an end is among
    # them. Signed, because CPUs convert unsigned integers in several instructions.
    odd = (jax.lax.bitcast_convert_type(bits, jnp.int32) >> 7) | 1
    return odd.astype(jnp.float32) * jnp.float32(amplitude * 2.0**-24)


def layer_keys(key: jax.Array | None, layers: Sequence[Any]) -> dict[str, jax.Array | None]:
    """A key for each layer, `fold_in(key, layer number)`, split among the turns of its scans.

    Args:
        key: one typed key, one for each example, or None.
        layers: with `name` and `turns`, the lengths of the scans around the layer.

    Raises:
        ValueError: the key is no typed PRNG key, or has more than one axis.
    """
    if key is None:
        return {layer.name: None for layer in layers}
    if not jnp.issubdtype(getattr(key, "dtype", np.dtype(int)), jax.dtypes.prng_key):
        raise ValueError(
            "key must be a typed PRNG key from jax.random.key(seed), or an array of them, not "
            f"{key!r}; a legacy uint32 key converts with jax.random.wrap_key_data(key)"
        )
    if key.ndim > 1:
        raise ValueError(f"key must be one key or one for each example, not {key.shape} keys")

    def of_layer(key: jax.Array, number: int, turns: tuple[int, ...]) -> jax.Array:
        own = jax.random.fold_in(key, number)
        return jax.random.split(own, turns) if turns else own

    keys = {}
    for number, layer in enumerate(layers):
        make = functools.partial(of_layer, number=number, turns=layer.turns)
        # The examples' axis comes after those of the turns, which a scan slices off.
        keys[layer.name] = jax.vmap(make, 0, len(layer.turns))(key) if key.ndim else make(key)
    return keys
