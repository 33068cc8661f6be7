"""Each equation in float32 against numpy in float64: scales from 1e-30 to 1e30, p to 2^15.

docs/numerics.md has the bounds; `EPS` there is half a unit in the last place, 2^-24 for float32.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor._noise import uniform_noise

SCALES = [1e-30, 1e-4, 0.3, 7.0, 1e30]
LEVELS = [1, 3, 255, 2**15]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# One key draws for the quantizer and for its equation.
pytestmark = pytest.mark.reuses_keys
PAGE = (Path(__file__).parents[1] / "docs/numerics.md").read_text()
KEY = jax.random.key(3)


@pytest.fixture(scope="module", params=LEVELS)
def x(request):
    """Values in units of the scale: all over the range, beyond both ends, and next to ties."""
    p, random = request.param, np.random.default_rng(request.param)
    ties = random.integers(0, p + 1, 300) - 0.5 + random.uniform(-1, 1, 300) * 1e-6 * p
    return p, np.concatenate([random.uniform(-1, p + 1, 600), ties, [-9 * p, 0, p, 9 * p]])


def levels_of(x, p):
    """Eq. 3 in float64."""
    return np.floor(np.clip(x, 0, p) + 0.5)


def sure(x, p):
    """Where no rounding of x can change its level: x is rounded twice, and is at most about p."""
    return np.abs(x - np.floor(x) - 0.5) > 4 * EPS["float32"] * max(p, 1)


@functools.cache
def jitted(name, p):
    f = {
        "lsq": lambda v, s: nadaptor.lsq(v, s, p),
        "qcfs": lambda v, s: nadaptor.qcfs(v, s * p, p),
        "noise": lambda v, s: nadaptor.noise_adaptor(KEY, v, s, p),
        "clip": lambda v, s: nadaptor.clipped_relu(v, s * p),
    }[name]
    scales = lambda v, s: jnp.full(v.shape, s)  # noqa: E731
    return jax.jit(lambda v, s: jax.vjp(f, v, scales(v, s))), jax.jit(
        lambda v, s: jax.vjp(f, v, scales(v, s))[1](jnp.ones_like(v))
    )


def rounded(x, scale, dtype=np.float32):
    """v in a dtype, and v / scale in float64 as it then is."""
    v = jnp.asarray(x * scale, dtype)
    scale = np.float32(scale)
    return v, scale, np.asarray(v, np.float64) / np.float64(scale)


@pytest.mark.parametrize("scale", SCALES)
def test_eq_3_to_5_hold_in_float32(x, scale):
    p, x = x
    v, s, x = rounded(x, scale)
    y = np.asarray(jitted("lsq", p)[0](v, s)[0], np.float64)
    away = sure(x, p)
    np.testing.assert_array_equal(
        y[away], np.float32(np.float64(s) * levels_of(x, p))[away].astype(np.float64)
    )
    assert (np.abs(y / s - levels_of(x, p)) <= 1 + p * 2**-22).all()
    dv, ds = jitted("lsq", p)[1](v, s)
    inside, edge = (x > 0) & (x < p), np.minimum(np.abs(x), np.abs(x - p)) > 4 * 2**-24 * p
    np.testing.assert_array_equal(dv[edge], inside[edge])
    expected = np.where(inside, levels_of(x, p) - x, np.where(x >= p, p, 0))
    both = away & edge
    np.testing.assert_allclose(ds[both], expected[both], atol=4 * 2**-24 * p)


@pytest.mark.parametrize("scale", SCALES)
def test_eq_7_and_10_hold_in_float32_for_the_same_draw(x, scale):
    p, x = x
    v, s, x = rounded(x, scale)
    noisy = x + np.asarray(uniform_noise(KEY, x.shape, 0.5), np.float64)
    y = np.asarray(jitted("noise", p)[0](v, s)[0], np.float64)
    away = sure(noisy, p)
    np.testing.assert_allclose(y[away], (s * levels_of(noisy, p))[away], rtol=2**-23)
    edge = np.minimum(np.abs(noisy), np.abs(noisy - p)) > 4 * 2**-24 * max(p, 1)
    inside, both = (noisy > 0) & (noisy < p), away & edge
    dv, ds = jitted("noise", p)[1](v, s)
    np.testing.assert_array_equal(dv[edge], inside[edge])
    expected = np.where(inside, levels_of(noisy, p) - noisy, np.where(noisy >= p, p, 0))
    np.testing.assert_allclose(ds[both], expected[both], atol=6 * 2**-24 * max(p, 1))


@pytest.mark.parametrize("scale", SCALES)
def test_the_other_activations_hold_in_float32(x, scale):
    p, x = x
    v, s, x = rounded(x, scale)
    away = sure(x, p)
    y = np.asarray(jitted("qcfs", p)[0](v, s)[0], np.float64)
    np.testing.assert_allclose(y[away], (np.float64(s) * levels_of(x, p))[away], rtol=2**-22)
    y = np.asarray(jitted("clip", p)[0](v, s)[0], np.float64)
    expected = np.float64(s) * np.clip(x, 0, p)
    np.testing.assert_allclose(y, expected, rtol=2**-21, atol=2**-22 * float(s) * p)


@pytest.mark.parametrize("dtype", EPS)
def test_in_each_dtype_the_level_is_right_and_the_output_rounded_once(x, dtype):
    """The bounds of the table in docs/numerics.md."""
    p, x = x
    if dtype == "float16":
        x = x[np.abs(x) * 0.3 < 6e4]
    v, s, x = rounded(x, 0.3, dtype)
    y = np.asarray(nadaptor.lsq(v, s, p), np.float64)
    away = sure(x, p)
    exact = np.float64(s) * levels_of(x, p)
    np.testing.assert_allclose(y[away], exact[away], rtol=EPS[dtype] * (1 + 1e-6))
    bits = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    assert re.search(rf"\| {dtype} \| .*2\^-{bits} ", PAGE)


@pytest.mark.parametrize("levels", LEVELS)
def test_eq_1_2_and_6_hold_over_256_steps(levels):
    """A count may differ where the potential in float64 comes within its error of the threshold."""
    random, steps = np.random.default_rng(levels), 256
    currents = np.float32(random.uniform(-0.5, 1.2, 400) * levels)
    f = lambda v: nadaptor.lsq(v, np.float32(1.0), levels)  # noqa: E731
    sim = jax.jit(lambda v: nadaptor.simulate(f, v, num_steps=steps))(currents)
    u, counts, nearest = np.full(400, levels / 2), np.zeros(400, int), np.full(400, np.inf)
    for _ in range(steps):
        u += np.float64(currents)
        nearest = np.minimum(nearest, np.abs(u - levels))
        counts += u >= levels
        u -= levels * (u >= levels)
    away = nearest > steps * 2**-22 * levels
    assert away.mean() > 0.9
    np.testing.assert_array_equal(sim.spike_counts[0][away], counts[away])
    assert np.abs(np.asarray(sim.spike_counts[0]) - counts).max() <= 1
    np.testing.assert_allclose(sim.outputs[-1][away], (levels * counts / steps)[away], rtol=2**-22)


@pytest.mark.parametrize("scale", [2.0**-127, 1e-40, 1e-45, 2.0**127])
def test_a_scale_whose_reciprocal_is_no_normal_number_is_refused(scale):
    """Under jit it is not seen: a denormal is 0 to XLA, and so is what it multiplies."""
    v = jnp.ones(3)
    with pytest.raises(ValueError, match=r"scale must be from 1.2e-38 to 8.5e\+37, not"):
        nadaptor.lsq(v, np.float32(scale), 2)
    y = jax.jit(lambda s: nadaptor.lsq(v, s, 2))(np.float32(scale))
    assert (jnp.isnan(y) | (y == 0)).all()
