"""The quantizers against Eq. 3-5 and 7-10 in closed form, and under every transformation of JAX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import nadaptor
from nadaptor._jaxpr.marks import read_mark
from nadaptor._noise import uniform_noise

LEVELS = 3
SCALE = 0.25
# x = v / scale: outside, both kinks, ties and the interior; all exact in float32.
X = np.array([-2.0, -0.25, 0.0, 0.125, 0.5, 1.25, 1.5, 2.5, 2.75, 3.0, 3.5, 9.0], np.float32)
V = X * SCALE
ROUNDED = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3], np.float32)
INSIDE = (X > 0) & (X < LEVELS)


def noise(key, shape, amplitude=0.5):
    return np.asarray(uniform_noise(key, shape, amplitude))


def round_half_up(x):
    return np.floor(x + np.float32(0.5))


def gradients(f, v, scale):
    """Gradient of each output with respect to its own input, and to a scale of its own."""
    scales = jnp.full(np.shape(v), scale, jnp.float32)
    _, pull = jax.vjp(f, jnp.asarray(v), scales)
    return pull(jnp.ones(np.shape(v), jnp.asarray(v).dtype))


class QuantizerTest(chex.TestCase):
    @chex.all_variants
    def test_lsq_is_eq_3(self):
        y = self.variant(lambda v, s: nadaptor.lsq(v, s, LEVELS))(V, SCALE)
        np.testing.assert_array_equal(y, SCALE * ROUNDED)

    @chex.all_variants
    def test_lsq_gradients_are_eq_4_and_5(self):
        dv, ds = self.variant(
            lambda v: gradients(lambda v, s: nadaptor.lsq(v, s, LEVELS), v, SCALE)
        )(V)
        np.testing.assert_array_equal(dv, INSIDE)
        expected = np.where(INSIDE, ROUNDED - X, np.where(X >= LEVELS, LEVELS, 0))
        np.testing.assert_allclose(ds, expected, atol=1e-6)

    @chex.all_variants
    @pytest.mark.reuses_keys
    def test_noise_adaptor_is_eq_7_with_the_draw_of_its_key(self):
        key = jax.random.key(7)
        v = jnp.linspace(-1.0, 2.0, 300)
        y = self.variant(lambda v: nadaptor.noise_adaptor(key, v, SCALE, LEVELS))(v)
        x = v / np.float32(SCALE) + noise(key, v.shape)
        np.testing.assert_array_equal(y, SCALE * round_half_up(np.clip(x, 0, LEVELS)))


@pytest.mark.reuses_keys
@pytest.mark.parametrize("mode", ["paper", "exact"])
def test_noise_adaptor_gradients_are_eq_9_and_10(mode):
    key, v = jax.random.key(3), np.linspace(-0.5, 1.25, 500, dtype=np.float32)
    dv, ds = gradients(
        lambda v, s: nadaptor.noise_adaptor(key, v, s, LEVELS, gradient=mode), v, SCALE
    )
    x = v / np.float32(SCALE)
    noisy = x + noise(key, v.shape)
    inside = (noisy > 0) & (noisy < LEVELS)
    assert inside.any()
    assert (noisy <= 0).any()
    assert (noisy >= LEVELS).any()
    np.testing.assert_array_equal(dv, inside)
    term = round_half_up(noisy) - (noisy if mode == "paper" else x)
    expected = np.where(inside, term, np.where(noisy >= LEVELS, LEVELS, 0))
    np.testing.assert_allclose(ds, expected, atol=1e-6)


@pytest.mark.reuses_keys
def test_noise_adaptor_gradients_at_both_kinks():
    key = jax.random.key(0)
    eps = noise(key, (2,))
    v = jnp.asarray(np.array([0.0, LEVELS], np.float32) - eps)  # scale 1: x + eps is 0 and p
    x = v + eps
    dv, ds = gradients(lambda v, s: nadaptor.noise_adaptor(key, v, s, LEVELS), v, 1.0)
    np.testing.assert_array_equal(x, [0, LEVELS])
    np.testing.assert_array_equal(dv, [0, 0])
    np.testing.assert_array_equal(ds, [0, LEVELS])


@pytest.mark.reuses_keys
def test_exact_gradient_equals_a_straight_through_twin():
    """The twin rounds with stop_gradient and leaves the rest to autodiff."""
    key, v = jax.random.key(5), jnp.linspace(-0.5, 1.3, 401)
    eps = noise(key, v.shape)

    def twin(v, s):
        x = v / s + eps
        clipped = jnp.clip(x, 0, LEVELS)
        return s * (clipped + jax.lax.stop_gradient(jnp.floor(clipped + 0.5) - clipped))

    def ours(v, s):
        return nadaptor.noise_adaptor(key, v, s, LEVELS, gradient="exact")

    def grads_of(f):
        def loss(v, s):
            return (f(v, s) * jnp.cos(jnp.arange(v.size))).sum()

        return jax.grad(loss, (0, 1))(v, jnp.float32(SCALE))

    grads = [grads_of(f) for f in (ours, twin)]
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_mean_over_the_noise_is_the_clipped_value(levels):
    v = np.linspace(-0.7, 0.3 * levels + 0.7, 41, dtype=np.float32)
    keys = jax.random.split(jax.random.key(1), 40_000)
    draw = jax.vmap(lambda k: nadaptor.noise_adaptor(k, v, 0.3, levels))
    mean = jax.jit(lambda: draw(keys).mean(0))()
    # One draw varies by at most 0.3, so the mean of 40,000 is within 5 * 0.15 / 200.
    np.testing.assert_allclose(mean, np.clip(v, 0, 0.3 * levels), atol=0.004)


@pytest.mark.reuses_keys
def test_amplitude_sets_how_far_the_noise_reaches():
    key, v = jax.random.key(2), jnp.full((20_000,), 0.5)

    def reached(amplitude):
        y = nadaptor.noise_adaptor(key, v, 0.125, 8, amplitude=amplitude)
        return set(np.unique(y / 0.125).tolist())

    assert reached(0.0) == {4.0}
    assert reached(0.5) == {4.0}
    assert reached(1.5) == {3.0, 4.0, 5.0}
    assert reached(2.0) == {2.0, 3.0, 4.0, 5.0, 6.0}
    np.testing.assert_array_equal(
        nadaptor.noise_adaptor(key, V, SCALE, LEVELS, amplitude=0.0),
        nadaptor.lsq(V, SCALE, LEVELS),
    )


def test_a_key_fixes_the_draw_and_another_changes_it():
    v = jnp.full((64,), 0.3)
    draws = [nadaptor.noise_adaptor(jax.random.key(k), v, 1.0, 2) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_clipped_relu_and_its_gradients():
    np.testing.assert_array_equal(nadaptor.clipped_relu(X, 3.0), np.clip(X, 0, 3))
    dv, dth = gradients(nadaptor.clipped_relu, X, 3.0)
    np.testing.assert_array_equal(dv, INSIDE)
    np.testing.assert_array_equal(dth, X >= 3)


def test_gradient_scale_multiplies_the_gradient_of_the_scale_alone():
    def grads(factor):
        f = functools.partial(nadaptor.lsq, levels=LEVELS, gradient_scale=factor)
        return gradients(f, V, SCALE)

    np.testing.assert_array_equal(grads(0.25)[0], grads(1.0)[0])
    np.testing.assert_array_equal(grads(0.25)[1], 0.25 * grads(1.0)[1])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (1, 5), (4, 5), (3, 4, 5)])
def test_gradient_of_a_broadcast_scale_sums_over_what_shares_it(shape):
    v = jax.random.normal(jax.random.key(0), (3, 4, 5))
    scale = 0.2 + jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape) / 50

    def loss(scale):
        return (nadaptor.lsq(v, scale, 2) * jnp.cos(v)).sum()

    wide = jax.grad(lambda s: loss(s))(jnp.broadcast_to(scale, v.shape))
    _, narrow = jax.vjp(lambda s: jnp.broadcast_to(s, v.shape), scale)
    np.testing.assert_allclose(jax.grad(loss)(scale), narrow(wide)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_of_the_input_is_kept_and_the_scale_keeps_its_own(dtype):
    v = jnp.asarray(V, dtype)
    f = functools.partial(nadaptor.lsq, levels=LEVELS)
    y, pull = jax.vjp(f, v, jnp.float32(SCALE))
    dv, ds = pull(jnp.ones_like(y))
    assert (y.dtype, dv.dtype, ds.dtype) == (dtype, dtype, jnp.float32)
    np.testing.assert_array_equal(y.astype(np.float32), SCALE * ROUNDED)
    np.testing.assert_array_equal(dv.astype(np.float32), INSIDE)


def test_bfloat16_input_is_rounded_in_float32():
    """7.47 / 0.0437 in bfloat16 would land on another level."""
    v = jnp.bfloat16(4.96875)
    y = nadaptor.lsq(v, 0.0437, 255)
    level = np.floor(np.float32(v) / np.float32(0.0437) + 0.5)
    assert y == jnp.bfloat16(level * np.float32(0.0437))


def sum_of_noisy(key, v, scale):
    return nadaptor.noise_adaptor(key, v, scale, LEVELS).sum()


@pytest.mark.reuses_keys
def test_grad_is_the_same_under_jit_remat_and_scan():
    key, v, scale = jax.random.key(0), jnp.linspace(-1, 2, 50), jnp.float32(SCALE)
    f = functools.partial(sum_of_noisy, key)
    plain = jax.grad(f, (0, 1))(v, scale)
    chex.assert_trees_all_close(jax.jit(jax.grad(f, (0, 1)))(v, scale), plain, rtol=1e-5)
    chex.assert_trees_all_close(jax.grad(jax.checkpoint(f), (0, 1))(v, scale), plain, rtol=1e-5)

    def scanned(v, scale):
        return jax.lax.scan(lambda total, row: (total + f(row, scale), None), 0.0, v[None])[0]

    chex.assert_trees_all_close(jax.grad(scanned, (0, 1))(v, scale), plain, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap_over_any_axis_with_per_channel_scales(axis):
    v = jax.random.normal(jax.random.key(0), (3, 3, 3))
    scales = jnp.array([0.1, 0.3, 0.5])
    mapped = jax.vmap(lambda v, s: nadaptor.lsq(v, s, 2), (axis, 0), axis)(v, scales)
    shape = [1, 1, 1]
    shape[axis] = 3
    np.testing.assert_array_equal(mapped, nadaptor.lsq(v, scales.reshape(shape), 2))


@pytest.mark.reuses_keys
def test_devices_draw_different_noise_from_their_own_keys_under_pmap_and_shard_map():
    count = min(2, jax.device_count())
    keys = jax.random.split(jax.random.key(0), count)
    v = jnp.full((count, 200), 0.3)
    pairs = zip(keys, v, strict=True)
    expected = jnp.stack([nadaptor.noise_adaptor(k, x, 1.0, 2) for k, x in pairs])
    np.testing.assert_array_equal(
        jax.pmap(lambda k, x: nadaptor.noise_adaptor(k, x, 1.0, 2))(keys, v), expected
    )
    mesh = Mesh(np.array(jax.devices()[:count]), ("batch",))
    spec = PartitionSpec("batch")
    sharded = jax.shard_map(
        lambda k, x: nadaptor.noise_adaptor(k[0], x, 1.0, 2),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(sharded)(keys, v), expected)
    if count > 1:
        assert (expected[0] != expected[1]).any()


def test_grad_under_shard_map_is_the_grad_outside_it():
    v, scale = jnp.linspace(-1, 2, 64).reshape(2, 32), jnp.float32(SCALE)
    count = min(2, jax.device_count())
    mesh = Mesh(np.array(jax.devices()[:count]), ("batch",))

    def local(v, scale):
        grads = jax.grad(lambda v, s: nadaptor.lsq(v, s, LEVELS).sum(), (0, 1))(v, scale)
        return grads[0], jax.lax.psum(grads[1], "batch")

    spec = PartitionSpec("batch")
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=(spec, PartitionSpec()),
        check_vma=False,
    )
    plain = jax.grad(lambda v, s: nadaptor.lsq(v, s, LEVELS).sum(), (0, 1))(v, scale)
    chex.assert_trees_all_close(jax.jit(sharded)(v, scale), plain, rtol=1e-5)


def test_backward_pass_keeps_one_value_of_the_compute_dtype_for_each_activation():
    v = jnp.ones((64, 32), jnp.bfloat16)
    _, pull = jax.vjp(lambda v, s: sum_of_noisy(jax.random.key(0), v, s), v, jnp.float32(1))
    kept = sum(x.nbytes for x in jax.tree.leaves(pull) if x.shape == v.shape)
    assert kept <= v.nbytes


@pytest.mark.parametrize(
    ("make", "levels", "start"),
    [
        (lambda v: nadaptor.lsq(v, 0.5, 3), 3, 1.5),
        (lambda v: nadaptor.noise_adaptor(jax.random.key(0), v, 0.5, 4), 4, 2.0),
        (lambda v: nadaptor.clipped_relu(v, 0.5), 1, 0.5),
    ],
)
def test_a_mark_tells_levels_and_start(make, levels, start):
    marks = [m for m in marks_of(jax.make_jaxpr(make)(jnp.ones(2)).jaxpr) if m]
    assert marks == [(levels, start)]


def marks_of(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jit":
            yield read_mark(eqn.params["name"])
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(sub, "eqns"):
                yield from marks_of(getattr(sub, "jaxpr", sub))


@pytest.mark.parametrize("levels", [0, -1, 1.5, True, "2", None])
def test_levels_must_be_a_positive_int(levels):
    with pytest.raises(ValueError, match="levels must be a positive int"):
        nadaptor.lsq(jnp.ones(3), 0.5, levels)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, [0.5, 0.0, 1.0]])
def test_a_concrete_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="finite and positive"):
        nadaptor.lsq(jnp.ones(3), jnp.asarray(scale), 2)


def test_a_traced_scale_is_not_checked():
    assert jnp.isnan(jax.jit(lambda s: nadaptor.lsq(jnp.ones(3), s, 2))(jnp.nan)).all()


@pytest.mark.parametrize("shape", [(2,), (3, 3), (1, 1, 3)])
def test_a_scale_must_broadcast_to_the_activation(shape):
    with pytest.raises(ValueError, match="does not broadcast"):
        nadaptor.lsq(jnp.ones((2, 3)), jnp.ones(shape), 2)


def test_integer_input_is_refused():
    with pytest.raises(ValueError, match="floating point, not uint8"):
        nadaptor.lsq(jnp.ones(3, jnp.uint8), 0.5, 2)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jax.random.PRNGKey(0), "wrap_key_data"),
        (0, "typed PRNG key"),
        (None, "typed PRNG key"),
        (jax.random.split(jax.random.key(0)), "single key"),
    ],
)
def test_key_must_be_one_typed_key(key, message):
    with pytest.raises(ValueError, match=message):
        nadaptor.noise_adaptor(key, jnp.ones(3), 0.5, 2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"gradient": "best"}, "'best'"),
        ({"amplitude": -1}, "amplitude"),
        ({"amplitude": np.nan}, "amplitude"),
    ],
)
def test_unknown_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        nadaptor.noise_adaptor(jax.random.key(0), jnp.ones(3), 0.5, 2, **option)


def ste_floor(x):
    return x + jax.lax.stop_gradient(jnp.floor(x) - x)


# Their published code, with clamps that pass the gradient on the edge, as torch's do.
def clamp(x, high):
    inside = (x >= 0) & (x <= high)
    return jnp.where(inside, x, jax.lax.stop_gradient(jnp.clip(x, 0, high)))


def qcfs_twin(v, th, clip):
    if clip == "last":
        return th * clamp(ste_floor(LEVELS * v / th + 0.5) / LEVELS, 1.0)
    return th * ste_floor(clamp(v / th, 1.0) * LEVELS + 0.5) / LEVELS


def slip_twin(v, th, a, d1, d2):
    linear = clamp(v / th + d1 / LEVELS, 1.0)
    return a * th * linear + (1 - a) * th * clamp(ste_floor(LEVELS * v / th + d2) / LEVELS, 1.0)


# x = LEVELS * v / 0.75 as X above, with the edges of both pass regions.
THRESHOLD = 0.75
EDGES = np.concatenate([X, [-0.5, -0.625, 3.25, 3.49]]).astype(np.float32) * (THRESHOLD / LEVELS)


@pytest.mark.parametrize("clip", ["first", "last"])
def test_qcfs_is_autodiff_of_the_published_formula(clip):
    ours = gradients(lambda v, t: nadaptor.qcfs(v, t, LEVELS, clip=clip), EDGES, THRESHOLD)
    twin = gradients(lambda v, t: qcfs_twin(v, t, clip), EDGES, THRESHOLD)
    chex.assert_trees_all_close(ours, twin, atol=1e-6)
    np.testing.assert_allclose(
        nadaptor.qcfs(EDGES, THRESHOLD, LEVELS, clip=clip), qcfs_twin(EDGES, THRESHOLD, clip)
    )


@pytest.mark.parametrize(("a", "d1", "d2"), [(0.5, 0.0, 0.5), (0.3, 0.5, 0.25), (0.0, 0.0, 0.5)])
def test_slip_relu_is_autodiff_of_the_published_formula(a, d1, d2):
    options = {"slope": a, "shift": d1, "floor_shift": d2}
    ours = gradients(lambda v, t: nadaptor.slip_relu(v, t, LEVELS, **options), EDGES, THRESHOLD)
    twin = gradients(lambda v, t: slip_twin(v, t, a, d1, d2), EDGES, THRESHOLD)
    chex.assert_trees_all_close(ours, twin, atol=2e-6)
    y = nadaptor.slip_relu(EDGES, THRESHOLD, LEVELS, **options)
    np.testing.assert_allclose(y, slip_twin(EDGES, THRESHOLD, a, d1, d2), atol=1e-6)


def test_slip_relu_lies_between_qcfs_and_the_clipped_relu():
    v = jnp.linspace(-1.0, 2.0, 200)
    slip = functools.partial(nadaptor.slip_relu, v, 1.0, 4)
    np.testing.assert_array_equal(slip(slope=0.0), nadaptor.qcfs(v, 1.0, 4))
    np.testing.assert_allclose(slip(slope=1.0), nadaptor.clipped_relu(v, 1.0), atol=1e-6)


def test_qcfs_is_lsq_at_the_scale_th_over_levels():
    np.testing.assert_array_equal(
        nadaptor.qcfs(EDGES, THRESHOLD, LEVELS), nadaptor.lsq(EDGES, THRESHOLD / LEVELS, LEVELS)
    )


@pytest.mark.parametrize(
    ("f", "levels", "start"),
    [
        (lambda v: nadaptor.qcfs(v, 2.0, 4), 4, 2.0),
        (lambda v: nadaptor.slip_relu(v, 2.0, 4), 4, 2.0),
        (lambda v: nadaptor.slip_relu(v, 2.0, 4, floor_shift=0.25), 4, 1.0),
    ],
)
def test_threshold_quantizers_become_neurons_of_that_threshold(f, levels, start):
    v = jnp.linspace(-0.5, 2.5, 25)
    (layer,) = nadaptor.spiking(f, v).layers
    assert (layer.threshold, layer.start) == (levels, start)
    sim = nadaptor.simulate(f, v, num_steps=64)
    np.testing.assert_allclose(sim.outputs[-1], np.clip(v, 0, 2), atol=2 / 64 + 1e-6)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda v: nadaptor.qcfs(v, 1.0, 2, clip="middle"), "'middle'"),
        (lambda v: nadaptor.slip_relu(v, 1.0, 2, slope=1.5), "slope"),
        (lambda v: nadaptor.qcfs(v, -1.0, 2), "threshold must be finite and positive"),
    ],
)
def test_bad_options_of_the_threshold_quantizers(f, message):
    with pytest.raises(ValueError, match=message):
        f(jnp.ones(3))
