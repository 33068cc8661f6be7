"""Corrections: their rules on single neurons, and the inequalities of one layer on many neurons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor

STEPS = 4
NEURONS = 50_000
INPUTS = 32


@functools.cache
def one_layer():
    """Counts of 50,000 neurons of threshold 1, each with 32 inputs that fire at random steps.

    The generator: input i of each neuron has a rate of k/4 spikes in 4 steps, k uniform in 0..4,
    at random steps; weights are normal with mean -0.02 and deviation 0.25, so that most neurons
    should be silent, as in a trained network.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    rates = jax.random.randint(keys[0], (INPUTS, NEURONS), 0, STEPS + 1)
    order = jnp.argsort(jax.random.uniform(keys[1], (STEPS, INPUTS, NEURONS)), axis=0)
    weights = -0.02 + 0.25 * jax.random.normal(keys[2], (INPUTS, NEURONS))
    return ((order < rates) * weights).sum(1)  # currents [T, N]


def counts(currents, neuron, correction=None):
    """Net spikes of each neuron in T steps on the given trains of currents, threshold 1."""
    levels = STEPS
    start = (
        correction.start(GivenCurrents(currents, neuron), ())[0]
        if correction
        else neuron.init(currents.shape[1:], levels, levels / 2)
    )
    _, out = jax.lax.scan(lambda s, x: neuron.step(s, x * levels, levels), start, currents)
    return np.asarray(jnp.round(out.sum(0) / levels), int)


class GivenCurrents:
    """Stands in for a network of one layer; corrections ask for no more than this."""

    def __init__(self, currents, neuron):
        self.currents, self.neuron = currents, neuron
        shape = currents.shape[1:]
        self.layers = (nadaptor.transformation.Layer("l", shape, STEPS, STEPS / 2, ""),)

    def propagate(self, prepared, fire, steps):
        kept, out = fire(0, self.currents[:steps] * STEPS)
        return (kept,), out


def expected(currents):
    return np.clip(np.floor(np.asarray(currents.sum(0)) + 0.5), 0, STEPS)


PLAIN = nadaptor.IntegrateAndFire()
SIGNED = nadaptor.SignedIntegrateAndFire()


def errors(neuron, correction=None):
    currents = one_layer()
    return counts(currents, neuron, correction) - expected(currents)


def test_plain_neurons_err_mostly_by_one_spike_too_many():
    error = errors(PLAIN)
    assert 0.6 < (error == 0).mean() < 0.95
    assert (error == 1).mean() > 2 * (error < 0).mean()


def test_offset_spikes_leave_99_percent_exact():
    assert (errors(PLAIN, nadaptor.OffsetSpikes(STEPS)) == 0).mean() > 0.99


def test_signed_spikes_leave_no_surplus():
    assert (errors(SIGNED) > 0).mean() < 0.002
    assert (errors(SIGNED) == 0).mean() > (errors(PLAIN) == 0).mean()


def test_srp_silences_the_neurons_that_end_empty_and_leaves_the_others_as_they_were():
    """The inputs end at their start, and so all fire again; every sum here is exact."""
    rng = np.random.default_rng(0)
    rates = rng.integers(0, STEPS + 1, (8, 32))
    weights = (rng.integers(-9, 9, (32, 500)) / 16).astype(np.float32)

    def f(weights, v):
        return nadaptor.lsq(nadaptor.lsq(v, 1 / STEPS, STEPS) @ weights, 1 / STEPS, STEPS)

    plain, corrected = (
        nadaptor.simulate(
            f, weights, (rates / STEPS).astype("f4"), num_steps=STEPS, correction=correction
        ).spike_counts
        for correction in (None, nadaptor.Srp(STEPS))
    )
    np.testing.assert_array_equal(plain[0], rates)
    np.testing.assert_array_equal(corrected[0], rates)
    left = 0.5 + rates @ weights - plain[1]  # of the potential, in thresholds
    np.testing.assert_array_equal(corrected[1], np.where(left > 0, plain[1], 0))
    assert (corrected[1] < plain[1]).any() and (corrected[1] > 0).any()


def test_the_order_of_the_corrections():
    exact = [
        (errors(neuron, correction) == 0).mean()
        for neuron, correction in (
            (PLAIN, nadaptor.OffsetSpikes(STEPS)),
            (SIGNED, None),
            (PLAIN, None),
        )
    ]
    assert exact == sorted(exact, reverse=True)


@functools.cache
def deep():
    key = jax.random.key(4)
    weights = jax.random.normal(key, (3, 24, 24)) / 4
    x = jax.random.normal(jax.random.fold_in(key, 1), (16, 24))

    def f(weights, x):
        for w in weights:
            x = nadaptor.lsq(x @ w, 0.3, 2)
        return x @ weights[0]

    return f, weights, x


def run(num_steps, **options):
    f, weights, x = deep()
    sim = functools.partial(nadaptor.simulate, f, num_steps=num_steps, **options)
    return jax.jit(sim)(weights, x)


def test_signed_spikes_equal_plain_ones_at_the_first_step():
    np.testing.assert_array_equal(run(1, neuron=SIGNED).outputs, run(1).outputs)


def test_signed_spikes_come_nearer_to_the_quantized_network():
    f, weights, x = deep()
    ann = f(weights, x)
    error = {n: float(jnp.abs(run(8, neuron=n).outputs[-1] - ann).mean()) for n in (SIGNED, PLAIN)}
    assert error[SIGNED] < error[PLAIN]


@pytest.mark.parametrize("correction", [nadaptor.OffsetSpikes(3), nadaptor.Srp(3)])
def test_total_steps_count_what_the_correction_spends(correction):
    sim = run(5, correction=correction)
    assert sim.total_steps == 8
    assert sim.outputs.shape[0] == 5


def test_srp_silences_neurons_for_good():
    f, weights, x = deep()
    net = nadaptor.spiking(f, weights, x)
    state = nadaptor.Srp(4).start(net, net.prepare(weights, x))
    sim = run(16, correction=nadaptor.Srp(4))
    for start, count in zip(state, sim.spike_counts, strict=True):
        assert set(np.unique(start)) == {-np.finfo(np.float32).max, 1.0}
        assert int(count[start < 0].sum()) == 0


def test_offset_spikes_come_nearer_to_the_quantized_network_at_T_equal_rho():
    f, weights, x = deep()
    ann = f(weights, x)
    plain, corrected = run(2), run(2, correction=nadaptor.OffsetSpikes(2))
    error = [float(jnp.abs(s.outputs[-1] - ann).mean()) for s in (corrected, plain)]
    assert error[0] < 0.5 * error[1]


def neuron_start(x, **options):
    """Start of one neuron of threshold 1 on given currents, in units of the threshold."""
    currents = jnp.asarray(x)[:, None]
    state = nadaptor.OffsetSpikes(len(x), **options).start(GivenCurrents(currents, PLAIN), ())
    return float(state[0][0]) / STEPS


def test_offset_rule_for_a_spike_too_many():
    """Fires at 1.1 in the first step, ends at -0.4: its start falls by max(1, 1.1 - 0.999)."""
    assert neuron_start([0.6, -0.5]) == pytest.approx(0.5 - 1.0)
    assert neuron_start([1.9, -1.6]) == pytest.approx(0.5 - (2.4 - 0.999))


def test_offset_rule_for_a_spike_too_few():
    """Silent at -1.5, then fires and ends at 1: its start rises by 1.001 + 1.5."""
    assert neuron_start([-2.0, 3.5]) == pytest.approx(0.5 + 2.501)


def test_offset_rule_for_a_neuron_that_was_never_silent():
    assert neuron_start([2.0, 2.0]) == pytest.approx(1.5)
    assert neuron_start([2.0, 2.0], saturated="published") == pytest.approx(1001.501)


def test_published_saturation_biases_long_runs_and_the_capped_one_does_not():
    """A neuron driven at 1.2 until, from step 5 on, a slow input inhibits it: its mean is 0.6."""

    def f(v):
        fast, slow = nadaptor.lsq(v, 0.5, 2)
        return nadaptor.lsq(1.2 * fast - 6.0 * slow, 0.5, 2)

    def output(correction):
        sim = nadaptor.simulate(f, jnp.array([1.0, 0.1]), num_steps=250, correction=correction)
        return float(sim.outputs[-1])

    assert output(None) == pytest.approx(0.6, abs=0.02)
    assert output(nadaptor.OffsetSpikes(4)) == pytest.approx(0.6, abs=0.02)
    assert output(nadaptor.OffsetSpikes(4, saturated="published")) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nadaptor.OffsetSpikes(0), "positive int"),
        (lambda: nadaptor.OffsetSpikes(4, saturated="none"), "'none'"),
        (lambda: nadaptor.Srp(-1), "positive int"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
