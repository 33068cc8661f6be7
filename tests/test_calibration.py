"""Calibration: thresholds in closed form, and networks that come nearer to the ReLU network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor import calibration
from nadaptor.calibration import maximum, mmse, percentile, shift_biases
from nadaptor.simulation import run_network


def compiled(function):
    """The function of a network as one program: by itself each operation would be one more."""

    def call(f, *args, **options):
        return jax.jit(functools.partial(function, f, **options))(*args)

    return call


calibrate_thresholds, calibrate_biases, calibrate_potentials = map(
    compiled,
    (
        calibration.calibrate_thresholds,
        calibration.calibrate_biases,
        calibration.calibrate_potentials,
    ),
)

WEIGHTS = jax.random.normal(jax.random.key(0), (3, 20, 20)) * 0.4
IMAGES = jax.random.normal(jax.random.key(1), (64, 20))
OTHERS = jax.random.normal(jax.random.key(2), (48, 20))


def network(activation, weights, x):
    for w in weights:
        x = activation(x @ w)
    return x @ weights[0]


def clipped(weights, x, threshold=1.0):
    return network(lambda v: nadaptor.clipped_relu(v, threshold), weights, x)


@jax.jit
def relu(weights, x):
    return network(jax.nn.relu, weights, x)


@jax.jit
def hidden(weights, x):
    """The input of each ReLU."""
    seen = []
    for w in weights:
        seen.append(x @ w)
        x = jax.nn.relu(seen[-1])
    return seen


@functools.cache
def thresholds(rule=None):
    return calibrate_thresholds(clipped, WEIGHTS, IMAGES, rule=rule or maximum())


def error(calibrated, num_steps, x=OTHERS, **options):
    @jax.jit
    def outputs(weights, x):
        net = nadaptor.spiking(clipped, weights, x, **options)
        if calibrated is not None:
            net = calibrated.apply(net)
        return run_network(net, net.prepare(weights, x), num_steps).outputs[-1]

    return np.abs(np.asarray(outputs(WEIGHTS, x)) - relu(WEIGHTS, x)).mean()


def test_the_maximum_is_that_of_the_network_with_plain_relus():
    for found, v in zip(thresholds().thresholds, hidden(WEIGHTS, IMAGES), strict=True):
        np.testing.assert_allclose(found.item(), v.max(), rtol=1e-6)


def test_the_percentile_is_that_of_the_nonzero_activations():
    found = thresholds(percentile(90)).thresholds
    for th, v in zip(found, hidden(WEIGHTS, IMAGES), strict=True):
        positive = np.asarray(v)[np.asarray(v) > 0]
        np.testing.assert_allclose(th.item(), np.percentile(positive, 90), rtol=1e-5)


def test_a_threshold_per_channel_is_that_of_the_channel_alone():
    rule = percentile(90)
    found = calibrate_thresholds(clipped, WEIGHTS, IMAGES, rule=rule, channel_axis=-1)
    first = np.asarray(hidden(WEIGHTS, IMAGES)[0])
    assert found.thresholds[0].shape == (1, 20)
    expected = [np.percentile(c[c > 0], 90) for c in first.T]
    np.testing.assert_allclose(found.thresholds[0][0], expected, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_mmse_is_the_best_of_the_95_candidates(steps):
    a = np.abs(np.asarray(IMAGES[:8]))
    found = mmse(steps)(jnp.asarray(a), (0, 1)).item()
    candidates = a.max() * (1 - 0.01 * np.arange(95))

    def squared(th):
        return ((a - th * np.clip(np.floor(steps * a / th + 0.5) / steps, 0, 1)) ** 2).mean()

    best = min(map(squared, candidates))
    assert squared(found) == pytest.approx(best, rel=1e-4)
    assert np.abs(candidates - found).min() < 1e-5


def test_fewer_steps_want_a_lower_threshold():
    a = jnp.abs(IMAGES)
    assert mmse(2)(a, (0, 1)) < mmse(32)(a, (0, 1))


def test_the_thresholds_do_not_depend_on_those_in_the_function():
    raised = functools.partial(clipped, threshold=4.0)
    found = calibrate_thresholds(raised, WEIGHTS, IMAGES, rule=maximum()).thresholds
    for ours, others in zip(thresholds().thresholds, found, strict=True):
        np.testing.assert_allclose(ours, 4.0 * others, rtol=1e-6)


def test_a_calibrated_network_tends_to_the_relu_network_and_an_uncalibrated_one_does_not():
    assert error(thresholds(), 512, IMAGES) < 0.1 * error(thresholds(), 8, IMAGES)
    assert error(None, 512, IMAGES) > 10 * error(thresholds(), 512, IMAGES)


def test_calibrated_is_the_same_as_written_with_these_thresholds():
    found = thresholds()

    def written(weights, x):
        for w, th in zip(weights, found.thresholds, strict=True):
            x = nadaptor.clipped_relu(x @ w, th.item())
        return x @ weights[0]

    net = found.apply(nadaptor.spiking(clipped, WEIGHTS, OTHERS))
    ours = run_network(net, net.prepare(WEIGHTS, OTHERS), 16)
    sim = nadaptor.simulate(written, WEIGHTS, OTHERS, num_steps=16)
    same = [a == b for a, b in zip(ours.spike_counts, sim.spike_counts, strict=True)]
    assert np.mean([s.mean() for s in same]) > 0.99
    np.testing.assert_allclose(ours.outputs[-1].mean(), sim.outputs[-1].mean(), atol=0.05)


def test_calibrated_biases_and_potentials_lower_the_error_on_other_images():
    plain = error(thresholds(), 8)
    for calibrate in (calibrate_biases, calibrate_potentials):
        found = calibrate(clipped, WEIGHTS, IMAGES, calibration=thresholds(), num_steps=8)
        assert error(found, 8) < 0.95 * plain


def test_calibrated_biases_bring_the_means_of_channels_nearer_to_the_relu_network():
    low = thresholds(percentile(80))
    found = calibrate_biases(clipped, WEIGHTS[:1], IMAGES, calibration=first(low), num_steps=16)

    def gap(calibration):
        @jax.jit
        def run(weights, x):
            net = calibration.apply(nadaptor.spiking(clipped, weights, x))
            sim = run_network(net, net.prepare(weights, x), 16)
            rates = sim.spike_counts[0] / 16 * calibration.thresholds[0]
            return jnp.abs(rates.mean(0) - jax.nn.relu(x @ weights[0]).mean(0)).mean()

        return float(run(WEIGHTS[:1], IMAGES))

    assert gap(found) < 0.75 * gap(first(low))


def first(calibration):
    return type(calibration)(*(values[:1] for values in calibration))


def test_a_bias_shift_has_the_spikes_of_the_pre_charge_after_T_steps_of_a_constant_current():
    v = jnp.linspace(-0.5, 1.5, 257)[:, None]
    f = functools.partial(nadaptor.clipped_relu, threshold=1.0)
    start = calibrate_thresholds(f, v, rule=lambda a, axes: jnp.ones((1, 1)))
    counts = []
    for found in (start, shift_biases(start, 8)):
        net = found.apply(nadaptor.spiking(f, v))
        counts.append(run_network(net, net.prepare(v), 8).spike_counts[0])
    np.testing.assert_array_equal(*counts)


def test_corrections_and_signed_neurons_work_on_a_calibrated_network():
    net = thresholds().apply(nadaptor.spiking(clipped, WEIGHTS, OTHERS))

    def gap(net, **options):
        @jax.jit
        def run(weights, x):
            out = run_network(net, net.prepare(weights, x), 8, **options).outputs[-1]
            return jnp.abs(out - relu(weights, x)).mean()

        return float(run(WEIGHTS, OTHERS))

    signed = dataclasses.replace(net, neuron=nadaptor.SignedIntegrateAndFire())
    assert gap(net, correction=nadaptor.OffsetSpikes(8)) < gap(net)
    assert gap(signed) < gap(net)


def test_a_silent_layer_keeps_its_threshold():
    found = calibrate_thresholds(lambda v: nadaptor.clipped_relu(v, 2.0), jnp.full((4,), -1.0))
    assert found.thresholds[0].item() == 1.0


def test_everything_can_be_jitted():
    def run(weights, x):
        found = calibration.calibrate_thresholds(clipped, weights, x, rule=mmse(8))
        return calibration.calibrate_biases(clipped, weights, x, calibration=found, num_steps=8)

    eager, jitted = (jax.tree.leaves(g(WEIGHTS, IMAGES)) for g in (run, jax.jit(run)))
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_allclose(a, b, atol=0.02)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="of 3 layers and the network has 2"):
        thresholds().apply(nadaptor.spiking(clipped, WEIGHTS[:2], OTHERS))
    with pytest.raises(ValueError, match="at most 100"):
        percentile(101)
    with pytest.raises(ValueError, match="num_steps"):
        mmse(0)
    with pytest.raises(ValueError, match="num_steps"):
        shift_biases(thresholds(), 0)


def test_a_function_with_relus_is_calibrated_as_its_twin_with_clipped_relus():
    w = jax.random.normal(jax.random.key(0), (8, 6)), jax.random.normal(jax.random.key(1), (6, 4))
    x = jax.random.normal(jax.random.key(2), (16, 8))

    def net(activate, w, x):
        return activate(activate(x @ w[0]) @ w[1])

    found = []
    for activate in (jax.nn.relu, lambda v: nadaptor.clipped_relu(v, 1.0)):
        f = functools.partial(net, activate)
        thresholds = calibrate_thresholds(f, w, x, rule=maximum())
        biased = calibrate_biases(f, w, x, calibration=thresholds, num_steps=4)
        found.append(calibrate_potentials(f, w, x, calibration=biased, num_steps=4))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert any((bias != 0).any() for bias in found[0].biases)


def test_a_kept_max_pool_is_calibrated_on_running_means_with_every_calibration():
    def f(weights, x):
        a = jax.nn.relu(x @ weights[0])
        return jax.nn.relu(a.reshape(-1, 10, 2).max(-1) @ weights[1][:10]) @ weights[2]

    measure = dict(nonaffine="running_mean")
    start = calibrate_thresholds(f, WEIGHTS, IMAGES, rule=maximum(), **measure)
    first = jax.nn.relu(IMAGES @ WEIGHTS[0])
    second = jax.nn.relu(first.reshape(-1, 10, 2).max(-1) @ WEIGHTS[1][:10])
    found = [threshold.item() for threshold in start.thresholds]
    np.testing.assert_allclose(found, [first.max(), second.max()], rtol=1e-6)
    unit = functools.partial(nadaptor.quantize(f, activation="clipped_relu", pools=False), 1.0)
    net = nadaptor.spiking(unit, WEIGHTS, IMAGES, **measure)

    def error(calibration):
        @jax.jit
        def run(weights, x):
            sim = run_network(calibration.apply(net), net.prepare(weights, x), 4)
            return jnp.abs(sim.outputs[-1] - f(weights, x)).mean()

        return float(run(WEIGHTS, IMAGES))

    for calibrate in (calibrate_biases, calibrate_potentials):
        found = calibrate(f, WEIGHTS, IMAGES, calibration=start, num_steps=4, **measure)
        assert error(found) < error(start)
    with pytest.raises(ValueError, match="running_mean"):
        calibrate_thresholds(f, WEIGHTS, IMAGES)
