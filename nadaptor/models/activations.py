"""Activation layers: a quantizer together with the step size that it learns.

A network takes one of these in its activation slot, as `functools.partial(Lsq, levels=2)`, and
builds it as `activation(name="act1")`. Every layer maps v to an array of the same shape and dtype.
Learned values are float32 whatever the compute dtype and are called `quant_scale` or `threshold`,
never `scale`: batch norm's own gain has that name in Flax, and the two must not be confused by an
optimizer, a projection or a file of weights.

The noise of `NoiseAdaptor` is on exactly where `apply` is given a key for the stream "noise". With
the noise off it computes `lsq`, the deterministic network, and that is what gets converted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from nadaptor._checks import check_levels
from nadaptor.quantization.rules import SCALE_FLOOR
from nadaptor.quantizers import GradientMode, clipped_relu, lsq, mmse_scale, noise_adaptor

ScaleInit = Literal["lsq", "mmse", "mmse_relu"]
# Sets the draw of a network's levels apart from the keys of its layers.
DRAW = 0x1E7E15


class Relu(nn.Module):
    """The full-precision activation max(v, 0): pre-training uses it, and no neuron comes of it."""

    @nn.compact
    def __call__(self, v: jax.Array) -> jax.Array:
        """Returns max(v, 0)."""
        return nn.relu(v)


class Lsq(nn.Module):
    """Quantizes to `s * {0, ..., p}` with the step size s learned (Eq. 3-5).

    Forward `s * round(clip(v/s, 0, p))`. The parameter `quant_scale` starts from the batch with
    which it is created, at `2 * mean|relu(v)| / sqrt(p)` or where it represents relu(v) best, and
    its gradient is multiplied by `1/sqrt(N*p)`, with N the features of one sample that share the
    scale.

    Attributes:
        levels: p, a positive integer.
        scale_gradient: whether to apply LSQ's factor on the gradient of the scale.
        data_init: whether the scale starts from data; else it starts at `initial_scale`.
        scale_init: "lsq" for LSQ's rule; "mmse" for the scale, of 95 up to max(v)/p, at which the
            mean of `(relu(v) - lsq(v))^2` is smallest: a pre-trained network loses less to it;
            "mmse_relu" for the same measured on the network with ReLUs in all of its slots, where
            `start_scales` creates the scale, and of which a pre-trained network loses least.
        initial_scale: the constant start, in the units of v, also where v is silent in the data.
        per_channel: one scale for each entry of the last axis, instead of one for the layer.
        axis_name: mapped axis (of `pmap`, `vmap` or `shard_map`) over which the start is averaged;
            ignored in `init`, which runs outside the map.

    Raises:
        ValueError: bad levels, when the layer is built; v has no batch axis, or as `nadaptor.lsq`.

    Example:
        >>> v = jnp.array([[-1.0, 0.0, 1.0, 2.0]])
        >>> variables = Lsq(levels=2).init(jax.random.key(0), v)
        >>> round(float(variables["params"]["quant_scale"]), 4)  # 2 * 0.75 / sqrt(2)
        1.0607

    Source: Noise Adaptor, Eq. 3-5; Esser et al., Learned step size quantization, 2019, whose start
    and gradient factor the paper follows without stating them; Li et al., A free lunch from ANN,
    2021, for the other start.
    """

    levels: int
    scale_gradient: bool = dataclasses.field(default=True, kw_only=True)
    scale_init: ScaleInit = dataclasses.field(default="lsq", kw_only=True)
    data_init: bool = dataclasses.field(default=True, kw_only=True)
    initial_scale: float = dataclasses.field(default=1.0, kw_only=True)
    per_channel: bool = dataclasses.field(default=False, kw_only=True)
    axis_name: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the levels and the start."""
        check_levels(self.levels)
        if self.scale_init not in get_args(ScaleInit):
            raise ValueError(
                f"scale_init must be one of {get_args(ScaleInit)}, not {self.scale_init!r}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, v: jax.Array) -> jax.Array:
        """Returns the activation of v; creates the scale where it is missing and may be."""
        return self.quantize(v, self.learn_scale(v))

    def learn_scale(self, v: jax.Array) -> jax.Array:
        """Returns the parameter `quant_scale`, created from v where it is missing."""

        def from_mean(positive: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            # Devices hold equal parts, so that the mean of their means is that of the batch.
            mean = _across(self, jax.lax.pmean, positive.mean(axes))
            return 2 * mean / math.sqrt(self.levels)

        measure = from_mean if self.scale_init == "lsq" else self._mmse
        return _learned(self, "quant_scale", v, measure, self.initial_scale)

    def _mmse(self, positive: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        # As in `_across`: init runs outside of the map.
        axis = None if self.is_initializing() else self.axis_name
        return mmse_scale(positive, self.levels, axes, axis).squeeze(axes)

    def quantize(self, v: jax.Array, scale: jax.Array) -> jax.Array:
        """Returns the activation of v for a given scale."""
        return lsq(v, scale, self.levels, gradient_scale=self.gradient_factor(v, scale))

    def gradient_factor(self, v: jax.Array, scale: jax.Array) -> float:
        """Returns LSQ's 1/sqrt(N*p), or 1 where it is switched off."""
        if not self.scale_gradient:
            return 1.0
        # Not v.size: the batch may be a symbol of an export.
        features = math.prod(v.shape[1:]) / scale.size
        return 1 / math.sqrt(features * self.levels)


class NoiseAdaptor(Lsq):
    """`Lsq` with uniform noise before the clip while it trains: stochastic rounding (Eq. 7-10).

    Forward `s * round(clip(v/s + eps, 0, p))` with `eps ~ U(-amplitude, amplitude)` where `apply`
    is given a key for the stream "noise", and `lsq` where it is not. Each example draws with its
    own key, `fold_in(layer key, global example index)`, so that its noise does not depend on how
    many devices share the batch; the key passed to `apply` must then be the same on all of them.

    Attributes:
        amplitude: half-width of the noise in units of the scale; the paper uses 0.5.
        gradient: "paper" (Eq. 10) or "exact", as in `nadaptor.noise_adaptor`.
        axis_name: mapped axis over which the batch is split, also used for the start of the scale.

    Raises:
        ValueError: v has no batch axis, or as `nadaptor.noise_adaptor`.

    Example:
        >>> layer, v = NoiseAdaptor(levels=2, data_init=False), jnp.full((2, 3), 0.3)
        >>> variables = layer.init(jax.random.key(0), v)
        >>> layer.apply(variables, v).tolist()  # no key, no noise
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        >>> noisy = layer.apply(variables, v, rngs={"noise": jax.random.key(1)})
        >>> sorted(set(noisy.ravel().tolist()))
        [0.0, 1.0]

    Source: Noise Adaptor, Eq. 7-10.
    """

    amplitude: float = 0.5
    gradient: GradientMode = "paper"

    def quantize(self, v: jax.Array, scale: jax.Array) -> jax.Array:
        """Returns the activation of v for a given scale, noisy where the stream "noise" is."""
        # Not make_rng alone: without "noise" Flax silently falls back to the "params" stream.
        if not self.has_rng("noise"):
            return super().quantize(v, scale)
        return self.quantize_noisy(self._example_keys(v.shape[0]), v, scale, self.levels)

    def quantize_noisy(
        self, keys: jax.Array, v: jax.Array, scale: jax.Array, levels: int
    ) -> jax.Array:
        """Returns the noisy activation of v, one key an example."""
        # That of p levels, whichever number `AnyLevel` has drawn.
        factor = self.gradient_factor(v, scale)

        def one(key: jax.Array, example: jax.Array) -> jax.Array:
            return noise_adaptor(
                key,
                example,
                scale,
                levels,
                amplitude=self.amplitude,
                gradient=self.gradient,
                gradient_scale=factor,
            )

        return jax.vmap(one)(keys, v)

    def _example_keys(self, batch: int) -> jax.Array:
        # The devices hold equal parts of the batch, in its order.
        first = _across(self, lambda _, axis: jax.lax.axis_index(axis) * batch, 0)
        layer_key = self.make_rng("noise")
        return jax.vmap(lambda index: jax.random.fold_in(layer_key, index))(
            first + jnp.arange(batch)
        )


class AnyLevel(NoiseAdaptor):
    """`NoiseAdaptor` whose levels are drawn anew at each step, with the threshold th = p*s kept.

    Where `apply` is given a key for the stream "noise", one of `drawn` is drawn for the whole
    network, l say, and v is quantized with noise to `th/l * {0, ..., l}`: in one run the network
    learns to work after few time steps, of which l = 1 is the first, and after many. Without the
    key it computes `lsq` with p levels, and that is what gets converted.

    Attributes:
        drawn: the levels to draw from, each as likely.

    Raises:
        ValueError: bad levels, when the layer is built; v has no batch axis.

    Example:
        >>> layer, v = AnyLevel(levels=2, data_init=False, drawn=(1,)), jnp.full((2, 3), 1.0)
        >>> variables = layer.init(jax.random.key(0), v)
        >>> noisy = layer.apply(variables, v, rngs={"noise": jax.random.key(1)})
        >>> sorted(set(noisy.ravel().tolist()))  # multiples of th/1 = 2
        [0.0, 2.0]

    Source: this project; the quantizer is the Noise Adaptor's, Eq. 7-10.
    """

    drawn: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        """Checks the levels."""
        for levels in self.drawn:
            check_levels(levels)
        if not self.drawn:
            raise ValueError("drawn must name at least one number of levels, as (1, 2, 4)")
        super().__post_init__()

    def quantize(self, v: jax.Array, scale: jax.Array) -> jax.Array:
        """Returns the activation of v, with the levels of this step where "noise" is."""
        if not self.has_rng("noise"):
            return super().quantize(v, scale)
        keys, threshold = self._example_keys(v.shape[0]), scale * self.levels
        noisy = [
            functools.partial(self._noisy, threshold=threshold, levels=levels)
            for levels in self.drawn
        ]
        # One branch is run: a step costs what it costs with one number of levels.
        return jax.lax.switch(self._draw(), noisy, keys, v)

    def _noisy(self, keys: jax.Array, v: jax.Array, threshold: jax.Array, levels: int) -> jax.Array:
        return self.quantize_noisy(keys, v, threshold / levels, levels)

    def _draw(self) -> jax.Array:
        # Of the key that apply was given, and not of this layer's: all layers draw the same.
        assert self.scope is not None
        network_key: Any = self.scope.root.rngs["noise"]
        network_key = network_key.as_jax_rng()
        return jax.random.randint(jax.random.fold_in(network_key, DRAW), (), 0, len(self.drawn))


class ClippedRelu(nn.Module):
    """Clips to [0, th] with the threshold th learned: the limit of a neuron over many time steps.

    The parameter `threshold` starts at the maximum of v over the batch with which it is created. To
    calibrate instead of learning, write it into the variables.

    Attributes:
        data_init: whether the threshold starts from data; else it starts at `initial_threshold`.
        initial_threshold: the constant start, in the units of v, also where v is silent in the
            data.
        per_channel: one threshold for each entry of the last axis, instead of one for the layer.
        axis_name: mapped axis over which the maximum is taken; ignored in `init`.

    Raises:
        ValueError: v has no batch axis, or as `nadaptor.clipped_relu`.

    Example:
        >>> v = jnp.array([[-1.0, 0.5, 2.0]])
        >>> variables = ClippedRelu().init(jax.random.key(0), v)
        >>> ClippedRelu().apply(variables, 2 * v).tolist()
        [[0.0, 1.0, 2.0]]

    Source: Noise Adaptor, section 4.4; Ho and Chang, TCL, 2021.
    """

    data_init: bool = dataclasses.field(default=True, kw_only=True)
    initial_threshold: float = dataclasses.field(default=4.0, kw_only=True)
    per_channel: bool = dataclasses.field(default=False, kw_only=True)
    axis_name: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, v: jax.Array) -> jax.Array:
        """Returns the activation of v; creates the threshold where it is missing and may be."""
        return self.activate(v, self.learn_threshold(v))

    def learn_threshold(self, v: jax.Array) -> jax.Array:
        """Returns the parameter `threshold`, created from v where it is missing."""

        def measure(positive: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            return _across(self, jax.lax.pmax, positive.max(axes))

        return _learned(self, "threshold", v, measure, self.initial_threshold)

    def activate(self, v: jax.Array, threshold: jax.Array) -> jax.Array:
        """Returns v clipped to [0, threshold]."""
        return clipped_relu(v, threshold)


def _learned(
    module: Any,
    name: str,
    v: jax.Array,
    measure: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    constant: float,
) -> jax.Array:
    """The parameter of that name, in float32, created from data or as the constant."""
    if v.ndim < 2:
        raise ValueError(
            f"v must be [batch, ..., features], not shape {v.shape}; add a batch axis: v[None]"
        )
    # Flax traces the initialiser at every apply to compare shapes, so that a pmean inside it would
    # need its axis even where nothing is created.
    if module.has_variable("params", name) or not module.data_init:
        start = jnp.full((v.shape[-1],) if module.per_channel else (), constant, jnp.float32)
    else:
        axes = tuple(range(v.ndim - 1 if module.per_channel else v.ndim))
        measured = measure(nn.relu(v.astype(jnp.float32)), axes)
        # A layer that is silent on the first batch measures 0, from which no scale recovers.
        start = jnp.where(measured > SCALE_FLOOR, measured, constant).astype(jnp.float32)
    return module.param(name, lambda key: start)


def _across(module: Any, collective: Callable[[Any, str], jax.Array], x: Any) -> Any:
    """The collective of x over the module's axis; x itself without one and in `init`."""
    if module.axis_name is None or module.is_initializing():
        return x
    return collective(x, module.axis_name)
