"""Activations to train with: each rounds its input to a few levels and names the neuron it becomes.

Every activation here is `scale * q(v / scale)`, with `q` inside a mark that `nadaptor.spiking`
finds (see `_jaxpr/marks.py`). Rounding is `floor(x + 0.5)`: a neuron that fires at `u >= levels`
rounds ties up, and with the same rule the quantized and the spiking network agree exactly.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nadaptor._checks import check_key, check_levels, check_positive
from nadaptor._jaxpr.marks import Activation, Mark, apply_activation, decode, encode
from nadaptor._noise import uniform_noise

# Shapes as types, for readers, for type checkers and for tests/test_shapes.py, which checks calls
# against them. The core needs jax alone.
if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, Shaped

GradientMode = Literal["paper", "exact"]
ClipOrder = Literal["last", "first"]
_SMALLEST = 1e-9


def lsq(
    v: Float[ArrayLike, "*shape"],
    scale: Shaped[ArrayLike, "..."],
    levels: int,
    *,
    gradient_scale: float = 1.0,
) -> Float[Array, "*shape"]:
    """Quantizes to `scale * {0, ..., levels}` with a learnable step size (Eq. 3-5).

    Forward: `s * round(clip(v/s, 0, p))`. Backward, with x = v/s: dy/dv is 1 where 0 < x < p and 0
    elsewhere; dy/ds is 0 below, round(x) - x inside and p above. It is also the noise adaptor with
    the noise off.

    Args:
        v: pre-activation, any shape, floating point.
        scale: quantization step s > 0 in the units of v; a scalar, or broadcastable to v.
        levels: p, a positive integer; the neuron's threshold is `levels * scale`.
        gradient_scale: factor on the gradient of `scale` (LSQ uses 1/sqrt(N*p), N the features of
            one sample in the layer).

    Returns:
        The quantized activation, with the shape and dtype of `v`.

    Raises:
        ValueError: `levels` is not a positive int, `v` is not floating point, or `scale` does not
            broadcast to `v` or is concrete and not positive.

    Example:
        >>> lsq(jnp.array([-1.0, 0.24, 0.25, 9.0]), 0.5, levels=2)
        Array([0. , 0. , 0.5, 1. ], dtype=float32)

    Source: Noise Adaptor, Eq. 3-5; Esser et al., Learned step size quantization, 2019.
    """
    return apply_activation(_lsq(check_levels(levels)), v, scale, None, gradient_scale)


def noise_adaptor(
    key: Key[Array, ""],
    v: Float[ArrayLike, "*shape"],
    scale: Shaped[ArrayLike, "..."],
    levels: int,
    *,
    amplitude: float = 0.5,
    gradient: GradientMode = "paper",
    gradient_scale: float = 1.0,
) -> Float[Array, "*shape"]:
    """Quantizes like `lsq` with uniform noise before the clip: stochastic rounding (Eq. 7-10).

    Forward: `s * round(clip(x, 0, p))` with `x = v/s + eps` and `eps ~ U(-amplitude, amplitude)`,
    one draw for each element. Backward uses the same draw: dy/dv is 1 where 0 < x < p and 0
    elsewhere; dy/ds is 0 below, round(x) - x inside and p above. At amplitude 0.5 the mean over the
    noise is `clip(v, 0, p*s)`.

    Args:
        key: typed PRNG key (`jax.random.key`) of any implementation, consumed by this call. It
            seeds a cheap generator that draws for the elements (see `_noise.py`).
        v: pre-activation, any shape, floating point.
        scale: quantization step s > 0 in the units of v; a scalar, or broadcastable to v.
        levels: p, a positive integer; the neuron's threshold is `levels * scale`.
        amplitude: half-width of the noise, in units of the scale; the paper uses 0.5 and discusses
            larger values in section 4.3.
        gradient: "paper" is Eq. 10; "exact" is the straight-through derivative of Eq. 7, whose
            inside term is round(x) - v/s and so differs from Eq. 10 by the zero-mean eps.
        gradient_scale: factor on the gradient of `scale`, as in `lsq`.

    Returns:
        The quantized activation, with the shape and dtype of `v`.

    Raises:
        ValueError: as `lsq`; also for a legacy uint32 key, a negative amplitude, or an unknown
            gradient mode.

    Example:
        >>> y = noise_adaptor(jax.random.key(0), jnp.full((10_000,), 0.3), 1.0, levels=2)
        >>> abs(float(y.mean()) - 0.3) < 0.02
        True

    Source: Noise Adaptor, Eq. 7-10.
    """
    if gradient not in ("paper", "exact"):
        raise ValueError(f"gradient must be 'paper' or 'exact', not {gradient!r}")
    if not (np.isfinite(amplitude) and amplitude >= 0):
        raise ValueError(f"amplitude must be a number >= 0, not {amplitude!r} (the paper uses 0.5)")
    activation = _noise_adaptor(check_levels(levels), float(amplitude), gradient)
    return apply_activation(activation, v, scale, check_key(key), gradient_scale)


def clipped_relu(
    v: Float[ArrayLike, "*shape"], threshold: Shaped[ArrayLike, "..."]
) -> Float[Array, "*shape"]:
    """Clips to [0, threshold]: what a neuron's firing rate tends to over many time steps.

    Backward: dy/dv is 1 where 0 < v < threshold and 0 elsewhere; dy/dthreshold is 1 above the
    threshold and 0 elsewhere.

    Args:
        v: pre-activation, any shape, floating point.
        threshold: th > 0 in the units of v; a scalar, or broadcastable to v.

    Returns:
        The clipped activation, with the shape and dtype of `v`.

    Raises:
        ValueError: `v` is not floating point, or `threshold` does not broadcast to `v` or is
            concrete and not positive.

    Example:
        >>> clipped_relu(jnp.array([-1.0, 0.3, 9.0]), 2.0)
        Array([0. , 0.3, 2. ], dtype=float32)

    Source: Noise Adaptor, section 4.4; Ho and Chang, TCL, 2021.
    """
    return apply_activation(_clipped_relu(), v, threshold, name="threshold")


def qcfs(
    v: Float[ArrayLike, "*shape"],
    threshold: Shaped[ArrayLike, "..."],
    levels: int,
    *,
    clip: ClipOrder = "last",
) -> Float[Array, "*shape"]:
    """Quantizes clip-floor-shift, with the threshold as the learnable parameter.

    Forward: `th * clip(floor(L*v/th + 0.5)/L, 0, 1)`, the values of `lsq` at the scale th/L.
    Backward, the floor straight-through: inside the pass region dy/dv is 1 and dy/dth is
    (y - v)/th; below it both are 0, above it 0 and 1. The region of v/th is
    `[-0.5/L, 1 + 0.5/L)` with the clip last and `[0, 1]` with the clip first: both orders are
    published, and they differ in nothing else.

    Args:
        v: pre-activation, any shape, floating point.
        threshold: th > 0 in the units of v; a scalar, or broadcastable to v. The authors start it
            at 8.0; starts of 4.0 and less were reported to go negative in training.
        levels: L, a positive integer.
        clip: "last" or "first".

    Returns:
        The quantized activation, with the shape and dtype of `v`.

    Raises:
        ValueError: as `lsq`, or for an unknown clip order.

    Example:
        >>> qcfs(jnp.array([-1.0, 0.9, 1.0, 9.0]), 4.0, levels=2)
        Array([0., 0., 2., 4.], dtype=float32)

    Source: Bu et al., Optimal ANN-SNN conversion for high-accuracy and ultra-low-latency spiking
    neural networks, 2022.
    """
    if clip not in ("last", "first"):
        raise ValueError(f"clip must be 'last' or 'first', not {clip!r}")
    levels = check_levels(levels)
    return _by_threshold(_qcfs(levels, clip), v, threshold, levels)


def slip_relu(
    v: Float[ArrayLike, "*shape"],
    threshold: Shaped[ArrayLike, "..."],
    levels: int,
    *,
    slope: float = 0.5,
    shift: float = 0.0,
    floor_shift: float = 0.5,
) -> Float[Array, "*shape"]:
    """Mixes a clipped ReLU with the clip-floor-shift function.

    Forward: `a*th*clip(v/th + d1/N, 0, 1) + (1-a)*th*clip(floor(N*v/th + d2)/N, 0, 1)`. Backward
    is the derivative with the floor straight-through: dy/dv = a*[0 <= v/th + d1/N <= 1] +
    (1-a)*[0 <= floor(N*v/th + d2) <= N], and dy/dth = (y - v*dy/dv)/th. At a = 0 it is `qcfs`, at
    a = 1 (and d1 = 0) `clipped_relu`. Its neuron starts at d2 * th.

    Args:
        v: pre-activation, any shape, floating point.
        threshold: th > 0 in the units of v; a scalar, or broadcastable to v.
        levels: N, a positive integer.
        slope: a, between 0 and 1.
        shift: d1, in units of th/N.
        floor_shift: d2, in units of th/N.

    Returns:
        The activation, with the shape and dtype of `v`.

    Raises:
        ValueError: as `lsq`, or for a slope outside [0, 1].

    Example:
        >>> slip_relu(jnp.array([-1.0, 0.9, 1.0, 9.0]), 4.0, levels=2)
        Array([0.  , 0.45, 1.5 , 4.  ], dtype=float32)

    Source: Jiang et al., A unified optimization framework of ANN-SNN conversion, 2023.
    """
    if not 0 <= slope <= 1:
        raise ValueError(f"slope must be between 0 and 1, not {slope!r}")
    levels = check_levels(levels)
    activation = _slip_relu(levels, float(slope), float(shift), float(floor_shift))
    return _by_threshold(activation, v, threshold, levels)


def round_half_up(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds to the nearest integer, ties up, as an integrate-and-fire neuron does."""
    return jnp.floor(x + 0.5)


def mmse_scale(
    a: Float[Array, "*shape"], levels: int, axes: tuple[int, ...], axis_name: str | None = None
) -> Float[Array, "..."]:
    """Returns the scale at which `lsq` represents activations best (MMSE).

    Of the 95 candidates `max(a) / levels * (1 - 0.01 i)`, i = 0 to 94, the one with the smallest
    mean of `(a - lsq(a, s, levels))^2`. With levels = T it is 1/T of the threshold at which T steps
    of a neuron that starts at half the threshold represent a constant input best.

    Args:
        a: activations >= 0.
        levels: p, a positive integer.
        axes: the axes to reduce, kept with length 1.
        axis_name: mapped axis over which the activations are split; None for none.

    Returns:
        The scale, 0 where all activations are.

    Example:
        >>> round(mmse_scale(jnp.array([1.0, 1.0, 1.0, 1.02]), 1, (0,)).item(), 2)
        1.01

    Source: Li et al., A free lunch from ANN: towards efficient, accurate spiking neural networks
    calibration, 2021.
    """
    largest = a.max(axes, keepdims=True) / levels
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)

    def error(factor: jax.Array) -> jax.Array:
        # Where all is zero so would the scale be, by which nothing can be divided.
        scale = jnp.maximum(largest * factor, _SMALLEST)
        loss = ((a - lsq(a, scale, levels)) ** 2).mean(axes, keepdims=True)
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name)

    factors = 1 - 0.01 * jnp.arange(95)
    # One candidate at a time: else 95 copies of the layer are held at once.
    return largest * factors[jax.lax.map(error, factors).argmin(0)]


# One `Activation` for the same numbers, so that its mark is traced once.
@functools.cache
def _lsq(levels: int) -> Activation:
    def forward(x, key):
        # Eq. 3; of the residual, Eq. 4 and 5.
        q = round_half_up(jnp.clip(x, 0, levels))
        return q, encode(x <= 0, x >= levels, round_half_up(x) - x)

    return Activation(Mark(levels, levels / 2), forward, decode(levels))


@functools.cache
def _noise_adaptor(levels: int, amplitude: float, gradient: str) -> Activation:
    def forward(x, key):
        # One draw for q and residual: the backward pass has the noise of the forward pass.
        noisy = x + uniform_noise(key, x.shape, amplitude).astype(x.dtype)
        q = round_half_up(jnp.clip(noisy, 0, levels))  # Eq. 7
        inside = round_half_up(noisy) - (noisy if gradient == "paper" else x)  # Eq. 10
        return q, encode(noisy <= 0, noisy >= levels, inside)

    return Activation(Mark(levels, levels / 2), forward, decode(levels))


@functools.cache
def _clipped_relu() -> Activation:
    def forward(x, key):
        # One level, so that the scale is the threshold.
        return jnp.clip(x, 0, 1), encode(x <= 0, x >= 1, jnp.zeros_like(x))

    return Activation(Mark(1, 0.5), forward, decode(1))


@functools.cache
def _qcfs(levels: int, clip: str) -> Activation:
    def forward(x, key):
        rounded = round_half_up(x)
        # Clipped last, behind a straight-through floor, half a level beyond each end passes.
        edges = (x < 0, x > levels) if clip == "first" else (rounded < 0, rounded > levels)
        # The same as `rounded` clipped; but a compiler adds 1/2 to v / scale in one rounding where
        # no clip is between, and a value beside a tie then falls elsewhere than in the simulation.
        q = round_half_up(jnp.clip(x, 0, levels))
        return q, encode(*edges, q - x)

    return Activation(Mark(levels, levels / 2), forward, decode(levels))


@functools.cache
def _slip_relu(levels: int, slope: float, shift: float, floor_shift: float) -> Activation:
    def value(x):
        linear = jnp.clip(x + shift, 0, levels)
        return slope * linear + (1 - slope) * jnp.clip(jnp.floor(x + floor_shift), 0, levels)

    def slopes(x):
        linear, floored = x + shift, jnp.floor(x + floor_shift)
        dv = slope * _within(linear, levels) + (1 - slope) * _within(floored, levels)
        # y = s value(v/s), and so dy/ds = value(x) - x value'(x).
        return dv, value(x) - x * dv

    # x itself is kept, as its slopes need it; in half precision it may cross an edge.
    return Activation(Mark(levels, floor_shift * levels), lambda x, key: (value(x), x), slopes)


def _within(x: jax.Array, levels: int) -> jax.Array:
    return ((x >= 0) & (x <= levels)).astype(x.dtype)


def _by_threshold(
    activation: Activation, v: ArrayLike, threshold: ArrayLike, levels: int
) -> jax.Array:
    """Applies an activation whose parameter is the threshold `levels * scale`."""
    threshold = jnp.asarray(check_positive(threshold, "threshold"))
    return apply_activation(activation, v, threshold / levels, name="threshold")
