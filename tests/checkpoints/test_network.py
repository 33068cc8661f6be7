"""Networks of one's own on disk: what is loaded is what was saved, or it is refused."""

import dataclasses
import functools
import json

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nadaptor
from nadaptor._files.card import seal
from nadaptor.calibration import calibrate_thresholds, maximum
from nadaptor.checkpoints.network import load_network, save_network
from nadaptor.errors import RunError
from nadaptor.neurons import triangle
from nadaptor.simulation import run_network

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 6, 1)), jnp.float32)


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.relu(nn.Conv(4, (3, 3))(images))
            return nn.Dense(2)(nn.relu(nn.Dense(5)(x.mean((1, 2)))))

    return Net().apply, jax.jit(Net().init)(jax.random.key(1), IMAGES)


def nnx_with_its_key():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.out = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, images):
            return self.out(self.dropout(nnx.relu(self.conv(images))).mean((1, 2)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return lambda state, images: nnx.merge(graph, state)(images), state


def equinox():
    net = eqx.nn.MLP(36, 2, 8, 1, key=jax.random.key(2))
    arrays, rest = eqx.partition(net, eqx.is_array)
    return lambda arrays, images: jax.vmap(eqx.combine(arrays, rest))(
        images.reshape(len(images), -1)
    ), arrays


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x.reshape(len(x), -1))))
    return net.apply, jax.jit(net.init)(jax.random.key(3), IMAGES)


def plain_bfloat16():
    weights = [jnp.ones((36, 4), jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16)]

    def f(weights, images):
        x = images.reshape(len(images), -1).astype(jnp.bfloat16)
        return jax.nn.relu(x @ weights[0]) @ weights[1]

    return f, weights


def zeros_like(tree):
    """The structure of a network that is just made: other numbers in the same places."""

    def zero(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(99)
        return jnp.zeros_like(x)

    return jax.tree.map(zero, tree)


def run(f, args, **options):
    """The outputs of four steps, in one program."""
    return jax.jit(lambda *args: nadaptor.simulate(f, *args, num_steps=4, **options).outputs)(*args)


def small():
    """A quantized network with a layer of its own scale."""
    f, weights = plain_bfloat16()
    q = nadaptor.quantize(f, levels=2)
    return q, {"layer0": jnp.float32(0.5)}, weights


@pytest.mark.parametrize(
    ("make", "coding"),
    [
        (linen, "rate"),
        (nnx_with_its_key, "sum"),
        (equinox, "rate"),
        (haiku, "sum"),
        (plain_bfloat16, "rate"),
    ],
)
def test_loaded_network_simulates_to_the_bit_as_the_saved_one(make, coding, tmp_path):
    f, params = make()
    q = nadaptor.quantize(f, levels=2)
    scales = jax.jit(q.init)(params, IMAGES)
    expected = run(q, (scales, params, IMAGES), coding=coding)
    save_network(tmp_path / "net", q, scales, params, IMAGES, coding=coding)

    like = (zeros_like(scales), zeros_like(params))
    saved = load_network(tmp_path / "net", q, *like, IMAGES)

    np.testing.assert_array_equal(run(q, saved.args, **saved.options), expected)
    assert jax.tree.structure(saved.args[1]) == jax.tree.structure(params)


def test_another_batch_size_and_shapes_alone_will_do(tmp_path):
    q, scales, weights = small()
    save_network(tmp_path / "net", q, scales, weights, IMAGES)
    shapes = jax.eval_shape(lambda x: x, (scales, weights))
    saved = load_network(tmp_path / "net", q, *shapes, IMAGES[:1])
    np.testing.assert_array_equal(q(*saved.args), q(scales, weights, IMAGES)[:1])


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_scales_of_a_quantized_function_need_no_structure(channel_axis, tmp_path):
    # A max-pool that becomes a mean is a layer of the function without a scale.
    def f(w, images):
        x = jax.nn.relu(images.reshape(len(images), -1) @ w[0])
        return nn.max_pool(x[..., None], (2,), (2,))[..., 0] @ w[1]

    q, w = nadaptor.quantize(f, levels=2, pools=True), [jnp.ones((36, 4)) / 9, jnp.eye(2)]
    scales = q.init(w, IMAGES, channel_axis=channel_axis)
    save_network(tmp_path / "net", q, scales, w, IMAGES)
    saved = load_network(tmp_path / "net", q, None, zeros_like(w), IMAGES)
    chex.assert_trees_all_equal(saved.args, (scales, w, IMAGES))

    other = nadaptor.quantize(lambda w, x: jax.nn.relu(f(w, x)) @ w[1], levels=2)
    with pytest.raises(ValueError, match=r"of 1 layers, and the function has 2|there is no scale"):
        load_network(tmp_path / "net", other, None, w, IMAGES)


def test_data_may_be_any_argument(tmp_path):
    def f(images, w):
        return nadaptor.lsq(images @ w, 0.5, 2)

    images, w = jnp.ones((2, 3)), jnp.full((3, 4), 0.25)
    save_network(tmp_path / "net", f, images, w, data_argnum=0)
    saved = load_network(tmp_path / "net", f, jnp.zeros((5, 3)), jnp.zeros((3, 4)))
    np.testing.assert_array_equal(saved.args[0], jnp.zeros((5, 3)))
    np.testing.assert_array_equal(saved.args[1], w)


@pytest.mark.parametrize(
    "options",
    [
        {"neuron": nadaptor.SignedIntegrateAndFire()},
        {"neuron": nadaptor.IntegrateAndFire(surrogate=triangle)},
        {"correction": nadaptor.OffsetSpikes(4, saturated="published")},
        {"correction": nadaptor.Srp(3)},
        {"nonaffine": "running_mean"},
        {"coding": "sum", "neuron": nadaptor.StBif()},
    ],
)
def test_how_it_runs_is_kept(options, tmp_path):
    q, *args = small()
    save_network(tmp_path / "net", q, *args, IMAGES, **options)
    plain = {"neuron": None, "coding": "rate", "nonaffine": "refuse", "correction": None}
    assert load_network(tmp_path / "net", q, *args, IMAGES).options == {**plain, **options}


def test_calibration_is_kept_to_the_bit(tmp_path):
    f, weights = plain_bfloat16()
    found = calibrate_thresholds(f, weights, IMAGES, rule=maximum())
    unit = functools.partial(nadaptor.quantize(f, activation="clipped_relu"), 1.0)
    save_network(tmp_path / "net", unit, weights, IMAGES, calibration=found)

    saved = load_network(tmp_path / "net", unit, zeros_like(weights), IMAGES)
    assert saved.calibration is not None

    @jax.jit
    def run_calibrated(calibration, weights):
        net = calibration.apply(nadaptor.spiking(unit, weights, IMAGES))
        return run_network(net, net.prepare(weights, IMAGES), num_steps=8).outputs

    loaded = run_calibrated(saved.calibration, saved.args[0])
    np.testing.assert_array_equal(loaded, run_calibrated(found, weights))


@dataclasses.dataclass(frozen=True)
class Leaky(nadaptor.IntegrateAndFire):
    leak: float = 0.5

    def step(self, state, x, threshold):
        return super().step(self.leak * state, x, threshold)


def test_own_neuron_is_asked_for_by_its_name(tmp_path):
    q, *args = small()
    save_network(tmp_path / "net", q, *args, IMAGES, neuron=Leaky())
    assert load_network(tmp_path / "net", q, *args, IMAGES, neuron=Leaky()).neuron == Leaky()
    for given in (None, nadaptor.IntegrateAndFire()):
        with pytest.raises(ValueError, match=r"neuron of your own, .*Leaky; pass it as neuron="):
            load_network(tmp_path / "net", q, *args, IMAGES, neuron=given)


def test_network_of_other_levels_layers_names_or_shapes_is_refused(tmp_path):
    q, scales, weights = small()
    save_network(tmp_path / "net", q, scales, weights, IMAGES)
    load = functools.partial(load_network, tmp_path / "net")

    with pytest.raises(ValueError, match=r"'layer0' has 2 levels .* has 4"):
        load(nadaptor.quantize(q.f, levels=4), scales, weights, IMAGES)
    with pytest.raises(ValueError, match=r"only .* holds '1/1', and 0 other names"):
        load(q, scales, weights[:1], IMAGES)
    with pytest.raises(ValueError, match=r"'1/0' is bfloat16\[36, 4\], .* float32\[36, 4\]"):
        load(q, scales, [w.astype(jnp.float32) for w in weights], IMAGES)
    twice = nadaptor.quantize(lambda w, x: jax.nn.relu(q.f(w, x) @ jnp.ones((2, 2))), levels=2)
    with pytest.raises(ValueError, match="of 1 layers, and the function has 2"):
        load(
            lambda s, w, x: twice({"layer0": s["layer0"], "layer1": 1.0}, w, x),
            scales,
            weights,
            IMAGES,
        )
    with pytest.raises(ValueError, match="argument 2 is the data"):
        load(q, scales, weights)


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path):
    q, scales, weights = small()
    save = functools.partial(save_network, tmp_path / "net", q, scales)
    with pytest.raises(RunError, match="1/0 is not finite"):
        save([weights[0] * jnp.nan, weights[1]], IMAGES)
    with pytest.raises(ValueError, match="surrogate of your own"):
        save(weights, IMAGES, neuron=nadaptor.IntegrateAndFire(surrogate=lambda d: d))
    with pytest.raises(ValueError, match="cannot convert"):
        save_network(
            tmp_path / "net", lambda w, x: jax.nn.softmax(q(scales, w, x)) @ w[1].T, weights, IMAGES
        )
    with pytest.raises(ValueError, match="data_argnum=3, but there are"):
        save(weights, IMAGES, data_argnum=3)
    assert list(tmp_path.iterdir()) == []


def test_two_arrays_of_one_name_are_refused(tmp_path):
    def f(params, x):
        return nadaptor.lsq(x @ params["a/b"] + params["a"]["b"], 0.5, 2)

    params = {"a/b": jnp.ones((3, 3)), "a": {"b": jnp.ones(3)}}
    with pytest.raises(ValueError, match="two arrays have the name '0/a/b'"):
        save_network(tmp_path / "net", f, params, jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", None),
        ("argument", "x"),
        ("correction", {"type": "os.system", "fields": {}}),
        ("correction", {"type": "Srp", "fields": {"tau": 4}}),
        ("neuron", {"type": "IntegrateAndFire", "fields": {"surrogate": "eval"}}),
    ],
)
def test_card_of_a_stranger_is_one_line_and_runs_nothing(field, value, tmp_path):
    q, *args = small()
    save_network(tmp_path / "net", q, *args, IMAGES)
    file = tmp_path / "net" / "card.json"
    card = json.loads(file.read_bytes())
    card["config"][field] = value
    file.write_text(json.dumps(seal(card)))
    with pytest.raises(ValueError, match=r"net is damaged: .*; save the network again"):
        load_network(tmp_path / "net", q, *args, IMAGES)


def test_flipped_byte_of_an_array_is_found(tmp_path):
    q, *args = small()
    save_network(tmp_path / "net", q, *args, IMAGES)
    files = [p for p in (tmp_path / "net" / "arrays").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_network(tmp_path / "net", q, *args, IMAGES)
