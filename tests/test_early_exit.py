"""Early exit against what a plain loop over examples gives, and that it saves the steps it can."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.early_exit import early_exit, simulate_with_early_exit


def test_early_exit_is_what_a_loop_over_examples_gives():
    outputs = jax.random.normal(jax.random.key(0), (6, 20, 4)) * 2
    thresholds = [0.0, 0.5, 0.8, 0.95, 1.1]
    exits = jax.device_get(early_exit(outputs, jnp.array(thresholds)))
    confidence = np.asarray(jax.nn.softmax(outputs).max(-1))
    outputs = np.asarray(outputs)
    for m, threshold in enumerate(thresholds):
        for b in range(20):
            t = next((t for t in range(6) if confidence[t, b] >= np.float32(threshold)), 5)
            assert exits.steps[m, b] == t + 1
            assert exits.predictions[m, b] == outputs[t, b].argmax()


def test_a_higher_threshold_never_stops_earlier():
    outputs = jax.random.normal(jax.random.key(1), (8, 50, 10))
    steps = early_exit(outputs, jnp.linspace(0, 1.1, 12)).steps
    assert (jnp.diff(steps, axis=0) >= 0).all()
    assert (steps[0] == 1).all()
    assert (steps[-1] == 8).all()


@pytest.mark.parametrize(("outputs", "thresholds"), [((4,), (1,)), ((4, 3), ())])
def test_early_exit_refuses_other_shapes(outputs, thresholds):
    with pytest.raises(ValueError, match="vector of thresholds"):
        early_exit(jnp.zeros(outputs), jnp.zeros(thresholds))


def classify(weights, x):
    return nadaptor.lsq(nadaptor.lsq(x @ weights[0], 0.5, 2) @ weights[1], 0.5, 2) @ weights[2]


WEIGHTS, INPUTS = (
    jnp.asarray(np.round(4 * np.random.default_rng(2).normal(size=shape)) / 4, jnp.float32)
    for shape in ((3, 6, 6), (10, 6))
)
STEPS = 9


WAYS = {
    "plain": {},
    "chunks": {"steps_per_chunk": 4},
    "tiles": {"in_axes": (None, 0), "tile_size": 4, "steps_per_chunk": 2},
    "correction": {"correction": nadaptor.OffsetSpikes(2)},
}


@functools.cache
def whole(way):
    """The outputs of every step, which are the same for every confidence."""
    run = functools.partial(nadaptor.simulate, classify, num_steps=STEPS, **WAYS[way])
    return jax.jit(run)(WEIGHTS, INPUTS).outputs


@pytest.mark.parametrize("confidence", [0.0, 0.6, 0.9, 1.1])
@pytest.mark.parametrize("way", WAYS)
def test_running_until_sure_gives_what_the_whole_simulation_gives(confidence, way):
    expected = jax.jit(early_exit)(whole(way), np.float32([confidence]))
    options = {"num_steps": STEPS, "confidence": confidence, **WAYS[way]}
    run = functools.partial(simulate_with_early_exit, classify, **options)
    chex.assert_trees_all_equal(jax.jit(run)(WEIGHTS, INPUTS), expected)


def test_devices_stop_each_with_its_own_examples_as_one_does():
    options = {"num_steps": STEPS, "confidence": 0.6, "in_axes": (None, 0)}
    run = functools.partial(simulate_with_early_exit, classify, WEIGHTS, INPUTS, **options)
    chex.assert_trees_all_equal(jax.jit(lambda: run(devices=jax.devices()[:2]))(), run())


class Counting(nadaptor.IntegrateAndFire):
    """A neuron that says when it is run."""

    def step(self, state, x, threshold):
        jax.debug.callback(lambda: RUNS.append(1))
        return super().step(state, x, threshold)


RUNS: list[int] = []


@pytest.mark.parametrize(("confidence", "steps"), [(0.0, 2), (1.1, 8)])
def test_steps_that_no_example_needs_are_not_run(confidence, steps):
    RUNS.clear()
    options = {"num_steps": 8, "steps_per_chunk": 2, "neuron": Counting()}
    simulate_with_early_exit(classify, WEIGHTS, INPUTS, confidence=confidence, **options)
    jax.effects_barrier()
    assert len(RUNS) == 2 * steps  # two layers


def test_outputs_that_are_no_logits_are_refused():
    with pytest.raises(ValueError, match=r"logits \[B, classes\], not \(6,\)"):
        simulate_with_early_exit(
            lambda x: nadaptor.lsq(x, 0.5, 2), INPUTS[0], num_steps=2, confidence=0.5
        )


def test_devices_need_examples_that_are_independent():
    with pytest.raises(ValueError, match=r"devices=.* needs in_axes"):
        simulate_with_early_exit(
            classify, WEIGHTS, INPUTS, num_steps=2, confidence=0.5, devices=jax.devices()[:1]
        )
