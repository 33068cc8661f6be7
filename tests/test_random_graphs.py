"""Random networks against a time loop in numpy that shares nothing with the package.

`make drills` draws a thousand of each: HYPOTHESIS_PROFILE=long.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import nadaptor
from tests.graphs import (
    EXAMPLES,
    Operation,
    as_jax,
    graphs,
    inputs,
    offset_start,
    over_time,
    quantized,
)

pytestmark = pytest.mark.reuses_keys
X = st.composite(inputs)()
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "steps_per_chunk": st.integers(1, 4),
        "tile_size": st.integers(1, EXAMPLES),
        "fast_convolution": st.booleans(),
    },
)


def simulated(f, x, num_steps, **options):
    """A simulation on examples that are independent."""
    axes = {"in_axes": 0} if "tile_size" in options else {}
    x = jnp.asarray(x, jnp.float32)
    return nadaptor.simulate(f, x, num_steps=num_steps, **axes, **options)


def assert_same(sim, expected):
    outputs, counts, _ = expected
    for ours, theirs in zip(sim.spike_counts, counts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(sim.outputs, outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@given(graphs(), X, st.integers(1, 7), OPTIONS)
def test_simulation_is_the_time_loop_however_it_is_run(operations, x, num_steps, options):
    sim = simulated(as_jax(operations), x, num_steps, **options)
    assert_same(sim, over_time(operations, x, num_steps))


@given(graphs(), X, OPTIONS)
def test_sums_end_at_the_quantized_network_to_the_bit(operations, x, options):
    sim = simulated(as_jax(operations), x, 48, coding="sum", **options)
    assume(int(sim.settled) < 48)
    for ours, theirs in zip(sim.outputs, quantized(operations, x), strict=True):
        np.testing.assert_array_equal(ours[-1], theirs)


@given(graphs(), X, st.integers(1, 3), st.integers(1, 4), OPTIONS)
def test_srp_silences_in_the_time_loop_what_it_silences(operations, x, tau, num_steps, options):
    """Those at most a thousandth of a threshold above zero after tau steps."""
    levels = [op.detail[2] for op in operations if op.name == "quantizer"]
    potentials = over_time(operations, x, tau)[2]
    start = [
        np.where(u > 1e-3 * p, p / 2, -np.inf) for u, p in zip(potentials, levels, strict=True)
    ]
    sim = simulated(as_jax(operations), x, num_steps, correction=nadaptor.Srp(tau), **options)
    assert_same(sim, over_time(operations, x, num_steps, start))


@given(graphs(), X, st.integers(1, 4), st.integers(1, 4), OPTIONS)
def test_offset_spikes_start_where_the_layers_one_after_the_other_say(
    operations, x, rho, num_steps, options
):
    correction = nadaptor.OffsetSpikes(rho)
    sim = simulated(as_jax(operations), x, num_steps, correction=correction, **options)
    start = offset_start(operations, x, rho)
    assert_same(sim, over_time(operations, x, num_steps, start))


@given(graphs(quantizers=("relu",)), X, st.integers(1, 5), OPTIONS)
def test_a_quantized_network_with_relus_is_its_time_loop(operations, x, num_steps, options):
    """Scale and levels of a layer are one for all, as `nadaptor.quantize` gives them."""
    operations = [
        op._replace(detail=(*op.detail[:1], 0.5, 2)) if op.name == "quantizer" else op
        for op in operations
    ]
    q = nadaptor.quantize(as_jax(operations), levels=2)
    data = jnp.asarray(x, jnp.float32)
    scales = jax.tree.map(lambda s: jnp.full_like(s, 0.5), q.init(data, rule="max"))
    for ours, theirs in zip(q(scales, data), quantized(operations, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    sim = simulated(lambda x: q(scales, x), x, num_steps, **options)
    assert_same(sim, over_time(operations, x, num_steps))


def test_the_time_loop_of_these_tests_is_that_of_one_neuron():
    """By hand: 0.75 in units of 0.5 is 1.5 a step, the threshold 2, and the start 1."""
    operations, spikes = [Operation("quantizer", (0,), ("lsq", 0.5, 2))], [1, 1, 0, 1]
    outputs, counts, potentials = over_time(operations, np.full((1, 1), 0.75), 4)
    np.testing.assert_allclose(outputs[0].ravel(), np.cumsum(spikes) / np.arange(1, 5))
    assert (counts[0].item(), potentials[0].item()) == (3, 1.0)
