"""On a mesh of `AxisType.Explicit`: the numbers of one device, or one sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nadaptor
from nadaptor.calibration import calibrate_biases, calibrate_thresholds, maximum, percentile
from nadaptor.early_exit import simulate_with_early_exit

F32 = np.float32
# Dyadic numbers: no order of summation rounds.
V = (np.arange(16) % 11 - 3).reshape(4, 4).astype(F32) / 4
W = (np.arange(8) % 5 - 1).reshape(4, 2).astype(F32) / 4
IMAGES = (np.arange(2 * 4 * 4 * 8) % 7 - 2).reshape(2, 4, 4, 8).astype(F32) / 4
KERNEL = (np.arange(9 * 8 * 2) % 5 - 2).reshape(3, 3, 8, 2).astype(F32) / 4
MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
ROWS, COLUMNS, WHOLE = P("data"), P(None, "model"), P()


def network(w, x):
    """Two layers of neurons."""
    hidden = nadaptor.lsq(x, F32(0.5), 2) @ w
    return nadaptor.lsq(hidden, F32(0.25), 4)


def relus(w, x):
    """The same with plain ReLUs."""
    return jax.nn.relu(jax.nn.relu(x) @ w)


def convolution(w, x):
    """A convolution of spikes."""
    dims = ("NHWC", "HWIO", "NHWC")
    spikes = nadaptor.lsq(x, F32(0.5), 2)
    y = jax.lax.conv_general_dilated(spikes, w, (1, 1), "SAME", dimension_numbers=dims)
    return nadaptor.lsq(y, F32(0.5), 2).sum((1, 2))


def gradients(w, v):
    """Those of every quantizer, in v and in a scale for each channel."""
    key, scale = jax.random.key(0), jnp.full(4, F32(0.5))
    functions = [
        lambda v, s: nadaptor.lsq(v, s, 2),
        lambda v, s: nadaptor.noise_adaptor(key, v, s, 2),
        nadaptor.clipped_relu,
        lambda v, s: nadaptor.qcfs(v, s, 2),
        lambda v, s: nadaptor.slip_relu(v, s, 2),
    ]
    return [jax.grad(lambda v, s, f=f: f(v, s).sum(), (0, 1))(v, scale) for f in functions]


def quantized(w, x):
    """A network with ReLUs as a quantized one, its scales measured."""
    q = nadaptor.quantize(relus, levels=2)
    scales = q.init(w, x, rule="max")
    return scales, q(scales, w, x)


def calibrated(w, x):
    """Thresholds, and biases on them."""
    found = calibrate_thresholds(relus, w, x, rule=maximum())
    return found, calibrate_biases(relus, w, x, calibration=found, num_steps=2)


@functools.cache
def on_one_device(thing):
    """What a thing gives without a mesh."""
    f, w, x = THINGS[thing]
    return jax.jit(f)(w, x)


simulate = functools.partial(nadaptor.simulate, num_steps=3)
RHO = nadaptor.OffsetSpikes(2)
THINGS = {
    "gradients": (gradients, W, V),
    "simulation": (functools.partial(simulate, network), W, V),
    "chunks": (functools.partial(simulate, network, steps_per_chunk=2), W, V),
    "examples": (functools.partial(simulate, network, in_axes=(None, 0)), W, V),
    "sums": (functools.partial(simulate, network, coding="sum"), W, V),
    "offset spikes": (functools.partial(simulate, network, correction=RHO), W, V),
    "srp": (functools.partial(simulate, network, correction=nadaptor.Srp(2)), W, V),
    "pairs of columns": (
        functools.partial(simulate, convolution, in_axes=(None, 0)), KERNEL, IMAGES
    ),
    "quantize": (quantized, W, V),
    "calibration": (calibrated, W, V),
    "percentiles": (
        functools.partial(calibrate_thresholds, relus, rule=percentile(50), channel_axis=-1), W, V
    ),
    "early exit": (
        lambda w, x: simulate_with_early_exit(
            network, w, x, num_steps=3, confidence=0.5, in_axes=(None, 0)
        ),
        W, V,
    ),
    "recording": (functools.partial(nadaptor.record, network, num_steps=3), W, V),
}  # fmt: skip
# Convolutions of inputs whose channels are spread over devices are refused by jax itself.
CASES = [
    (thing, spec)
    for thing in THINGS
    for spec in (ROWS, COLUMNS)
    if (thing, spec) != ("pairs of columns", COLUMNS)
]


def placed(w, x, spec):
    """The weights on every device, and the data as `spec` says."""
    return (jax.device_put(a, NamedSharding(MESH, s)) for a, s in ((w, WHOLE), (x, spec)))


@pytest.mark.reuses_keys
@pytest.mark.parametrize(("thing", "spec"), CASES)
def test_on_an_explicit_mesh_everything_has_the_numbers_of_one_device(thing, spec):
    f, w, x = THINGS[thing]
    expected = on_one_device(thing)
    with jax.set_mesh(MESH):
        found = jax.jit(f)(*placed(w, x, spec))
    # The noise of the gradient is not dyadic, and its sum may be rounded in another order.
    rtol = 1e-6 if thing == "gradients" else 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), found, expected)


@pytest.mark.parametrize("option", [{"tile_size": 1}, {"devices": jax.devices()[:2]}], ids=str)
def test_what_would_share_the_examples_a_second_time_is_refused_with_the_remedy(option):
    with jax.set_mesh(MESH):
        w, x = placed(W, V, ROWS)
        name = next(iter(option))
        with pytest.raises(ValueError, match=rf"on an explicit mesh.*leave {name} out"):
            simulate(network, w, x, in_axes=(None, 0), **option)
