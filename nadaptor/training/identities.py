"""The self-tests of a converted network: identities that hold for every network, on one batch.

A float sum in another order can move a value across a rounding edge, which flips a spike. So the
identity between continuous functions is held to float rounding, and those between quantized or
spiking ones allow a few images to differ.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from nadaptor import simulate
from nadaptor.models import ClippedRelu, Lsq

ROUNDING = 1e-4
FLIPPED = 0.05
SHORT, LONG = 8, 128


class Check(NamedTuple):
    """One identity as it was measured."""

    name: str
    measured: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the measured value is within the allowed one; NaN never is."""
        return self.measured <= self.allowed

    def __str__(self) -> str:
        """Returns the line to print."""
        verdict = "ok" if self.holds else "FAILED"
        return f"{verdict:6} {self.name}: {self.measured:.2g}, allowed {self.allowed:.2g}"


def check_conversion(
    model: nn.Module,
    variables: Mapping[str, Any],
    folded: nn.Module,
    folded_variables: Mapping[str, Any],
    levels: int,
    images: jax.Array,
) -> list[Check]:
    """Measures the identities that tie a spiking network to the network it came from.

    With th = p*s the threshold of a layer: (d) folding changes nothing, measured on the network
    with clip(v, 0, th) in place of each activation, which is continuous, and on the predictions of
    the quantized one. (b) At T = 1 a neuron is the quantizer with one level of height th, whatever
    p: the logits are those of the network with p = 1 and s = th. (c) Over time the outputs tend to
    those of the clipped network. (e) The outputs up to t do not depend on T. (f) Nor does an
    image's output on the rest of its batch.

    Args:
        model: the trained network, with batch norm.
        variables: its variables.
        folded: the network without batch norm.
        folded_variables: its variables.
        levels: p.
        images: [B, H, W, C], at least two.

    Returns:
        One `Check` for each identity.

    Source: Noise Adaptor, section 3; Bu et al., QCFS, 2022, for T = 1.
    """
    continuous, before, one_level = _variants(model, folded)
    clipped = _logits(continuous, _rescaled(folded_variables, levels, "threshold"), images)
    unfolded = _logits(before, _rescaled(variables, levels, "threshold"), images)
    binary = _logits(one_level, _rescaled(folded_variables, levels, "quant_scale"), images)
    quantized = [_logits(model, variables, images), _logits(folded, folded_variables, images)]
    long = _outputs(folded, folded_variables, images, num_steps=LONG)
    short = _outputs(folded, folded_variables, images, num_steps=SHORT)
    half = len(images) // 2
    halves = [images[:half], images[half : 2 * half]]
    parts = [_outputs(folded, folded_variables, part, num_steps=SHORT) for part in halves]
    gaps = [jnp.abs(long[t - 1] - clipped).mean() for t in (SHORT, LONG)]
    named = {
        "folding, largest difference of the clipped network's logits, relative": (
            jnp.abs(unfolded - clipped).max() / jnp.abs(clipped).max(),
            ROUNDING,
        ),
        "folding, share of the quantized network's predictions that change": (
            (quantized[0].argmax(-1) != quantized[1].argmax(-1)).mean(),
            FLIPPED,
        ),
        "T = 1 against the network with one level, share of images that differ": (
            _differ(short[:1], binary[None]),
            FLIPPED,
        ),
        f"outputs to t = {SHORT} for T = {SHORT} against T = {LONG}, share that differ": (
            _differ(short, long[:SHORT]),
            FLIPPED,
        ),
        "whole batch against halves, share of images that differ": (
            _differ(short[:, : 2 * half], jnp.concatenate(parts, 1)),
            FLIPPED,
        ),
        f"error against the clipped network, T = {LONG} over T = {SHORT}": (
            gaps[1] / gaps[0],
            0.5,
        ),
    }
    return [Check(name, float(measured), allowed) for name, (measured, allowed) in named.items()]


# Cached, for jit to know a module again: Flax compares activation slots by identity.
@functools.lru_cache(maxsize=64)
def _variants(model: nn.Module, folded: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The clipped network, folded and not, and the folded network with one level."""
    one_level = functools.partial(Lsq, levels=1)
    return (
        folded.clone(activation=ClippedRelu),
        model.clone(activation=ClippedRelu),
        folded.clone(activation=one_level),
    )


def _rescaled(variables: Mapping[str, Any], levels: int, name: str) -> dict[str, Any]:
    """The variables with every threshold th, or scale s = th/p, replaced by th under that name."""
    factors = {"quant_scale": levels, "threshold": 1}
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables)
    return traverse_util.unflatten_dict(
        {
            (*path[:-1], name) if path[-1] in factors else path: leaf * factors.get(path[-1], 1)
            for path, leaf in flat.items()
        }
    )


def _differ(a: jax.Array, b: jax.Array) -> jax.Array:
    """Share of the images (axis 1) with an output that differs by more than float rounding."""
    return (jnp.abs(a - b).max((0, 2)) > ROUNDING * jnp.abs(b).max()).mean()


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    logits: Any = model.apply(variables, images)
    return logits


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_steps")
def _outputs(model: nn.Module, variables: Any, images: jax.Array, *, num_steps: int) -> jax.Array:
    return simulate(model.apply, variables, images, num_steps=num_steps).outputs
