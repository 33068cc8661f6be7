"""JAX's own switches: what they check passes, and what they change leaves the numbers alone."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.calibration import calibrate_biases, calibrate_thresholds, percentile
from nadaptor.corrections import OffsetSpikes, Srp
from nadaptor.early_exit import simulate_with_early_exit

SWITCHES = {
    "jax_disable_jit": True,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_enable_x64": True,
    "jax_enable_checks": True,
}
WIDE = ("jax_enable_x64", "jax_enable_checks")
F32 = np.float32
# Dyadic numbers: no order of summation rounds.
V = np.linspace(-2, 4, 48, dtype=F32).reshape(6, 8).round(2)
X = (np.arange(32) % 9 - 3).reshape(4, 8).astype(F32) / 4
W = (np.arange(24) % 5 - 1).reshape(8, 3).astype(F32) / 4


@contextlib.contextmanager
def switched(name, value):
    """Sets one switch of `jax.config` for a while."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def network(w, x):
    """Two layers of neurons, of 8 and of 3."""
    hidden = nadaptor.lsq(jnp.asarray(x), F32(0.5), levels=2) @ jnp.asarray(w)
    return nadaptor.lsq(hidden, F32(0.25), levels=4)


def relu_network(w, x):
    """The same with clipped ReLUs."""
    hidden = nadaptor.clipped_relu(jnp.asarray(x), F32(1.0)) @ jnp.asarray(w)
    return nadaptor.clipped_relu(hidden, F32(1.0))


def gradients(v):
    """The gradients of each in v and in the scale."""
    key = jax.random.key(0)
    functions = [
        lambda v, s: nadaptor.lsq(v, s, 2),
        lambda v, s: nadaptor.noise_adaptor(key, v, s, 2),
        nadaptor.clipped_relu,
        lambda v, s: nadaptor.qcfs(v, s, 2),
        lambda v, s: nadaptor.slip_relu(v, s, 2),
    ]
    return [
        jax.grad(lambda v, s, f=f: f(v, s).sum(), (0, 1))(v, jnp.asarray(F32(0.5)))
        for f in functions
    ]


def calibrated():
    """Thresholds and biases."""
    found = calibrate_thresholds(relu_network, W, X, rule=percentile(50), channel_axis=-1)
    return found, calibrate_biases(relu_network, W, X, calibration=found, num_steps=2)


THINGS = {
    "gradients": lambda: gradients(jnp.asarray(V)),
    "simulation": lambda: nadaptor.simulate(network, W, X, num_steps=2),
    "sums": lambda: nadaptor.simulate(network, W, X, num_steps=2, coding="sum"),
    "offset_spikes": lambda: nadaptor.simulate(
        network, W, X, num_steps=2, correction=OffsetSpikes(2)
    ),
    "srp": lambda: nadaptor.simulate(network, W, X, num_steps=2, correction=Srp(2)),
    "calibration": calibrated,
    "early_exit": lambda: simulate_with_early_exit(
        network, W, X, num_steps=2, confidence=0.5, in_axes=(None, 0)
    ),
}


@pytest.fixture(scope="module")
def plain():
    """What each gives with no switch set."""
    return functools.cache(lambda name: jax.tree.map(np.asarray, THINGS[name]()))


CASES = [
    (switch, thing)
    for switch in SWITCHES
    for thing in THINGS
    if switch not in WIDE or thing in ("simulation", "sums", "early_exit")
    if thing != "calibration" or switch in ("jax_debug_nans", "jax_numpy_dtype_promotion")
]


@pytest.mark.parametrize(("switch", "thing"), CASES)
def test_a_switch_of_jax_changes_no_number(switch, thing, plain):
    expected = plain(thing)
    with switched(switch, SWITCHES[switch]):
        found = jax.tree.map(np.asarray, THINGS[thing]())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_keeps_no_quantizer_is_told_so():
    with pytest.raises(ValueError, match=r"no quantizer is left.*a derivative"):
        nadaptor.spiking(lambda x: jax.vjp(lambda x: nadaptor.lsq(x, 0.5, 2), x)[0], jnp.ones(3))


@pytest.mark.parametrize("percent", [1, 37.5, 50, 99.9, 100])
def test_the_percentile_is_numpys_of_what_is_not_zero(percent):
    a = np.maximum(np.random.default_rng(0).normal(size=(7, 3, 5)), 0).astype(F32)
    expected = np.nanpercentile(np.where(a > 0, a, np.nan), percent, (0, 2), keepdims=True)
    found = percentile(percent)(jnp.asarray(a), (0, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_replaces_jit_to_debug_changes_no_number(plain):
    with chex.fake_jit():
        found = jax.tree.map(np.asarray, THINGS["simulation"]())
    jax.tree.map(np.testing.assert_array_equal, found, plain("simulation"))
