"""The self-tests of a converted network: identities that hold for every network, on one batch.

A float sum in another order can move a value across a rounding edge, which flips a spike: among
the millions of a large network some do. So the identity between continuous functions is held to
float rounding, and those between quantized or spiking ones to a fraction of what the logits vary
by, which a flipped spike changes little and a wrong weight or threshold much.
"""

import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from nadaptor import simulate, spiking
from nadaptor._execution.once import jit_by_size
from nadaptor.configs.inference import RATES, Spikes
from nadaptor.models import ClippedRelu, Lsq

# Both relative: of sums in another order, and of logits where spikes flip.
ROUNDING = 1e-4
FLIPPED = 0.1
# Time steps.
SHORT, LONG = 8, 32
# With sums: deep networks fall silent long before the bound.
LONGEST = 256
# By the name of an identity, what was measured and what is allowed.
Measured = dict[str, tuple[Any, float]]


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
    spikes: Spikes = RATES,
) -> list[Check]:
    """Measures the identities that tie a spiking network to the network it came from.

    With th = p*s the threshold of a layer: (d) folding changes nothing, measured on the network
    with clip(v, 0, th) in place of each activation, which is continuous, and on the logits of the
    quantized one. (e) The outputs up to t do not depend on T. (f) Nor does an image's output on the
    rest of its batch. With rates: (b) at T = 1 a neuron is the quantizer with one level of height
    th, whatever p: the logits are those of the network with p = 1 and s = th. (c) A layer's mean
    output over T steps of constant input is within th/T of clip(v, 0, th). With sums: (g) neurons
    fall silent, K layers in a row after p + 2p(K - 1) steps at most, and (h) the logits are then
    those of the quantized network.

    Args:
        model: the trained network, with batch norm.
        variables: its variables.
        folded: the network without batch norm.
        folded_variables: its variables.
        levels: p.
        images: [B, H, W, C], at least two.
        spikes: how they carry numbers.

    Returns:
        One `Check` for each identity.

    Source: Noise Adaptor, section 3; Bu et al., QCFS, 2022, for T = 1; You et al., SpikeZIP, 2024,
    for sums.
    """
    continuous, before, one_level = _variants(model, folded)
    _say("the logits with batch norm and without")
    clipped = _logits(continuous, _rescaled(folded_variables, levels, "threshold"), images)
    unfolded = _logits(before, _rescaled(variables, levels, "threshold"), images)
    quantized = [_logits(model, variables, images), _logits(folded, folded_variables, images)]
    run = functools.partial(_outputs, folded, spikes, folded_variables)
    _say(f"{SHORT} time steps")
    short, _ = run(images, num_steps=SHORT)
    half = len(images) // 2
    parts = [run(x, num_steps=SHORT)[0] for x in (images[:half], images[half : 2 * half])]
    network = folded, spikes, folded_variables, images
    if spikes.coding == "sum":
        long, own = _checks_of_sums(*network, levels, quantized[1])
    else:
        binary = _logits(one_level, _rescaled(folded_variables, levels, "quant_scale"), images)
        long, own = _checks_of_rates(*network, binary)
    named = {
        "folding, largest difference of the clipped network's logits, relative": (
            jnp.abs(unfolded - clipped).max() / jnp.abs(clipped).max(),
            ROUNDING,
        ),
        "folding, distance of the quantized network's logits, relative": (
            _distance(*quantized),
            FLIPPED,
        ),
        f"outputs to t = {SHORT} for T = {SHORT} against T = {len(long)}, relative distance": (
            _distance(short, long[:SHORT]),
            FLIPPED,
        ),
        "whole batch against halves, relative distance": (
            # [T, B, classes]; the last image of an odd batch is in neither half.
            _distance(short[:, : 2 * half], jnp.concatenate(parts, 1)),
            FLIPPED,
        ),
        **own,
    }
    return [Check(name, float(measured), allowed) for name, (measured, allowed) in named.items()]


def _checks_of_rates(
    folded: nn.Module,
    spikes: Spikes,
    variables: Mapping[str, Any],
    images: jax.Array,
    binary: jax.Array,
) -> tuple[jax.Array, Measured]:
    """The outputs of a long run, and what holds of rates alone."""
    _say(f"{LONG} time steps")
    long, _ = _outputs(folded, spikes, variables, images, num_steps=LONG)
    return long, {
        "T = 1 against the network with one level, relative distance": (
            _distance(long[0], binary),
            FLIPPED,
        ),
        f"a layer's largest error after {LONG} steps of constant input, in units of th/{LONG}": (
            _layer_error(folded, spikes, variables, images),
            1.0,
        ),
    }


def _checks_of_sums(
    folded: nn.Module,
    spikes: Spikes,
    variables: Mapping[str, Any],
    images: jax.Array,
    levels: int,
    quantized: jax.Array,
) -> tuple[jax.Array, Measured]:
    """The outputs of a run until all is silent, and what holds of sums alone."""
    layers = spiking(folded.apply, variables, images[:1], **spikes._asdict()).layers
    # One step beyond the bound, in which nothing may fire.
    steps = max(SHORT, min(levels + 2 * levels * (len(layers) - 1) + 1, LONGEST))
    _say(f"{steps} time steps, in which the last neuron falls silent")
    long, settled = _outputs(folded, spikes, variables, images, num_steps=steps)
    return long, {
        f"last step with a spike, of {steps}": (settled, steps - 1),
        "outputs after the last spike against the quantized network, relative distance": (
            _distance(long[-1], quantized),
            FLIPPED,
        ),
    }


def _say(what: str) -> None:
    """Each is compiled first, which on a CPU takes a minute for a large network."""
    print(f"compiling and running {what}", file=sys.stderr, flush=True)


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


def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Root mean square of the difference, over that of what the logits of b vary by."""
    return jnp.sqrt(((a - b) ** 2).mean() / ((b - b.mean(-1, keepdims=True)) ** 2).mean())


@functools.partial(jit_by_size, 3, static_argnums=(0, 1))
def _layer_error(folded: nn.Module, spikes: Spikes, variables: Any, images: jax.Array) -> jax.Array:
    """Of all layers, each fed with the analog values of the ones before."""
    net = spiking(folded.apply, variables, images, **spikes._asdict())

    def fire(i: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = net.layers[i]

        def step(carry: tuple[Any, jax.Array], _: None) -> tuple[tuple[Any, jax.Array], None]:
            state, out = net.neuron.step(carry[0], x, layer.threshold)
            return (state, carry[1] + out), None

        start = net.neuron.init(layer.shape, layer.threshold, layer.start)
        (_, total), _ = jax.lax.scan(step, (start, jnp.zeros_like(x)), length=LONG)
        clipped = jnp.clip(x, 0, layer.threshold)
        # |total / T - clipped| in units of th / T.
        return jnp.abs(total - LONG * clipped).max() / layer.threshold, clipped

    errors, _ = net.propagate(net.prepare(variables, images), fire)
    return jnp.stack(errors).max()


@functools.partial(jit_by_size, 2, static_argnums=0)
def _logits(model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    logits: Any = model.apply(variables, images)
    return logits


@functools.partial(jit_by_size, 3, static_argnums=(0, 1), static_argnames="num_steps")
def _outputs(
    model: nn.Module, spikes: Spikes, variables: Any, images: jax.Array, *, num_steps: int
) -> tuple[jax.Array, jax.Array | None]:
    """Outputs at every step, and with sums the last step with a spike."""
    sim = simulate(model.apply, variables, images, num_steps=num_steps, **spikes._asdict())
    return sim.outputs, sim.settled
