"""The transformation of a network with ReLUs into one with quantized activations.

`quantize(f)` is f with a quantizer in the place of each ReLU, and with a mean in the place of each
max-pool that spikes reach: the first half of the paper's recipe, for any JAX function, unchanged.
`nadaptor.spiking` is the other half. The scales are a dict by layer name, beside the parameters:

    q = nadaptor.quantize(f, levels=2)
    scales = q.init(params, images)                        # measured on the network with ReLUs
    logits = q(scales, params, images, key=key)            # with the adaptor's noise, to train
    sim = nadaptor.simulate(q, scales, params, images, num_steps=16)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nadaptor._checks import check_levels, check_name, check_scales
from nadaptor._jaxpr.find import find
from nadaptor._jaxpr.found import Found, Left, QuantizedLayer
from nadaptor._jaxpr.rewrite import rewrite
from nadaptor._jaxpr.trace import to_jaxpr
from nadaptor._noise import layer_keys
from nadaptor.quantization.activations import ACTIVATIONS
from nadaptor.quantization.refusals import (
    FIRST,
    check_first,
    nothing_to_quantize,
    swapped,
    warn_of_means,
)
from nadaptor.quantization.rules import (
    SCALE_FLOOR,
    SMALLEST,
    Rule,
    at_most,
    other_axes,
    projection,
    scale_rule,
)

Activation = Callable[[jax.Array, jax.Array, int, jax.Array | None], jax.Array]
"""Maps (v, scale, levels, key) to the activation of v; the key is None without noise."""


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A function with quantized activations; made by `quantize`.

    Called as the function with the scales in front, it traces the function anew for the arguments
    it gets, as `jax.grad(f)` does, so other batch sizes and modes need nothing; `jax.jit` it.
    """

    f: Callable[..., Any]
    levels: int
    activation: str | Activation
    argnums: tuple[int, ...] | None
    batch_axis: int | None
    pools: bool | None
    select: Callable[[QuantizedLayer], bool] | None

    def __call__(
        self,
        scales: Mapping[str, jax.Array] | float,
        *args: Any,
        key: jax.Array | None = None,
    ) -> Any:
        """Evaluates the quantized function.

        Args:
            scales: the scale of each layer, by name, as `init` returns them: a scalar, or what
                broadcasts to the layer; for a layer in a scan with one leading axis of the scan's
                length. For "clipped_relu" they are the thresholds. A number is that of all layers.
            *args: as those of the function.
            key: typed PRNG key for the noise, or one for each example, an array of keys along
                `batch_axis`. None for the deterministic function, which is the one to convert.

        Returns:
            What the function returns.

        Raises:
            ValueError: the function cannot be quantized, or the scales are missing, of other
                layers, of another shape or not positive.
        """
        check_first(scales)
        try:
            closed, tree, found = self._find(args)
        except Exception as error:
            if swapped(self.f, scales, args):
                raise ValueError(FIRST) from error
            raise
        layers = _neurons(found)
        scales = check_scales(scales, layers)
        keys = layer_keys(key, layers)
        given = {layer.name: (scales[layer.name], keys[layer.name]) for layer in layers}

        def replace(layer: QuantizedLayer, v: jax.Array, given: Any) -> tuple[jax.Array, None]:
            return self._activate(layer, v, *given), None

        outputs, _ = rewrite(closed, found.plans, replace, jax.tree.leaves(args), given)
        return jax.tree.unflatten(tree, outputs)

    def init(
        self,
        *args: Any,
        rule: str | Rule = "mmse",
        percent: float = 99.9,
        channel_axis: int | None = None,
        sequential: bool = False,
    ) -> dict[str, jax.Array]:
        """Measures the scales on data.

        Args:
            *args: as those of the function, with a batch of data.
            rule: "mmse", the scale that represents the activations best; "lsq",
                `2 * mean / sqrt(p)`; "max"; "percentile"; or a function of the activations >= 0
                and the axes to reduce (kept, with length 1) to a threshold.
            percent: for the rule "percentile", of the activations above zero.
            channel_axis: axis of the layers' arrays of which each entry has a scale of its own;
                None for one scale a layer.
            sequential: whether a layer is measured behind quantized layers, instead of on the
                network with ReLUs. The network with ReLUs gives better starts.

        Returns:
            The scale of each layer by its name, float32; for "clipped_relu" the thresholds.

        Raises:
            ValueError: the function cannot be quantized, the rule is unknown, or, where values are
                concrete, a layer is zero on the whole batch.
        """
        by_threshold = self.activation == "clipped_relu"
        measure = scale_rule(rule, self.levels, percent, by_threshold)
        closed, _, found = self._find(args)
        if self.pools is None:
            warn_of_means(found)

        def replace(layer: QuantizedLayer, v: jax.Array, _: Any) -> tuple[jax.Array, Any]:
            a = jnp.clip(v, 0, layer.bound)
            scale = measure(a.astype(jnp.float32), other_axes(a, channel_axis))
            scale = scale if channel_axis is not None else scale.reshape(())
            # A channel that is silent on the whole batch gets a scale that it can leave.
            usable = jnp.where(scale > SMALLEST, scale, 1.0).astype(jnp.float32)
            out = self._activate(layer, v, usable, None) if sequential else a
            return out, (usable, scale > SMALLEST)

        leaves = jax.tree.leaves(args)
        measured = rewrite(closed, found.plans, replace, leaves, {})[1]
        _check_not_silent(_neurons(found), measured)
        return {name: scale for name, (scale, _) in measured.items()}

    def layers(self, *args: Any) -> tuple[QuantizedLayer, ...]:
        """Returns what is replaced, in order, for arguments like these."""
        plans = self._find(args)[2].plans
        return tuple(plan.layer for plan in plans.values() if plan.layer is not None)

    def left(self, *args: Any) -> tuple[Left, ...]:
        """Returns what is left for arguments like these, each with the reason.

        These are the maxima with zero that are no activation, and what spikes reach and no neuron
        can come of. Nothing of f needs to be quantizable.
        """
        return self._trace(args)[2].left

    def _trace(self, args: tuple[Any, ...]) -> tuple[Any, Any, Found]:
        traced, shapes = to_jaxpr(self.f, *args)
        chosen = None
        if self.argnums is not None:
            for n in self.argnums:
                if not -len(args) <= n < len(args):
                    raise ValueError(f"argnums names argument {n}, but there are {len(args)}")
            chosen = {n % len(args) for n in self.argnums}
        data = [
            chosen is None or i in chosen
            for i, arg in enumerate(args)
            for _ in jax.tree.leaves(arg)
        ]
        return (
            traced,
            jax.tree.structure(shapes),
            find(traced, data, self.select, self.pools is not False),
        )

    def _find(self, args: tuple[Any, ...]) -> tuple[Any, Any, Found]:
        closed, tree, found = self._trace(args)
        if not _neurons(found):
            raise nothing_to_quantize(found.left, self.argnums)
        return closed, tree, found

    def _activate(
        self, layer: QuantizedLayer, v: jax.Array, scale: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        entry = ACTIVATIONS[self.activation] if isinstance(self.activation, str) else None
        if layer.bound is not None:
            unit = 1 if entry is not None and entry.by_threshold else self.levels
            scale = at_most(scale, layer.bound / unit)
        activate = self.activation
        if entry is not None:
            factor = 1.0
            if entry.scaled:
                # LSQ's N: the features of one example that share this scale.
                features = _features(v.shape, self.batch_axis) / math.prod(jnp.shape(scale))
                factor = 1 / math.sqrt(features * self.levels)
            activate = functools.partial(entry.forward, factor)
        assert callable(activate)
        if key is None or not key.ndim:
            return activate(v, scale, self.levels, key)
        return self._noise_by_example(activate, layer, v, scale, key)

    def _noise_by_example(
        self, activate: Any, layer: QuantizedLayer, v: jax.Array, scale: jax.Array, keys: jax.Array
    ) -> jax.Array:
        axis = self.batch_axis
        if axis is None or axis >= v.ndim or keys.shape != (v.shape[axis],):
            raise ValueError(
                f"the keys are of shape {keys.shape}, but the layer {layer.name} has the shape "
                f"{v.shape} and the batch axis {axis}; give one key, or one for each example"
            )
        scale = jnp.asarray(scale)
        # Mapped over the examples v has no batch axis; a scale that has one of length 1 loses it.
        inner = scale.squeeze(axis) if scale.ndim == v.ndim and scale.shape[axis] == 1 else scale

        def one(key: jax.Array, v: jax.Array) -> jax.Array:
            return activate(v, inner, self.levels, key)

        return jax.vmap(one, (0, axis), axis)(keys, v)


def quantize(
    f: Callable[..., Any],
    levels: int = 2,
    *,
    activation: str | Activation = "noise_adaptor",
    argnums: int | tuple[int, ...] | None = -1,
    batch_axis: int | None = 0,
    pools: bool | None = None,
    select: Callable[[QuantizedLayer], bool] | None = None,
) -> Quantized:
    """Puts a quantizer in the place of each ReLU of a function (section 2.3, Eq. 3-5 and 7-10).

    A ReLU is found however it is written: `jax.nn.relu`, `jnp.maximum(x, 0)`,
    `jnp.where(x > 0, x, 0)`, `x * (x > 0)`, and bounded `relu6` and `jnp.clip(x, 0, c)`, of which
    the threshold p*s stays at most the bound. One that no data reaches, that stands before the
    first product with weights, that guards a root or a divisor (the variance of a batch norm) or
    that is a part of another function (`softplus`) stays. `remat`, `scan` and custom derivatives
    stay as they are; a ReLU in a scan has a scale for each turn.

    Quantize the network, not the loss, and differentiate the result: `jax.grad(quantize(f))`. As
    with the activations themselves there is no forward-mode derivative. Over models
    `quantize(jax.vmap(f))` has one scale for all; `jax.vmap(q)` and `jax.vmap(q.init)` one each.

    Args:
        f: any JAX function, with any pytrees of arrays as arguments and result.
        levels: p, a positive integer. With "clipped_relu", whose scales are thresholds, it counts
            only in the rule "mmse", as the number of time steps.
        activation: "noise_adaptor" ("lsq" where no key is given), "lsq", "clipped_relu", "qcfs" or
            "slip_relu", or a function of (v, scale, levels, key) that returns an activation of
            `nadaptor`; the key is None without noise. "noise_adaptor" and "lsq" multiply the
            gradient of a scale by LSQ's 1/sqrt(N*p), N the features of one example that share it.
        argnums: which arguments are data; the others are parameters. The last, as in
            `model.apply(variables, images)`; None for all.
        batch_axis: axis of the layers' arrays that the examples lie along, for LSQ's N and for
            keys by example; None where f takes one example.
        pools: whether max-pools become means over the same windows, padded zeros counted, where
            spikes reach them. None is True, with a warning in `init`: what was trained with maxima
            is another network with means.
        select: says of a layer, as `Quantized.layers` lists them, whether to replace it.

    Returns:
        The function with quantized activations: `q(scales, *args, key=None)`, with `q.init`,
        `q.layers` and `q.left`.

    Raises:
        ValueError: `levels` or `activation` is unknown here; and when called, with the line of the
            user's code and the remedy: there is nothing to quantize, the derivative of a ReLU
            stands in f, or a ReLU stands in a `cond`, `while`, `shard_map` or `pmap`, or with
            other operations in a function with a derivative of its own.

    Example:
        >>> f = lambda w, x: jax.nn.relu(x @ w)
        >>> w, x = jnp.eye(3), jnp.array([[-1.0, 0.6, 2.0]])
        >>> q = quantize(f, levels=2)
        >>> [layer.name for layer in q.layers(w, x)]
        ['layer0']
        >>> q({"layer0": 0.5}, w, x)
        Array([[0. , 0.5, 1. ]], dtype=float32)

    Source: Noise Adaptor, sections 2.3 and 3; Esser et al., Learned step size quantization, 2019.
    """
    if isinstance(activation, str):
        check_name(activation, ACTIVATIONS, "activation")
    numbers = (argnums,) if isinstance(argnums, int) else argnums
    return Quantized(f, check_levels(levels), activation, numbers, batch_axis, pools, select)


def project_scales(
    scales: Mapping[str, jax.Array], floor: float = SCALE_FLOOR
) -> dict[str, jax.Array]:
    """Projects the scales to at least `floor`: `s <- max(s, floor)`, after each update.

    Raises:
        ValueError: `floor` is not positive.

    Example:
        >>> project_scales({"layer0": jnp.float32(-0.5)}, floor=0.25)
        {'layer0': Array(0.25, dtype=float32)}
    """
    project = projection(floor)
    return {name: project(scale) for name, scale in scales.items()}


def _neurons(found: Found) -> list[QuantizedLayer]:
    layers = [plan.layer for plan in found.plans.values() if plan.layer is not None]
    return [layer for layer in layers if layer.kind != "max_pool"]


def _features(shape: tuple[int, ...], batch_axis: int | None) -> int:
    axis = None if batch_axis is None else batch_axis % max(len(shape), 1)
    return math.prod(size for i, size in enumerate(shape) if i != axis)


def _check_not_silent(layers: list[QuantizedLayer], measured: dict[str, Any]) -> None:
    """Where values are concrete: refuses a layer of which no scale could be measured."""
    for layer in layers:
        active = measured[layer.name][1]
        if not isinstance(active, Tracer) and not np.any(active):
            raise ValueError(
                f"the layer {layer.name} ({layer.source}) is zero on all of the data, so there is "
                "no scale to measure; measure on other data, or keep its ReLU: "
                f"select=lambda layer: layer.name != {layer.name!r}"
            )
