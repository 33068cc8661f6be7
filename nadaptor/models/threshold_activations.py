"""Activation layers that learn a threshold instead of a step size: QCFS, SlipReLU and TTRBR.

Each is a `ClippedRelu` with another function of v and its threshold. The threshold th is the
parameter `threshold`, one scalar a layer; the step size is th/levels. As their authors do, they
apply no factor to its gradient, and leave its decay to the optimizer.
"""

import dataclasses

import jax

from nadaptor._checks import check_levels
from nadaptor.models.activations import ClippedRelu
from nadaptor.quantizers import ClipOrder, qcfs, slip_relu


class Qcfs(ClippedRelu, kw_only=True):
    """Quantizes clip-floor-shift with the threshold learned.

    Forward `th * clip(floor(L*v/th + 0.5)/L, 0, 1)`. The parameter `threshold` starts at 8.0, the
    authors' constant: starts of 4.0 and below were reported to turn negative, which the projection
    to a positive floor (`project_scales`) rules out here.

    Attributes:
        levels: L, a positive integer.
        clip: "last" or "first", the two published orders, as in `nadaptor.qcfs`.
        data_init: whether the threshold starts at the maximum of the first batch instead.
        initial_threshold: the constant start, in the units of v.
        per_channel: one threshold for each entry of the last axis, instead of one for the layer.
        axis_name: mapped axis over which the maximum is taken; ignored in `init`.

    Raises:
        ValueError: bad levels, when the layer is built; v has no batch axis, or as `nadaptor.qcfs`.

    Example:
        >>> layer, v = Qcfs(levels=4), jax.numpy.array([[-1.0, 1.0, 3.0, 20.0]])
        >>> layer.apply(layer.init(jax.random.key(0), v), v).tolist()
        [[0.0, 2.0, 4.0, 8.0]]

    Source: Bu et al., Optimal ANN-SNN conversion for high-accuracy and ultra-low-latency spiking
    neural networks, 2022.
    """

    levels: int
    clip: ClipOrder = dataclasses.field(default="last", kw_only=True)
    data_init: bool = dataclasses.field(default=False, kw_only=True)
    initial_threshold: float = dataclasses.field(default=8.0, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the levels."""
        check_levels(self.levels)
        super().__post_init__()

    def activate(self, v: jax.Array, threshold: jax.Array) -> jax.Array:
        """Returns the activation of v for a given threshold."""
        return qcfs(v, threshold, self.levels, clip=self.clip)


class SlipRelu(Qcfs, kw_only=True):
    """Mixes a clipped ReLU with the clip-floor-shift function, the threshold learned.

    Forward `a * clip(v + d1*s, 0, th) + (1-a) * s*clip(floor(v/s + d2), 0, N)` with s = th/N. The
    spiking network is that of the second part: its neurons start at d2 * th, and a = 0 is `Qcfs`
    with the clip last.

    Attributes:
        levels: N, a positive integer.
        slope: a, between 0 and 1; the authors use 0.5.
        shift: d1, in units of s.
        floor_shift: d2, in units of s.

    Raises:
        ValueError: as `Qcfs`, or for a slope outside [0, 1].

    Example:
        >>> layer, v = SlipRelu(levels=4), jax.numpy.array([[-1.0, 1.0, 3.0, 20.0]])
        >>> layer.apply(layer.init(jax.random.key(0), v), v).tolist()
        [[0.0, 1.5, 3.5, 8.0]]

    Source: Jiang et al., A unified optimization framework of ANN-SNN conversion, 2023.
    """

    slope: float = dataclasses.field(default=0.5, kw_only=True)
    shift: float = dataclasses.field(default=0.0, kw_only=True)
    floor_shift: float = dataclasses.field(default=0.5, kw_only=True)

    def activate(self, v: jax.Array, threshold: jax.Array) -> jax.Array:
        """Returns the activation of v for a given threshold."""
        return slip_relu(
            v,
            threshold,
            self.levels,
            slope=self.slope,
            shift=self.shift,
            floor_shift=self.floor_shift,
        )


class Ttrbr(Qcfs, kw_only=True):
    """An approximation of TTRBR: clipped and finely quantized, with the threshold tuned.

    No code of the authors was found, and this is not their algorithm. What it takes from them: 32
    levels, a threshold for each layer that starts at the largest activation and is then tuned, here
    by gradient, and blocks restructured so that the two branches meet as currents in front of a
    neuron, which is how every block of this library is built. Forward as `Qcfs`; its gradient
    passes where 0 <= v <= th.

    Raises:
        ValueError: as `Qcfs`.

    Example:
        >>> layer, v = Ttrbr(), jax.numpy.array([[-1.0, 0.51, 1.0]])
        >>> layer.apply(layer.init(jax.random.key(0), v), v).tolist()  # 0.51 is 16.32 / 32
        [[0.0, 0.5, 1.0]]

    Source: Meng et al., Training much deeper spiking neural networks with a small number of
    time-steps, 2022, as the Noise Adaptor paper compares with it.
    """

    levels: int = 32
    clip: ClipOrder = dataclasses.field(default="first", kw_only=True)
    data_init: bool = dataclasses.field(default=True, kw_only=True)
    initial_threshold: float = dataclasses.field(default=4.0, kw_only=True)
