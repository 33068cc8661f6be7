"""Recordings against simulations and against the equations of the neuron."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor import recording

W = jnp.array([[0.5, -0.25, 1.0], [0.25, 0.5, -0.5]])
X = jnp.array([[0.25, 1.0], [0.5, 0.0], [0.75, 0.5], [-1.0, 0.25]])
T = 8
NEURONS = {
    "rate": dict(),
    "signed": dict(neuron=nadaptor.SignedIntegrateAndFire()),
    "corrected": dict(correction=nadaptor.OffsetSpikes(4)),
    "sum": dict(coding="sum"),
}


def f(x):
    first = nadaptor.lsq(x, 0.5, levels=2)
    return nadaptor.lsq(first @ W, 0.25, levels=4) @ W.T


@pytest.mark.parametrize("options", NEURONS.values(), ids=NEURONS)
def test_spikes_add_up_to_the_counts_of_the_simulation(options):
    rec = nadaptor.record(f, X, num_steps=T, **options)
    sim = nadaptor.simulate(f, X, num_steps=T, **options)
    assert list(rec) == ["layer0", "layer1"]
    counts = recording.spike_counts(rec)
    for count, wanted in zip(counts.values(), sim.spike_counts, strict=True):
        np.testing.assert_array_equal(count, wanted)
    assert sum(int(count.sum()) for count in counts.values()) > 0
    for rate, count in zip(recording.mean_rates(rec).values(), counts.values(), strict=True):
        np.testing.assert_allclose(rate, count.mean() / T, rtol=1e-6)


@pytest.mark.parametrize("options", NEURONS.values(), ids=NEURONS)
def test_potential_grows_by_the_current_and_falls_by_the_spike(options):
    rec = nadaptor.record(f, X, num_steps=T, **options)
    for layer, threshold in zip(rec.values(), (2, 4), strict=True):
        height = 1 if options.get("coding") == "sum" else threshold
        change = layer.currents - height * layer.spikes
        np.testing.assert_array_equal(jnp.diff(layer.potentials, axis=0), change[1:])
        if "correction" not in options:
            start = 0.5 if height == 1 else threshold / 2
            np.testing.assert_array_equal(layer.potentials[0], start + change[0])


def test_chosen_neurons_are_those_of_the_whole_recording():
    whole = nadaptor.record(f, X, num_steps=T)
    index = np.s_[1:3, 2]
    part = nadaptor.record(f, X, num_steps=T, layers={"layer1": index}, quantities=["currents"])
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
    rec = nadaptor.record(f, X, num_steps=T)
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
        nadaptor.record(f, X, **{"num_steps": T, **options})


def test_rates_need_recorded_spikes():
    rec = nadaptor.record(f, X, num_steps=T, quantities=["currents"])
    with pytest.raises(ValueError, match="add 'spikes' to quantities"):
        recording.mean_rates(rec)
