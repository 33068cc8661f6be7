import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nadaptor.configs.build import build_optimizer
from nadaptor.configs.config import replace
from nadaptor.models import NoiseAdaptor, batch_norm
from nadaptor.parallel import (
    AXIS,
    check_batch,
    choose_devices,
    place_step,
    start_processes,
)
from nadaptor.training import get_config
from nadaptor.training.options import DEFAULT
from nadaptor.training.run import open_run
from nadaptor.training.state import init_state
from nadaptor.training.step import train_step

PLAIN = get_config("digits_na").step
BATCH, STEPS = 16, 3
IMAGES = np.random.default_rng(0).normal(size=(STEPS, BATCH, 4, 4, 2)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, (STEPS, BATCH)).astype(np.int32)


class Net(nn.Module):
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = batch_norm(use_running_average=not train, axis_name=self.axis_name)(x)
        x = NoiseAdaptor(2, axis_name=self.axis_name)(x)
        return nn.Dense(3)(x.mean((1, 2)))


@functools.cache
def trained(num_devices, parallel="pmap", recipe=PLAIN, steps=STEPS):
    """The state and losses after a few steps on so many devices."""
    devices = choose_devices(num_devices)
    optimizer = build_optimizer(get_config("digits_na"), STEPS)
    state = init_state(
        Net(None), optimizer, IMAGES[0], jax.random.key(0), averaged=recipe.ema_decay > 0
    )
    model = Net(devices.axis_name)
    step = functools.partial(
        train_step, model, optimizer, config=recipe, axis_name=devices.axis_name
    )
    placed = place_step(step, devices, parallel)
    state, key, losses = placed.replicate(state), placed.replicate(jax.random.key(1)), []
    for images, labels in zip(IMAGES[:steps], LABELS[:steps], strict=True):
        state, metrics = placed.step(state, placed.put(images), placed.put(labels), key)
        losses.append(float(metrics.loss))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def one():
    return trained(1)


@pytest.mark.parametrize(("count", "parallel"), [(8, "pmap"), (8, "shard_map"), (2, "pmap")])
def test_many_devices_train_as_one(one, count, parallel):
    state, losses = trained(count, parallel)
    assert losses == pytest.approx(one[1], rel=1e-5)
    chex.assert_trees_all_close(state, one[0], rtol=1e-4, atol=1e-6)


def test_pmap_and_shard_map_do_the_same_to_the_bit():
    chex.assert_trees_all_equal(trained(4, "pmap"), trained(4, "shard_map"))


def test_the_state_has_no_axis_of_devices(one):
    chex.assert_trees_all_equal_shapes(trained(4)[0], one[0])


def test_micro_batches_do_not_depend_on_the_devices():
    recipe = dataclasses.replace(PLAIN, micro_batches=2)
    (one, losses), (many, of_many) = trained(1, recipe=recipe), trained(4, recipe=recipe)
    assert losses == pytest.approx(of_many, rel=1e-5)
    chex.assert_trees_all_close(one, many, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [0.25, 0.9])
def test_the_average_keeps_its_share_in_each_step_and_leaves_the_parameters_alone(decay):
    recipe = dataclasses.replace(PLAIN, ema_decay=decay)
    states = [trained(1, recipe=recipe, steps=count)[0] for count in range(STEPS + 1)]
    average = states[0].params
    for state in states:
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, state.params)
        chex.assert_trees_all_close(state.average, average, rtol=1e-5, atol=1e-6)
        assert state.variables["params"] is state.average
    chex.assert_trees_all_equal(states[-1].params, trained(1)[0].params)


def first_loss(smoothing, labels=LABELS[0]):
    optimizer = build_optimizer(get_config("digits_na"), STEPS)
    state = init_state(Net(None), optimizer, IMAGES[0], jax.random.key(0))
    step = functools.partial(
        train_step,
        Net(None),
        optimizer,
        config=dataclasses.replace(PLAIN, label_smoothing=smoothing),
    )
    _, metrics = jax.jit(step)(state, IMAGES[0], labels, jax.random.key(1))
    return float(metrics.loss)


def test_smoothing_mixes_the_loss_with_that_of_targets_without_a_label():
    """loss(a) = (1 - a) * loss(0) + a * loss(1), and loss(1) asks for no label."""
    plain, uniform = first_loss(0.0), first_loss(1.0)
    assert first_loss(0.25) == pytest.approx(0.75 * plain + 0.25 * uniform, rel=1e-5)
    assert abs(plain - uniform) > 1e-2
    assert first_loss(1.0, (LABELS[0] + 1) % 3) == pytest.approx(uniform, rel=1e-6)
    assert first_loss(0.0, (LABELS[0] + 1) % 3) != pytest.approx(plain, rel=1e-2)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(tiny):
    devices = choose_devices(8)
    with pytest.raises(ValueError, match=r"20 does not divide by 8 devices times 1 .*; 16 does"):
        check_batch(20, 1, devices)
    bad = replace(tiny, batch_size=20)
    with pytest.raises(ValueError, match="20 does not divide"):
        open_run(bad, dataclasses.replace(DEFAULT, num_devices=8))


def test_devices_that_are_not_there_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="--xla_force_host_platform_device_count=99"):
        choose_devices(99)


@pytest.mark.parametrize(("images", "count"), [(64, 8), (12, 6), (9, 3), (11, 1), (1, 1), (7, 7)])
def test_auto_is_the_largest_number_of_cpus_that_divides_the_images(images, count):
    assert choose_devices("auto", images).total == count
    assert choose_devices(None, images).total == 1


def test_a_run_keeps_the_cpus_that_it_began_on_where_they_are_there_and_none_are_asked_for():
    assert choose_devices("auto", 16, before=2).total == 2
    assert choose_devices(None, 16, before=2).total == 2
    assert choose_devices(1, 16, before=2).total == 1
    assert choose_devices("auto", 16, before=3).total == 8
    assert choose_devices("auto", 99, before=99).total == 3


def test_a_cpu_device_that_would_have_few_pixels_is_left_out():
    """Of its own accord alone, and not where a run has begun with it."""
    count = {pixels: choose_devices("auto", 64, pixels=pixels).total for pixels in (1, 8191, 8192)}
    assert count == {1: 1, 8191: 1, 8192: 2}
    assert choose_devices("auto", 62, pixels=10**9).total == 2
    assert choose_devices("auto", 64, before=8, pixels=1).total == 8
    assert choose_devices(2, 64, pixels=1).total == 2


def test_devices_are_said_in_words():
    assert [str(choose_devices(n)) for n in (1, 2)] == ["1 CPU device", "2 CPU devices"]


def test_a_process_alone_needs_no_others_and_half_an_address_is_refused():
    assert start_processes(None, None, None) is None
    with pytest.raises(ValueError, match="go together"):
        start_processes("localhost:1", 2, None)


def test_only_a_known_way_to_spread_is_accepted():
    with pytest.raises(ValueError, match="'pmap' or 'shard_map', not 'pjit'"):
        place_step(lambda *x: x, choose_devices(2), "pjit")
    assert choose_devices(2).axis_name == AXIS
    assert choose_devices(1).axis_name is None
    assert jnp.ones(1).devices().pop() in choose_devices(8).local
