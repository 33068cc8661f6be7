"""Inputs that vary over time: exact against a loop of one's own, however it is run."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.early_exit import early_exit, simulate_with_early_exit

STEPS, BATCH = 8, 4


def dyadic(*shape):
    """Random quarters: sums and products of them are exact, in any order."""
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(-4, 5, shape) / 4, jnp.float32)


WEIGHTS = [dyadic(6, 5), dyadic(5, 5), dyadic(5, 3)]
FRAMES = dyadic(STEPS, BATCH, 6)


def network(weights, x):
    """A ReLU and a product before the first neuron: frames may go through any operation."""
    x = jax.nn.relu(x) * x
    a = nadaptor.lsq(x @ weights[0], 0.5, levels=2)
    a = nadaptor.lsq(a @ weights[1] + x[..., :5], 0.25, levels=4)
    return a @ weights[2] + x[..., :3]


simulate = functools.partial(nadaptor.simulate, network, num_steps=STEPS, over_time=-1)


@functools.cache
def expected():
    return jax.jit(simulate)(WEIGHTS, FRAMES)


def test_simulation_is_a_loop_of_ones_own_over_prepare_and_step():
    net = nadaptor.spiking(network, WEIGHTS, FRAMES[0])
    state, outputs = net.init(net.prepare(WEIGHTS, FRAMES[0])), []
    for x in FRAMES:
        state, out = net.step(state, net.prepare(WEIGHTS, x))
        outputs.append(out)
    means = np.cumsum(outputs, 0) / np.arange(1, STEPS + 1).reshape(-1, 1, 1)
    np.testing.assert_allclose(expected().outputs, means, rtol=1e-6)
    # Sums of dyadic numbers are exact: no spike is missing, and none is at another step.
    np.testing.assert_array_equal(expected().outputs[-1] * STEPS, np.sum(outputs, 0))
    assert all(count.sum() > 0 for count in expected().spike_counts)


def test_the_same_frame_at_each_step_is_the_simulation_of_one_input():
    repeated = jnp.broadcast_to(FRAMES[:1], FRAMES.shape)
    one = jax.jit(functools.partial(nadaptor.simulate, network, num_steps=STEPS))
    chex.assert_trees_all_equal(jax.jit(simulate)(WEIGHTS, repeated), one(WEIGHTS, FRAMES[0]))


@pytest.mark.parametrize(
    "options",
    [
        dict(steps_per_chunk=3),
        dict(steps_per_chunk=2, in_axes=(None, 0), tile_size=3),
        dict(in_axes=(None, -2), tile_size=2),
    ],
    ids=str,
)
def test_how_it_is_run_changes_nothing(options):
    chex.assert_trees_all_equal(
        jax.jit(functools.partial(simulate, **options))(WEIGHTS, FRAMES), expected()
    )


def test_devices_share_the_examples_and_not_the_time():
    devices = jax.devices()[:2] if len(jax.devices()) > 1 else jax.devices()
    got = simulate(WEIGHTS, FRAMES, in_axes=(None, 0), devices=devices)
    chex.assert_trees_all_equal(got, expected())


def test_network_by_hand_steps_through_its_frames():
    net = nadaptor.spiking(network, WEIGHTS, FRAMES, over_time=1)
    prepared = net.prepare(WEIGHTS, FRAMES)
    _, outputs = jax.lax.scan(
        lambda state, _: net.step(state, prepared), net.init(prepared), length=STEPS
    )
    np.testing.assert_array_equal(outputs.sum(0), expected().outputs[-1] * STEPS)


@pytest.mark.parametrize("correction", [nadaptor.OffsetSpikes(3), nadaptor.Srp(3)])
def test_a_correction_reads_the_first_frames_and_the_steps_read_all(correction):
    net = nadaptor.spiking(network, WEIGHTS, FRAMES[:3], over_time=1)
    start = correction.start(net, net.prepare(WEIGHTS, FRAMES[:3]))
    whole = nadaptor.spiking(network, WEIGHTS, FRAMES, over_time=1)
    prepared = whole.prepare(WEIGHTS, FRAMES)
    _, outputs = jax.lax.scan(
        lambda state, _: whole.step(state, prepared), (*start, whole.init_means()), length=STEPS
    )
    sim = simulate(WEIGHTS, FRAMES, correction=correction)
    np.testing.assert_allclose(sim.outputs[-1] * STEPS, outputs.sum(0), rtol=1e-6)
    assert sim.total_steps == STEPS + 3


def test_a_recording_sees_every_frame():
    record = functools.partial(nadaptor.record, network, num_steps=STEPS, over_time=-1)
    seen = jax.jit(record)(WEIGHTS, FRAMES)
    first, last = seen.values()
    x = jax.nn.relu(FRAMES) * FRAMES
    np.testing.assert_array_equal(first.currents, x @ WEIGHTS[0] / 0.5)
    spent = (first.spikes @ WEIGHTS[1] + x[..., :5]) / 0.25
    np.testing.assert_array_equal(last.currents, spent)
    for layer, count in zip(seen.values(), expected().spike_counts, strict=True):
        np.testing.assert_array_equal(layer.spikes.sum(0), count)
    with pytest.raises(ValueError, match="has 8 frames and num_steps is 7"):
        record(WEIGHTS, FRAMES, num_steps=7)


def test_early_exit_is_that_of_the_whole_simulation():
    options = dict(num_steps=STEPS, confidence=0.6, over_time=1, steps_per_chunk=2)
    exits = simulate_with_early_exit(
        network, WEIGHTS, FRAMES, **options, in_axes=(None, 0), tile_size=2
    )
    chex.assert_trees_all_equal(exits, early_exit(expected().outputs, [0.6]))
    assert exits.steps.min() < STEPS


def test_running_means_average_frames_and_spikes_alike():
    def f(w, x):
        a = nadaptor.lsq(x @ w, 0.5, levels=2)
        return jnp.maximum(a, x[..., :5])

    w = WEIGHTS[0]
    options = dict(num_steps=STEPS, over_time=1, nonaffine="running_mean")
    sim = nadaptor.simulate(f, w, FRAMES, **options)
    spikes = nadaptor.simulate(
        lambda w, x: nadaptor.lsq(x @ w, 0.5, 2), w, FRAMES, num_steps=STEPS, over_time=1
    )
    mean = np.cumsum(FRAMES[..., :5], 0) / np.arange(1, STEPS + 1).reshape(-1, 1, 1)
    np.testing.assert_allclose(sim.outputs, np.maximum(spikes.outputs, mean), rtol=1e-6, atol=1e-7)


def gated(w, x):
    return nadaptor.lsq(x @ w, 0.5, levels=2) * x[..., :5]


@jax.custom_jvp
def inside(a, x):
    return a * x


inside.defjvps(lambda t, y, a, x: t * x, lambda t, y, a, x: t * a)


def hidden(w, x):
    return inside(nadaptor.lsq(x @ w, 0.5, levels=2), x[..., :5])


def in_a_branch(key, x):
    return jax.lax.cond(
        x.sum() > 99, jnp.negative, lambda x: x * jax.random.bernoulli(key, 0.5, x.shape), x
    )


def in_a_loop(key, x):
    keys = jax.random.split(key, len(x))
    return jax.lax.map(lambda pair: pair[1] + jax.random.bits(pair[0], (6,)) / 2.0**32, (keys, x))


@pytest.mark.reuses_keys
@pytest.mark.parametrize("draw", [in_a_branch, in_a_loop])
def test_a_draw_in_a_branch_or_a_loop_needs_a_key_for_each_step(draw):
    def f(key, w, x):
        return nadaptor.lsq(draw(key, x) @ w, 0.5, levels=2)

    args, options = (WEIGHTS[0], FRAMES), dict(num_steps=STEPS)
    with pytest.raises(ValueError, match=r"draws random numbers .* frozen for all time steps"):
        nadaptor.simulate(f, jax.random.key(0), *args, over_time=2, **options)
    keys = jax.random.split(jax.random.key(1), STEPS)
    (layer,) = nadaptor.record(f, keys, *args, over_time=(0, 2), **options).values()
    drawn = jnp.stack([draw(*pair) for pair in zip(keys, FRAMES, strict=True)])
    np.testing.assert_allclose(layer.currents, drawn @ WEIGHTS[0] / 0.5, rtol=1e-5, atol=1e-5)


REFUSED = {
    "a product of spikes and frames": (gated, {}, "product of two spiking values"),
    "such a product in a call": (hidden, {}, "varies over time together"),
    "sums": (network, dict(coding="sum"), "over_time needs rates"),
    "too few frames": (network, dict(num_steps=9), "8 frames and num_steps is 9"),
    "a long correction": (network, dict(correction=nadaptor.Srp(9)), "spends 9 steps"),
    "another argument": (network, dict(over_time=2), "names argument 2"),
    "no frames": (lambda w, x, s: network(w, x) * s, dict(over_time=2), "leading axis"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused(case):
    f, options, message = REFUSED[case]
    first = WEIGHTS if f not in (gated, hidden) else WEIGHTS[0]
    args = (first, FRAMES, 1.0) if case == "no frames" else (first, FRAMES)
    with pytest.raises(ValueError, match=message):
        nadaptor.simulate(f, *args, **dict(num_steps=STEPS, over_time=1) | options)
