"""Recordings against simulations and against the equations of the neuron."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor import recording
from nadaptor._jaxpr.trace import sub_jaxprs

W = jnp.array([[0.5, -0.25, 1.0], [0.25, 0.5, -0.5]])
X = jnp.array([[0.25, 1.0], [0.5, 0.0], [0.75, 0.5], [-1.0, 0.25]])
T = 8
NEURONS = {
    "rate": dict(),
    "signed": dict(neuron=nadaptor.SignedIntegrateAndFire()),
    "corrected": dict(correction=nadaptor.OffsetSpikes(4)),
    "sum": dict(coding="sum"),
}


def simulate(f, x, **options):
    """As one program: by itself each operation would be one more."""
    return jax.jit(functools.partial(nadaptor.simulate, f, **options))(x)


def record(f, x, **options):
    """The same, as NumPy's, of which nothing is compiled."""
    return jax.device_get(jax.jit(functools.partial(nadaptor.record, f, **options))(x))


def f(x):
    first = nadaptor.lsq(x, 0.5, levels=2)
    return nadaptor.lsq(first @ W, 0.25, levels=4) @ W.T


@pytest.mark.parametrize("options", NEURONS.values(), ids=NEURONS)
def test_spikes_add_up_to_the_counts_of_the_simulation(options):
    rec = record(f, X, num_steps=T, **options)
    sim = simulate(f, X, num_steps=T, **options)
    assert list(rec) == ["layer0", "layer1"]
    counts = recording.spike_counts(rec)
    for count, wanted in zip(counts.values(), sim.spike_counts, strict=True):
        np.testing.assert_array_equal(count, wanted)
    assert sum(int(count.sum()) for count in counts.values()) > 0
    for rate, count in zip(recording.mean_rates(rec).values(), counts.values(), strict=True):
        np.testing.assert_allclose(rate, count.mean() / T, rtol=1e-6)


@pytest.mark.parametrize("options", NEURONS.values(), ids=NEURONS)
def test_potential_grows_by_the_current_and_falls_by_the_spike(options):
    rec = record(f, X, num_steps=T, **options)
    for layer, threshold in zip(rec.values(), (2, 4), strict=True):
        height = 1 if options.get("coding") == "sum" else threshold
        change = layer.currents - height * layer.spikes
        np.testing.assert_array_equal(np.diff(layer.potentials, axis=0), change[1:])
        if "correction" not in options:
            start = 0.5 if height == 1 else threshold / 2
            np.testing.assert_array_equal(layer.potentials[0], start + change[0])


def test_chosen_neurons_are_those_of_the_whole_recording():
    whole = record(f, X, num_steps=T)
    index = np.s_[1:3, 2]
    part = record(f, X, num_steps=T, layers={"layer1": index}, quantities=["currents"])
    assert list(part) == ["layer1"]
    assert part["layer1"].spikes is None and part["layer1"].potentials is None
    wanted = whole["layer1"].currents[:, 1:3, 2]
    np.testing.assert_array_equal(part["layer1"].currents, wanted)


def test_only_what_is_asked_for_is_stacked():
    layers = {"layer1": np.s_[0, 0]}
    jaxpr = jax.make_jaxpr(lambda x: nadaptor.record(f, x, num_steps=64, layers=layers))(X)
    stacked = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.shape[:1] == (64,)]
    assert stacked and all(aval.shape == (64,) for aval in stacked)


def test_first_spike_is_at_its_step_and_0_without_one():
    rec = record(f, X, num_steps=T)
    for name, first in recording.first_spikes(rec).items():
        for z, step in zip(
            np.asarray(rec[name].spikes).reshape(T, -1).T, first.ravel(), strict=True
        ):
            assert step == next((t + 1 for t in range(T) if z[t]), 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(layers=["act9"]), "no layer 'act9'; the layers are layer0, layer1"),
        (dict(layers={"layer0": np.s_[7]}), "does not index layer 'layer0' of shape"),
        (dict(quantities=["spike"]), "name some of spikes, potentials, currents"),
        (dict(quantities=[]), "name some of"),
        (dict(num_steps=0), "num_steps"),
    ],
)
def test_what_there_is_not_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        record(f, X, **{"num_steps": T, **options})


def test_rates_need_recorded_spikes():
    rec = record(f, X, num_steps=T, quantities=["currents"])
    with pytest.raises(ValueError, match="add 'spikes' to quantities"):
        recording.mean_rates(rec)


class Leaky(NamedTuple):
    """A neuron of one's own, whose potential decays by half at every step."""

    def init(self, shape, threshold, start):
        return jnp.full(shape, start, jnp.float32)

    def step(self, state, x, threshold):
        u = state / 2 + x
        out = threshold * (u >= threshold).astype(u.dtype)
        return u - out, out


class Hidden(Leaky):
    """The same, its state under another name."""

    def init(self, shape, threshold, start):
        return {"u": jnp.full(shape, start, jnp.float32)}

    def step(self, state, x, threshold):
        u, out = super().step(state["u"], x, threshold)
        return {"u": u}, out


def test_a_neuron_of_ones_own_is_recorded_by_its_own_equation():
    for layer, threshold in zip(
        record(f, X, num_steps=T, neuron=Leaky()).values(), (2, 4), strict=True
    ):
        before = np.concatenate(
            [np.full_like(layer.potentials[:1], threshold / 2), layer.potentials[:-1]]
        )
        wanted = before / 2 + layer.currents - threshold * layer.spikes
        np.testing.assert_array_equal(layer.potentials, wanted)
    with pytest.raises(ValueError, match="call it potential there"):
        record(f, X, num_steps=T, neuron=Hidden())
    rec = record(f, X, num_steps=T, neuron=Hidden(), quantities=["spikes"])
    whole = record(f, X, num_steps=T, neuron=Leaky(), quantities=["spikes"])
    for name in whole:
        np.testing.assert_array_equal(rec[name].spikes, whole[name].spikes)


def test_running_means_are_recorded_as_the_simulation_has_them():
    def pooled(x):
        first = nadaptor.lsq(x, 0.5, levels=2)
        return nadaptor.lsq(jax.nn.relu(first - 0.23) @ W, 0.27, levels=4) @ W.T

    options = dict(num_steps=T, nonaffine="running_mean")
    rec = record(pooled, X, **options)
    sim = simulate(pooled, X, **options)
    for count, wanted in zip(recording.spike_counts(rec).values(), sim.spike_counts, strict=True):
        np.testing.assert_array_equal(count, wanted)
    # Up to t the layer has got t times the operation on the mean of the spikes so far.
    times = np.arange(1, T + 1)[:, None, None]
    mean = np.cumsum(rec["layer0"].spikes, 0) / times
    total = np.maximum(mean - 0.23, 0) @ np.asarray(W) / 0.27 * times
    np.testing.assert_allclose(np.cumsum(rec["layer1"].currents, 0), total, rtol=1e-5, atol=1e-5)


def test_a_calibrated_threshold_is_recorded_in_units_of_the_activation():
    def calibrated(x):
        return nadaptor.clipped_relu(nadaptor.clipped_relu(x, 0.75) @ W, 0.3) @ W.T

    rec = record(calibrated, X, num_steps=T)
    sim = simulate(calibrated, X, num_steps=T)
    for count, wanted in zip(recording.spike_counts(rec).values(), sim.spike_counts, strict=True):
        np.testing.assert_array_equal(count, wanted)
    first = rec["layer0"]
    wanted = np.broadcast_to(np.asarray(X) / 0.75, (T, *X.shape))
    np.testing.assert_allclose(first.currents, wanted, rtol=1e-6)


def count_operations(jaxpr):
    """Every equation, those in bodies of scans and calls included, by its name."""
    counts = collections.Counter(eqn.primitive.name for eqn in jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for sub in sub_jaxprs(eqn.params):
            counts += count_operations(sub)
    return counts


def test_a_layer_that_is_not_recorded_costs_no_operation():
    def operations(layers, quantities):
        def run(x):
            return nadaptor.record(f, x, num_steps=T, layers=layers, quantities=quantities)

        return count_operations(jax.make_jaxpr(run)(X).jaxpr)

    bare = count_operations(jax.make_jaxpr(step_alone)(X).jaxpr)
    none = operations([], ["spikes"])
    assert none["dot_general"] == bare["dot_general"]
    assert none["round"] == bare["round"] == 0
    some = operations(["layer1"], ["currents"])
    assert some["round"] == 0
    assert operations(["layer1"], ["spikes"])["round"] == 1


def step_alone(x):
    """The network stepped T times, and nothing kept."""
    net = nadaptor.spiking(f, x)
    prepared = net.prepare(x)
    return jax.lax.scan(
        lambda state, _: (net.step(state, prepared)[0], None), net.init(prepared), length=T
    )[0]
