import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor.configs.build import build_model, build_optimizer
from nadaptor.configs.config import replace
from nadaptor.configs.named import get_config
from nadaptor.data.loader import load_images
from nadaptor.data.registry import batch_indices, open_source
from nadaptor.data.source import Split
from nadaptor.models import SCALE_FLOOR, NoiseAdaptor, create, is_scale
from nadaptor.training.state import init_state
from nadaptor.training.step import train_step

BATCH = 8


@pytest.fixture(scope="module")
def batch():
    images, labels = load_images(open_source("digits", "train", 150))
    chosen = batch_indices(len(labels), 0, 0, BATCH)
    return Split(images[chosen], labels[chosen])


def small(name, **changes):
    return replace(get_config(name), model="digits_resnet8", **changes)


def start(config, batch, axis_name=None):
    model, optimizer = build_model(config, axis_name), build_optimizer(config, 10)
    # The start is measured on the whole batch, outside any map.
    state = init_state(build_model(config), optimizer, batch.images, jax.random.key(0))
    step = functools.partial(train_step, model, optimizer, config=config.step, axis_name=axis_name)
    return step, state


@pytest.fixture(scope="module")
def started(batch):
    """The jitted step and the state before it of a config by name, each compiled once."""

    @functools.cache
    def make(name):
        step, state = start(small(name), batch)
        return jax.jit(step), state

    return make


def test_a_step_is_a_pure_function(batch, started):
    step, state = started("digits_na")
    copy = jax.tree.map(np.array, state)
    key = jax.random.key(1)
    chex.assert_trees_all_equal(step(state, *batch, key), step(state, *batch, key))
    chex.assert_trees_all_equal(state, copy)


def test_only_the_noise_adaptor_depends_on_the_key_and_on_the_step(batch, started):
    for name, depends in (("digits_lsq", False), ("digits_na", True)):
        step, state = started(name)
        later = state._replace(step=state.step + 1)
        loss = step(state, *batch, jax.random.key(1))[1].loss
        assert (step(state, *batch, jax.random.key(2))[1].loss != loss) == depends
        assert (step(later, *batch, jax.random.key(1))[1].loss != loss) == depends


def test_a_network_without_batch_norm_learns_a_batch_with_the_noise_on(batch):
    config = get_config("digits_na")
    noisy = functools.partial(NoiseAdaptor, levels=2)
    model = create("cifar_vit", 10, width=12, depth=1, activation=noisy)
    optimizer = build_optimizer(config, 10)
    state = init_state(model, optimizer, batch.images, jax.random.key(0))
    assert state.batch_stats == {}
    step = jax.jit(functools.partial(train_step, model, optimizer, config=config.step))
    losses = []
    for _ in range(5):
        state, metrics = step(state, *batch, jax.random.key(1))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]


def test_the_optimizer_is_sgd_with_momentum_decay_of_everything_and_a_cosine():
    rate, decay, momentum, total = 0.1, 0.01, 0.9, 4
    config = small("digits_na", learning_rate=rate, weight_decay=decay, momentum=momentum)
    optimizer = build_optimizer(config, total)
    w, g, trace = 2.0, 0.5, 0.0
    params = {"act1": {"quant_scale": jnp.array(w)}}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i in range(total):
        trace = g + decay * w + momentum * trace
        w -= rate * 0.5 * (1 + np.cos(np.pi * i / total)) * trace
        grads = {"act1": {"quant_scale": jnp.array(g)}}
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        chex.assert_trees_all_close(params["act1"]["quant_scale"], w, rtol=1e-6)


def test_the_rate_rises_along_a_line_in_a_warm_up_and_then_follows_the_cosine():
    optimizer = build_optimizer(small("digits_na", warmup_steps=2, momentum=0, weight_decay=0), 6)
    state, update, rates = optimizer.init(jnp.array(0.0)), jax.jit(optimizer.update), []
    for _ in range(6):
        moved, state = update(jnp.array(-1.0), state, jnp.array(0.0))
        rates.append(float(moved))
    cosine = 0.1 * 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4))
    np.testing.assert_allclose(rates, [0, 0.05, *cosine], atol=1e-7)


def test_scales_stay_positive_whatever_the_update(batch):
    step, state = start(small("digits_na", learning_rate=1e4), batch)
    params = jax.jit(step)(state, *batch, jax.random.key(0))[0].params
    scales = [x for path, x in jax.tree_util.tree_leaves_with_path(params) if is_scale(path)]
    assert len(scales) == 7
    assert min(scales) == np.float32(SCALE_FLOOR)


@pytest.mark.parametrize("name", ["digits_relu", "digits_lsq", "digits_na"])
def test_a_batch_split_over_an_axis_trains_as_one(batch, started, name):
    one, state = started(name)
    split, _ = start(small(name), batch, axis_name="batch")
    shards = [x.reshape(2, BATCH // 2, *x.shape[1:]) for x in batch]
    key = jax.random.key(3)
    mapped = jax.vmap(split, in_axes=(None, 0, 0, None), axis_name="batch")
    # As NumPy's, of which nothing is compiled for each shape.
    together = jax.device_get(jax.jit(mapped)(state, *shards, key))
    first, second = (jax.tree.map(lambda x, i=i: x[i], together) for i in range(2))
    chex.assert_trees_all_close(first, second)
    whole = jax.device_get(one(state, *batch, key))
    chex.assert_trees_all_close(first[1], whole[1], rtol=1e-5)
    # A value at a rounding edge may fall on the other side of it, so that single entries differ.
    for a, b in zip(*map(jax.tree.leaves, (first[0].params, whole[0].params)), strict=True):
        assert np.mean(np.abs(a - b) > 1e-3) < 0.01


def test_a_network_is_built_once_for_all_seeds():
    a, b = (small("digits_na", seed=seed) for seed in (0, 1))
    assert build_model(a) is build_model(b)
    assert build_optimizer(a, 5) is build_optimizer(b, 5)
    assert build_model(a) is not build_model(a, folded=True)


def test_the_start_keeps_pretrained_weights_and_adds_scales_alone(batch, started):
    _, pretrained = started("digits_relu")
    config = small("digits_na")
    model, optimizer = build_model(config), build_optimizer(config, 10)
    state = init_state(model, optimizer, batch.images, jax.random.key(5), pretrained.variables)
    chex.assert_trees_all_equal(state.batch_stats, pretrained.batch_stats)
    paths = dict(jax.tree_util.tree_leaves_with_path(state.params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(pretrained.params):
        chex.assert_trees_all_equal(paths.pop(path), leaf)
    assert all(map(is_scale, paths))
    assert len(paths) == 7


def test_a_start_from_other_weights_is_refused(batch, started):
    _, pretrained = started("digits_relu")
    config = replace(small("digits_na"), model="digits_resnet20")
    model, optimizer = build_model(config), build_optimizer(config, 10)
    with pytest.raises(ValueError, match="variables lack more than scales"):
        init_state(model, optimizer, batch.images, jax.random.key(0), pretrained.variables)
