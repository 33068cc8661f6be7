"""Rules that measure a threshold: each maps activations >= 0 and the axes to reduce to one.

They serve the starts of scales (`nadaptor.quantize`) and the calibration without training alike.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nadaptor._checks import check_count, check_name
from nadaptor._execution.placement import gather
from nadaptor.quantizers import mmse_scale

Rule = Callable[[jax.Array, tuple[int, ...]], jax.Array]
"""Maps activations >= 0 and the axes to reduce (kept, with length 1) to a threshold."""

# The smallest scale that training may reach: weight decay acts on scales, too, and an update may
# take one through 0.
SCALE_FLOOR = 1e-4
# What is measured below this is taken for silence.
SMALLEST = 1e-6


def projection(floor: float) -> Callable[[jax.Array], jax.Array]:
    """What takes a scale to at least `floor`, as `project_scales` does after each update.

    Raises:
        ValueError: `floor` is not positive.

    Example:
        >>> projection(0.25)(jnp.float32(-0.5)).item()
        0.25
    """
    if not floor > 0:
        raise ValueError(f"floor must be positive, not {floor!r}; the default is {SCALE_FLOOR}")
    return lambda scale: jnp.maximum(scale, jnp.asarray(floor, scale.dtype))


def maximum() -> Rule:
    """The largest activation: nothing is clipped, and most neurons fire seldom.

    Example:
        >>> maximum()(jnp.array([0.0, 1.0, 4.0]), (0,)).item()
        4.0

    Source: Diehl et al., Fast-classifying, high-accuracy spiking deep networks, 2015.
    """
    return lambda a, axes: a.max(axes, keepdims=True)


def percentile(percent: float = 99.9) -> Rule:
    """The percentile of the activations that are not zero.

    Args:
        percent: 99.9 is usual; 99 is faster over time and clips more.

    Raises:
        ValueError: `percent` is not above 0 and at most 100.

    Example:
        >>> percentile(50)(jnp.array([0.0, 0.0, 1.0, 2.0, 9.0]), (0,)).item()
        2.0

    Source: Rueckauer et al., 2017.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, not {percent!r}")

    def rule(a: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        a, axes = gather(a), tuple(i % a.ndim for i in axes)
        kept = [i for i in range(a.ndim) if i not in axes]
        shape = [a.shape[i] for i in kept]
        ordered = jnp.sort(jnp.where(a > 0, a, 0).transpose(*kept, *axes).reshape(*shape, -1))
        # The zeros come first; to mark them as NaN would be a fault to `jax_debug_nans`.
        size, number = ordered.shape[-1], (ordered > 0).sum(-1, keepdims=True)
        wide = jnp.promote_types(a.dtype, jnp.float32)
        # Linear between the two values beside it, as numpy's percentile.
        place = jnp.maximum(number - 1, 0).astype(wide) * (percent / 100)
        below = jnp.floor(place)

        def nth(i: jax.Array) -> jax.Array:
            index = jnp.minimum(size - number + i.astype(number.dtype), size - 1)
            return jnp.take_along_axis(ordered, index, -1).astype(wide)

        above = place - below
        found = nth(below) * (1 - above) + nth(jnp.ceil(place)) * above
        return found.astype(a.dtype).reshape([1 if i in axes else n for i, n in enumerate(a.shape)])

    return rule


def mmse(num_steps: int) -> Rule:
    """The threshold at which T steps, or T levels, represent the activations best (MMSE).

    Of the 95 candidates `max * (1 - 0.01 i)`, i = 0 to 94, the one with the smallest mean of
    `(a - th*clip(floor(T*a/th + 1/2)/T, 0, 1))^2`: what T steps of a neuron that starts at th/2
    make of a constant input, and what `nadaptor.lsq` with T levels makes of it. Li et al. start at
    0 and so have a floor there: these thresholds come out 1.14 to 1.27 times theirs.

    Args:
        num_steps: T, the number of steps that the network is going to run, or of levels.

    Raises:
        ValueError: `num_steps` is not a positive int.

    Example:
        >>> a = jnp.array([1.0, 1.0, 1.0, 1.02])
        >>> round(mmse(1)(a, (0,)).item(), 2)
        1.01

    Source: Li et al., A free lunch from ANN: towards efficient, accurate spiking neural networks
    calibration, 2021.
    """
    levels = check_count(num_steps, "num_steps")
    return lambda a, axes: levels * mmse_scale(a, levels, axes)


def mean_scale(a: jax.Array, axes: tuple[int, ...], levels: int) -> jax.Array:
    """LSQ's start of a scale, `2 * mean / sqrt(levels)`.

    Source: Esser et al., Learned step size quantization, 2019.
    """
    return 2 * a.mean(axes, keepdims=True) / math.sqrt(levels)


def scale_rule(rule: str | Rule, levels: int, percent: float, by_threshold: bool) -> Rule:
    """The rule of a name, or of a threshold, as one of a scale.

    Args:
        rule: "mmse", "lsq", "max", "percentile" or a rule of a threshold.
        levels: the threshold in units of the scale.
        percent: for "percentile".
        by_threshold: whether the scale is the threshold itself.

    Raises:
        ValueError: the name is unknown, or the percentage is out of its range.
    """
    # The scale of mmse and lsq first: times and by the levels would round.
    # levels // unit is the levels where the scale is the threshold, and else 1.
    unit = 1 if by_threshold else levels
    scales: dict[str, Rule] = {
        "mmse": lambda a, axes: mmse_scale(a, levels, axes) * (levels // unit),
        "lsq": lambda a, axes: mean_scale(a, axes, levels) * (levels // unit),
    }
    thresholds = {"max": maximum(), "percentile": percentile(percent)}
    if isinstance(rule, str):
        name = check_name(rule, {**scales, **thresholds}, "rule")
        if name in scales:
            return scales[name]
        rule = thresholds[name]
    threshold = rule
    return lambda a, axes: threshold(a, axes) / unit


def other_axes(x: jax.Array, axis: int | None) -> tuple[int, ...]:
    """All axes of x but one; all where it is None."""
    return tuple(i for i in range(x.ndim) if axis is None or i != axis % x.ndim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def at_most(scale: jax.Array, bound: float) -> jax.Array:
    """The scale, at most `bound`, straight-through: a step above the bound can be undone."""
    return jnp.minimum(scale, jnp.asarray(bound, jnp.result_type(scale)))


@at_most.defjvp
def _at_most_jvp(
    bound: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return at_most(*primals, bound), tangents[0]
