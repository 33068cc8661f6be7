"""Calls kept whole: own derivatives, loops and branches without a quantizer; effects; NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.experimental import checkify, io_callback, sparse

import nadaptor

X = jnp.asarray(np.arange(-9, 9).reshape(6, 3) / 4, jnp.float32)
W = jnp.asarray([[1, 0.5, 0], [0, 1, -0.5], [0.25, 0, 1]], jnp.float32)
BCOO, BCSR = sparse.BCOO.fromdense(W), sparse.BCSR.fromdense(W)


def q(v):
    return nadaptor.lsq(v, 0.5, 2)


@jax.custom_vjp
def straight_vjp(w):
    return jnp.round(w)


straight_vjp.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))


@jax.custom_jvp
def straight_jvp(w):
    return jnp.round(w)


straight_jvp.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


@pytest.mark.parametrize("straight", [straight_vjp, straight_jvp])
def test_weights_rounded_straight_through_have_the_gradient_of_the_weights(straight):
    def last(w, rounded):
        f = lambda x: q(x) @ (straight(w) if rounded else w)  # noqa: E731
        return nadaptor.simulate(f, X, num_steps=2).outputs[-1].sum()

    gradient = jax.jit(jax.grad(last), static_argnums=1)
    found = gradient(1.1 * W, True)
    np.testing.assert_allclose(found, gradient(1.1 * W, False), rtol=1e-6)
    assert np.abs(found).sum() > 0


@jax.custom_vjp
def doubled(z):
    return 2 * z


doubled.defvjp(lambda z: (2 * z, None), lambda _, g: (5 * g,))


@pytest.mark.parametrize("steps_per_chunk", [1, 3])
def test_an_affine_call_on_spikes_keeps_its_own_derivative(steps_per_chunk):
    def last(w, g):
        f = lambda x: g(q(x) @ w)  # noqa: E731
        sim = nadaptor.simulate(f, X, num_steps=3, steps_per_chunk=steps_per_chunk)
        return sim.outputs[-1].sum()

    run, gradient = (jax.jit(f, static_argnums=1) for f in (last, jax.grad(last)))
    np.testing.assert_array_equal(run(W, doubled), run(W, lambda z: 2 * z))
    ours, plain = (gradient(W, g) for g in (doubled, lambda z: 5 * z))
    np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_a_call_that_is_not_affine_is_refused_for_what_is_in_it():
    squared = jax.custom_vjp(lambda z: z * z)
    squared.defvjp(lambda z: (z * z, z), lambda z, g: (g * z,))
    with pytest.raises(ValueError, match=r"mul at .*test_calls.py:\d+ acts on spikes"):
        nadaptor.spiking(lambda x: squared(q(x)), X)


def ragged(z):
    return lax.ragged_dot(z, jnp.stack([W, 2 * W]), jnp.array([2, 4]))


AFFINE = {
    "diag": lambda z: jnp.diag(z[:3]),
    "diagonal": lambda z: jnp.diagonal(z),
    "solve": lambda z: jnp.linalg.solve(W, z.T),
    "ragged_dot": ragged,
    "bcoo": lambda z: BCOO @ z.T,
    "bcoo_right": lambda z: z @ BCOO,
    "bcsr": lambda z: BCSR @ z.T,
    "platform_dependent": lambda z: lax.platform_dependent(
        z, cpu=lambda z: 2 * z, default=lambda z: z + z
    ),
    "linear_call": lambda z: linear_call(lambda r, z: r * z, lambda r, z: r * z, 2.0, z),
    "cond": lambda z: lax.cond(X[0, 0] > 0, lambda z: z, lambda z: 2 * z + 1, z),
    "scan": lambda z: lax.scan(lambda c, y: (c + y, c @ W), z[0], z)[1],
    "scan_of_static": lambda z: lax.scan(lambda c, i: (c * i, c), z, jnp.arange(3.0))[0],
}


@pytest.mark.parametrize("steps_per_chunk", [1, 2])
@pytest.mark.parametrize("g", AFFINE.values(), ids=AFFINE)
def test_an_affine_operation_on_spikes_has_the_output_of_the_quantized_network(g, steps_per_chunk):
    """After levels steps of a static input the rate is the quantized activation exactly."""
    f = lambda x: g(q(x))  # noqa: E731
    sim = jax.jit(lambda x: nadaptor.simulate(f, x, num_steps=2, steps_per_chunk=steps_per_chunk))(
        X
    )
    np.testing.assert_allclose(np.asarray(sim.outputs)[-1], jax.jit(f)(X), rtol=1e-5, atol=1e-6)


NOT_AFFINE = {
    "scan": lambda z: lax.scan(lambda c, y: (c * y, None), z[0], z)[0],
    "carried": lambda z: lax.scan(lambda c, y: (y, c * y), jnp.zeros(3), z)[1],
    "cond": lambda z: lax.cond(X[0, 0] > 0, lambda z: z * z, lambda z: z, z),
    "ragged_dot": lambda z: lax.ragged_dot(z, jnp.stack([z[:3], z[:3]]), jnp.array([2, 4])),
    "solve": lambda z: jnp.linalg.solve(z[:3] + W, X[:3]),
    "bcoo": lambda z: (BCOO * z[0]) @ z.T,
}


@pytest.mark.parametrize("g", NOT_AFFINE.values(), ids=NOT_AFFINE)
def test_what_is_not_affine_in_a_call_is_refused(g):
    with pytest.raises(ValueError, match=r"not affine|not known to be affine"):
        nadaptor.spiking(lambda x: g(q(x)), X)


def test_an_operation_of_which_nothing_is_known_is_called_that():
    with pytest.raises(ValueError, match=r"sort at .* is not known to be affine"):
        nadaptor.spiking(lambda x: jnp.sort(q(x)), X)


def test_a_scan_without_a_quantizer_stays_one_operation():
    def f(x):
        return lax.scan(lambda c, _: (0.5 * c + 1, None), q(x), length=1000)[0]

    names = [op.primitive.name for op in nadaptor.spiking(f, X)._plan.stepwise]
    assert len(names) < 10 and names.count("scan") == 1


def test_a_long_scan_with_quantizers_says_what_it_costs():
    def f(x, length):
        return lax.scan(lambda c, _: (q(c), None), x, length=length)[0]

    with pytest.warns(UserWarning, match=r"100 turns at .*test_calls.py:\d+ holds a quantizer"):
        assert len(nadaptor.spiking(lambda x: f(x, 100), X).layers) == 100
    nadaptor.spiking(lambda x: f(x, 99), X)


def test_a_sigmoid_as_the_last_operation_is_told_to_go_outside():
    with pytest.raises(ValueError, match="return the logits"):
        nadaptor.spiking(lambda x: jax.nn.sigmoid(q(x) @ W), X)
    with pytest.raises(ValueError, match="replace it by a quantized activation"):
        nadaptor.spiking(lambda x: jax.nn.sigmoid(q(x)) @ W, X)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("options", [{}, {"steps_per_chunk": 2}, {"steps_per_chunk": 4}])
def test_debugging_effects_run_at_every_step(options, ordered):
    seen = []

    def f(x):
        z = q(x)
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), z, ordered=ordered)
        jax.debug.callback(lambda x: seen.append("static"), x, ordered=ordered)
        return z

    sim = nadaptor.simulate(f, X, num_steps=4, **options)
    jax.effects_barrier()
    spikes = [z for z in seen if not isinstance(z, str)]
    assert len(spikes) == 4 and len(seen) == 8
    np.testing.assert_array_equal(np.mean(spikes, 0), sim.outputs[-1])


def mutates(x):
    ref = jax.new_ref(x)
    ref[...] += 1
    return ref[...]


EFFECTS = {
    "io_callback": lambda z: io_callback(lambda z: z, z, z),
    "unused": lambda z: (io_callback(lambda z: None, None, z), z)[1],
    "check": lambda z: (checkify.check(X.sum() > 0, "negative"), z)[1],
    "ref": mutates,
}


@pytest.mark.parametrize("where", ["static", "spiking"])
@pytest.mark.parametrize("g", EFFECTS.values(), ids=EFFECTS)
def test_an_effect_that_no_step_can_repeat_is_refused_by_name(g, where):
    f = (lambda x: q(g(x))) if where == "static" else (lambda x: g(q(x)))
    with pytest.raises(ValueError, match=r"has a side effect \(\w+"):
        nadaptor.spiking(f, X)


@pytest.mark.parametrize("neuron", [nadaptor.IntegrateAndFire(), nadaptor.SignedIntegrateAndFire()])
@pytest.mark.parametrize("place", ["input", "first weights", "last weights"])
def test_nan_reaches_the_outputs_that_it_reaches_in_the_quantized_network(place, neuron):
    wrong = {name: jnp.zeros(()) for name in ("input", "first weights", "last weights")}
    wrong[place] = jnp.float32(jnp.nan)

    def f(x):
        x = x.at[0, 1].add(wrong["input"])
        x = q(x @ W.at[0, 0].add(wrong["first weights"]))
        return q(x @ W.at[1, 2].add(wrong["last weights"]))

    run = functools.partial(nadaptor.simulate, f, num_steps=3, neuron=neuron)
    wanted = np.isnan(jax.jit(f)(X))
    for out in np.asarray(jax.jit(run)(X).outputs):
        np.testing.assert_array_equal(np.isnan(out), wanted)
    assert wanted.any()


@pytest.mark.parametrize("correction", [nadaptor.OffsetSpikes(2), nadaptor.Srp(2)])
def test_nan_is_not_corrected_away(correction):
    bad = X.at[0, 0].set(jnp.nan)
    f = lambda x: q(x @ W)  # noqa: E731
    run = functools.partial(nadaptor.simulate, f, num_steps=3, correction=correction)
    outputs, wanted = np.asarray(jax.jit(run)(bad).outputs), jax.jit(f)(bad)
    np.testing.assert_array_equal(np.isnan(outputs[-1]), np.isnan(wanted))


SUMMED = {
    "sum": lambda x: q(x).sum(0),
    "scalar": lambda x: q(x).sum(),
    "one_of_two": lambda x: (q(x), {"a": q(x).sum(1).sum(0)}),
    "transposed": lambda x: (q(x) @ jnp.ones((3, 6))).T,
}
PARTS = {
    "in_axes": {},
    "tiles": {"tile_size": 2},
    "devices": {"devices": jax.devices()[:2]},
}


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", SUMMED)
def test_an_output_without_the_examples_axis_is_refused(name, options):
    if name == "transposed" and not options:
        pytest.skip("without parts, nothing tells an axis of as many features from the examples")
    with pytest.raises(ValueError, match=r"output.* has shape \(.*\), no \d examples along axis 0"):
        nadaptor.simulate(SUMMED[name], X, num_steps=2, in_axes=0, **options)
