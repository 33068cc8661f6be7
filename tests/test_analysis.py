"""Firing rates and layer errors, against what a plain loop over examples gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor import analysis


def compiled(function):
    """The function of a network as one program: by itself each operation would be one more."""

    def call(f, *args, **options):
        return jax.jit(functools.partial(function, f, **options))(*args)

    return call


layer_errors, conversion_report, simulate, record = map(
    compiled,
    (analysis.layer_errors, analysis.conversion_report, nadaptor.simulate, nadaptor.record),
)
firing_rates = jax.jit(analysis.firing_rates, static_argnums=1)


@functools.cache
def deep():
    weights = jax.random.normal(jax.random.key(4), (4, 24, 24)) / 4
    x = jax.random.normal(jax.random.key(5), (16, 24))

    def f(weights, x):
        for w in weights:
            x = nadaptor.lsq(x @ w, 0.3, 2)
        return x

    return f, weights, x


def test_firing_rates_are_spikes_a_neuron_and_step():
    v = jnp.array([0.0, 1.0, 8.0])
    sim = simulate(lambda v: nadaptor.lsq(v, 1.0, 4), v, num_steps=8)
    (rate,) = firing_rates(sim, 8)
    assert float(rate) == pytest.approx((0 + 2 + 8) / 3 / 8)


def test_the_first_layer_has_no_error_at_T_equal_p_and_deeper_ones_have():
    f, weights, x = deep()
    errors = list(layer_errors(f, weights, x, num_steps=2).values())
    assert errors[0] == 0
    assert 0 < errors[2] < errors[3]


def test_layer_errors_fall_with_time_against_the_clipped_network():
    f, weights, x = deep()
    short, long = (
        sum(layer_errors(f, weights, x, num_steps=t, reference="clipped").values()) for t in (4, 64)
    )
    assert long < 0.3 * short


def test_a_correction_and_signed_spikes_lower_the_layer_errors():
    f, weights, x = deep()
    measure = functools.partial(layer_errors, f, weights, x, num_steps=2)
    plain = sum(measure().values())
    assert sum(measure(correction=nadaptor.OffsetSpikes(2)).values()) < 0.5 * plain
    assert sum(measure(neuron=nadaptor.SignedIntegrateAndFire()).values()) < plain


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match="'other'"):
        layer_errors(lambda v: nadaptor.lsq(v, 1.0, 1), jnp.ones(2), num_steps=2, reference="other")


def dyadic(seed, *shape):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype("f4") / 4


WEIGHTS, IMAGES = [dyadic(0, 6, 8), dyadic(1, 8, 8)], dyadic(2, 5, 6)
SCALE, LEVELS = 0.25, 4


def two_layers(x):
    for w in WEIGHTS:
        x = nadaptor.lsq(x @ w, SCALE, LEVELS)
    return x


def errors_by_hand(num_steps, rounding):
    """Steps of integrate-and-fire neurons in NumPy, and the activations that they stand for."""
    threshold = SCALE * LEVELS
    potentials = [np.full((5, 8), threshold / 2, "f4") for _ in WEIGHTS]
    sent = [np.zeros((5, 8), "f4") for _ in WEIGHTS]
    for _ in range(num_steps):
        x = IMAGES
        for i, w in enumerate(WEIGHTS):
            potentials[i] += x @ w
            x = np.where(potentials[i] >= threshold, np.float32(threshold), 0)
            potentials[i] -= x
            sent[i] += x
    x, found = IMAGES, []
    for w, total in zip(WEIGHTS, sent, strict=True):
        x = SCALE * rounding(np.clip(x @ w / SCALE, 0, LEVELS))
        found.append(np.abs(total / num_steps - x).mean() / threshold)
    return found


@pytest.mark.parametrize(
    ("reference", "rounding"), [("rounded", lambda x: np.floor(x + 0.5)), ("clipped", np.array)]
)
@pytest.mark.parametrize("num_steps", [1, 8])
def test_layer_errors_are_those_of_a_loop_over_the_steps(num_steps, reference, rounding):
    errors = layer_errors(two_layers, IMAGES, num_steps=num_steps, reference=reference)
    assert list(errors) == ["layer0", "layer1"]
    wanted = errors_by_hand(num_steps, rounding)
    assert wanted[1] > 0
    np.testing.assert_allclose(list(errors.values()), wanted, rtol=1e-6)


def test_with_sum_coding_no_layer_has_an_error_once_the_network_has_settled():
    def measure(num_steps):
        errors = layer_errors(two_layers, IMAGES, num_steps=num_steps, coding="sum")
        return [float(error) for error in errors.values()]

    early, late = measure(1), measure(32)
    assert min(early) > 0
    assert late == [0, 0]


def test_a_negative_spike_counts_as_a_spike():
    options = {"num_steps": 8, "neuron": nadaptor.SignedIntegrateAndFire()}
    trains = record(two_layers, IMAGES, **options, quantities=["spikes"])
    rates = firing_rates(simulate(two_layers, IMAGES, **options), 8)
    assert (trains["layer1"].spikes < 0).any()
    for rate, layer in zip(rates, trains.values(), strict=True):
        assert float(rate) == pytest.approx(np.abs(layer.spikes).mean())


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True])
def test_a_number_of_steps_that_is_none_is_refused(num_steps):
    sim = simulate(lambda v: nadaptor.lsq(v, 1.0, 4), jnp.ones(2), num_steps=2)
    with pytest.raises(ValueError, match="num_steps must be a positive int"):
        firing_rates(sim, num_steps)
    with pytest.raises(ValueError, match="num_steps must be a positive int"):
        layer_errors(lambda v: nadaptor.lsq(v, 1.0, 4), jnp.ones(2), num_steps=num_steps)


REPORTS = {
    "rate": dict(),
    "sum": dict(coding="sum"),
    "corrected": dict(correction=nadaptor.OffsetSpikes(4)),
}


def small_network(x):
    w = jnp.array([[0.5, -0.25, 1.0], [0.25, 0.5, -0.5]])
    return nadaptor.lsq(nadaptor.lsq(x, 0.5, levels=2) @ w, 0.25, levels=4) @ w.T


@pytest.mark.parametrize("options", REPORTS.values(), ids=REPORTS)
def test_report_agrees_with_the_recording_and_the_layer_errors(options):
    x, steps = jnp.array([[0.25, 1.0], [0.5, 0.0], [0.75, 0.5], [-1.0, 0.25]]), 6
    found = conversion_report(small_network, x, num_steps=steps, **options)
    recorded = record(small_network, x, num_steps=steps, **options)
    errors = layer_errors(small_network, x, num_steps=steps, **options)
    for name, layer in found.items():
        z = np.asarray(recorded[name].spikes)
        np.testing.assert_allclose(layer.silent, (np.abs(z).sum(0) == 0).mean(), rtol=1e-6)
        np.testing.assert_allclose(layer.rate, np.abs(z).mean(), rtol=1e-6)
        most = steps if options.get("coding") != "sum" else {"layer0": 2, "layer1": 4}[name]
        np.testing.assert_allclose(layer.saturated, (z.sum(0) == most).mean(), rtol=1e-6)
        np.testing.assert_allclose(layer.error[-1], errors[name], rtol=1e-6)
        assert int(layer.noise.sum()) == z[0].size


def test_noise_is_zero_where_the_current_is_constant_and_after_sums_have_settled():
    x = jnp.linspace(-1, 2, 40)[:, None] * jnp.ones(2)
    for steps in (1, 5, 8):
        first = conversion_report(small_network, x, num_steps=steps)["layer0"]
        assert first.noise[analysis.MOST_NOISE] == x.size
    for layer in conversion_report(small_network, x, num_steps=32, coding="sum").values():
        assert layer.noise[analysis.MOST_NOISE] == layer.noise.sum()


def test_noise_counts_spikes_that_uneven_currents_cause():
    def f(x):
        a, b = nadaptor.lsq(x[:, 0], 1.0, levels=1), nadaptor.lsq(x[:, 1], 1.0, levels=1)
        return nadaptor.lsq(a - 2 * b, 1.0, levels=1) * 1.0

    # a fires at every step and b at the third only: 1, 1 and -1 arrive, and two spikes are sent,
    # where 1/3 at each of three steps would give one.
    noise = conversion_report(f, jnp.array([[1.0, 0.1875]]), num_steps=3)["layer2"].noise
    assert np.flatnonzero(noise).tolist() == [analysis.MOST_NOISE + 1]
