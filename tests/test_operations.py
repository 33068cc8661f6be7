"""SynOps and MACs against counts by brute force: one spike and one synapse at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.operations import EnergyTable

T = 5
IMAGE = jnp.linspace(-0.5, 1.5, 2 * 6 * 5 * 4).reshape(2, 6, 5, 4)[:, ::-1]
LAYOUT = ("NHWC", "HWIO", "NHWC")


def spikes(x):
    return nadaptor.lsq(x, 0.5, levels=2)


def trains(f, x, **options):
    rec = nadaptor.record(f, x, num_steps=T, **options)
    return {name: np.abs(np.asarray(layer.spikes)) for name, layer in rec.items()}


def convolution_by_hand(size, stride, low, dilation, kernel, channels, out, groups):
    """Fan-out [H, W, C] of a convolution: for each output and tap, the input that it reads."""
    (height, width), taps = size, range(kernel)
    fan = np.zeros((height, width, channels), int)
    rows, columns = out[0], out[1]
    for y, x, dy, dx in itertools.product(range(rows), range(columns), taps, taps):
        row, column = y * stride + dy * dilation - low, x * stride + dx * dilation - low
        if 0 <= row < height and 0 <= column < width:
            fan[row, column] += out[2] // groups
    return fan


@pytest.mark.parametrize(
    ("stride", "low", "dilation", "groups"),
    [(1, 0, 1, 1), (2, 1, 1, 1), (2, 2, 2, 2), (1, 2, 1, 4), (1, 1, 2, 2)],
)
def test_synops_of_a_convolution_are_those_by_hand(stride, low, dilation, groups):
    kernel = jnp.zeros((3, 3, 4 // groups, 8))

    def f(x):
        return jax.lax.conv_general_dilated(
            spikes(x),
            kernel,
            (stride, stride),
            [(low, low)] * 2,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=LAYOUT,
            feature_group_count=groups,
        )

    out = jax.eval_shape(f, IMAGE).shape[1:]
    fan = convolution_by_hand((6, 5), stride, low, dilation, 3, 4, out, groups)
    found = nadaptor.energy(f, IMAGE, num_steps=T)
    z = trains(f, IMAGE)["layer0"]
    wanted = [sum(int((step * fan).sum()) for step in z[: t + 1]) for t in range(T)]
    assert found.total.synops.tolist() == wanted and wanted[-1] > 0
    assert found.layers["output"].synops.tolist() == wanted
    assert found.total.ann_macs == 2 * fan.sum()
    assert found.total.analog_macs == 0


@pytest.mark.parametrize("same", [jnp.pad, lambda x, p: jnp.concatenate([x, x[:, :0]], 1)])
def test_padding_of_its_own_sends_no_spikes(same):
    w = jnp.ones((3, 3, 4, 2))

    def f(x):
        padded = same(spikes(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
        return jax.lax.conv_general_dilated(padded, w, (1, 1), "VALID", dimension_numbers=LAYOUT)

    out = jax.eval_shape(f, IMAGE).shape[1:]
    fan = convolution_by_hand((6, 5), 1, 1 if same is jnp.pad else 0, 1, 3, 4, out, 1)
    found = nadaptor.energy(f, IMAGE, num_steps=T)
    assert found.total.synops[-1] == (trains(f, IMAGE)["layer0"].sum(0) * fan).sum() > 0
    assert found.total.ann_macs == 2 * fan.sum()


def test_our_convolution_and_the_analog_layer_are_counted_by_position():
    w = jnp.full((3, 3, 4, 32), 0.125)
    v = jnp.full((3, 3, 32, 32), 0.01)

    def conv(x, w):
        return nadaptor.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)

    def f(x):
        return conv(spikes(conv(x, w) + 0.1), v)

    found = nadaptor.energy(f, IMAGE, num_steps=T)
    first = convolution_by_hand((6, 5), 1, 1, 1, 3, 4, (6, 5, 32), 1)
    second = convolution_by_hand((6, 5), 1, 1, 1, 3, 32, (6, 5, 32), 1)
    assert found.layers["layer0"].analog_macs == found.layers["layer0"].ann_macs == 2 * first.sum()
    assert found.layers["layer0"].synops.tolist() == [0] * T
    z = trains(f, IMAGE)["layer0"].sum((1,))
    assert found.layers["output"].synops.tolist() == [
        (z[: t + 1].sum(0) * second).sum() for t in range(T)
    ]
    assert found.total.ann_macs == 2 * (first.sum() + second.sum())


def test_a_spike_takes_the_pool_and_every_path_behind_it():
    w = jnp.zeros((4, 3))

    def f(x):
        z = spikes(x)
        pooled = jax.lax.reduce_window(z, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return (pooled / 4).mean((1, 2)) @ w

    found = nadaptor.energy(f, IMAGE, num_steps=T)
    # Columns 0 to 3 of 5 are in a window: 1 addition there, 1 in the mean, 3 in the product.
    inside = trains(f, IMAGE)["layer0"][:, :, :, :4].sum((1, 2, 3, 4))
    assert found.total.synops.tolist() == (np.cumsum(inside) * 5).tolist()
    assert found.total.ann_macs == 2 * (6 * 4 * 4 + 3 * 2 * 4 + 4 * 3)


@pytest.mark.parametrize("options", [{}, dict(neuron=nadaptor.StBif(), coding="sum")])
def test_a_residual_is_a_path_without_synapses(options):
    x = jnp.linspace(-0.5, 1.0, 12).reshape(3, 4)
    w, u = jnp.zeros((4, 4)), jnp.eye(4, 7)

    def f(x):
        a = spikes(x)
        b = spikes(a @ w + a * 0.5 + 0.25)
        return (b - a) @ u

    found = nadaptor.energy(f, x, num_steps=T, **options)
    first, second = (z.sum((1, 2)) for z in trains(f, x, **options).values())
    assert found.layers["layer1"].synops.tolist() == np.cumsum(first * 4).tolist()
    assert found.layers["output"].synops.tolist() == np.cumsum((first + second) * 7).tolist()
    assert found.total.ann_macs == 3 * (16 + 28)
    assert [n.tolist() for n in found.spikes.values()] == [
        np.cumsum(first).tolist(),
        np.cumsum(second).tolist(),
    ]


def test_energy_is_that_of_the_table_at_every_t_and_adds_up_over_layers():
    x, w = jnp.linspace(-0.5, 1.5, 12).reshape(3, 4), jnp.eye(4)

    def f(variables, x):
        return spikes(x @ variables["w"]) @ variables["w"][:, :2]

    found = nadaptor.energy(f, {"w": w}, x, num_steps=T)
    t = np.arange(1, T + 1)
    spent = 0.9 * found.total.synops
    assert found.total.analog_macs == 48 and found.total.ann_macs == 48 + 24
    np.testing.assert_allclose(found.total.energy, spent + 4.6 * 48)
    np.testing.assert_allclose(found.total.energy_every_step, spent + 4.6 * 48 * t)
    np.testing.assert_allclose(found.total.ann_energy, 4.6 * 72)
    for name in ("synops", "energy", "energy_every_step", "ann_energy", "ann_macs"):
        parts = [getattr(layer, name) for layer in found.layers.values()]
        np.testing.assert_allclose(np.sum(parts, 0), getattr(found.total, name))
    other = nadaptor.energy(f, {"w": w}, x, num_steps=T, table=EnergyTable(mac=2.0, ac=1.0))
    np.testing.assert_allclose(other.total.energy, found.total.synops + 96)


def test_products_of_running_means_cost_macs_at_every_step():
    x, w = jnp.linspace(-0.5, 1.0, 12).reshape(3, 4), jnp.eye(4, 5)

    def f(x):
        return spikes(jnp.tanh(spikes(x)) @ w) @ w.T

    found = nadaptor.energy(f, x, num_steps=T, nonaffine="running_mean")
    middle = found.layers["layer1"]
    assert (middle.mean_macs, middle.ann_macs, middle.synops[-1]) == (60, 60, 0)
    np.testing.assert_allclose(middle.energy, 4.6 * 60 * np.arange(1, T + 1))
    assert found.layers["output"].synops[-1] == found.spikes["layer1"][-1] * 4


def test_what_cannot_be_counted_is_refused_by_name():
    x = jnp.linspace(-0.5, 1.0, 12).reshape(3, 4)
    with pytest.raises(ValueError, match=r"cumsum at .*test_operations.py.*known number"):
        nadaptor.energy(lambda x: jnp.cumsum(spikes(x), 1) @ jnp.eye(4), x, num_steps=T)
    with pytest.raises(ValueError, match="data_argnum=1, but there are 1 arguments"):
        nadaptor.energy(spikes, x, num_steps=T, data_argnum=1)


def test_spikes_that_are_masked_moved_or_looked_at_are_counted_where_they_arrive():
    x, w = jnp.linspace(-0.5, 1.5, 12).reshape(3, 4), jnp.eye(4, 5)
    mask = jnp.array([True, False, True, True])

    def f(x):
        z = jnp.where(mask, spikes(x), 0.0)
        jax.debug.callback(lambda z: None, z)
        return jnp.take(z, jnp.array([3, 3, 1, 0]), 1) @ w

    found = nadaptor.energy(f, x, num_steps=T)
    sent = trains(f, x)["layer0"].sum((0, 1))
    assert found.total.synops[-1] == (2 * sent[3] + sent[0]) * 5 > 0


def test_what_depends_on_weights_alone_is_no_layer():
    x, w = jnp.linspace(-0.5, 1.5, 12).reshape(3, 4), jnp.eye(4, 5)

    def f(x, w):
        return spikes(x @ (w @ w.T)) @ w

    other = nadaptor.energy(f, x, w, num_steps=T, data_argnum=0)
    assert other.total.analog_macs == 3 * 4 * 4


SIGNAL = jnp.linspace(-0.5, 1.5, 2 * 7 * 3).reshape(2, 7, 3)[:, ::-1]
WEIGHTS = jax.random.normal(jax.random.key(0), (3, 3, 4)) + 4  # [width, in, out], none is 0


def along(x, **options):
    return jax.lax.conv_general_dilated(
        x, WEIGHTS, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **options
    )


@pytest.mark.parametrize(
    "after",
    [
        along,
        lambda x: along(x, rhs_dilation=(2,)),
        lambda x: jax.lax.conv_transpose(x, WEIGHTS, (2,), "SAME"),
        lambda x: jnp.einsum("btc,ck->bkt", x, WEIGHTS[0]),
        lambda x: jnp.einsum("btc,btk->bck", x, jnp.ones((2, 7, 2))),
        lambda x: x.sum(1),
        lambda x: x.mean((1, 2)),
        lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 1), (1, 2, 1), "SAME"),
    ],
    ids=["conv", "dilated", "transposed", "dot", "batched_dot", "sum", "mean", "window"],
)
def test_synapses_of_an_operation_are_the_entries_of_its_jacobian(after):
    fan = np.asarray(jax.jacobian(after)(SIGNAL) != 0)
    fan = fan.reshape(-1, *SIGNAL.shape).sum(0)
    found = nadaptor.energy(lambda x: after(spikes(x)), SIGNAL, num_steps=T)
    z = trains(spikes, SIGNAL)["layer0"]
    assert found.total.synops.tolist() == np.cumsum((z * fan).sum((1, 2, 3))).tolist()
    assert found.total.ann_macs == fan.sum()


def test_an_operation_of_no_known_synapses_is_refused_by_name():
    with pytest.raises(ValueError, match=r"cumsum at .* has no known number of synapses; write"):
        nadaptor.energy(lambda x: jnp.cumsum(spikes(x), 1), SIGNAL, num_steps=T)
