"""The data set on the devices against batches from the host."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor.checkpoints.checkpoint import load_card
from nadaptor.configs.config import replace
from nadaptor.data.augmentation import augment_batch
from nadaptor.data.loader import step_indices
from nadaptor.data.source import PHOTOGRAPHS, Spec
from nadaptor.training import train
from nadaptor.training.feed import open_feed, resident_steps
from nadaptor.training.options import DEFAULT
from nadaptor.training.run import first_state, open_run

RESIDENT = dataclasses.replace(DEFAULT, resident=True)


@pytest.fixture(scope="module")
def small(tiny):
    """A run of two epochs of four steps, from random weights."""
    sizes = {"train_size": 64, "batch_size": 16, "epochs": 2, "learning_rate": 0.01}
    return replace(tiny, name="small", parent=None, **sizes)


def trained(config, options):
    """The state after all steps, and their losses."""
    run = open_run(config, options)
    with open_feed(run, 0) as feed:
        state, losses = feed.replicate(first_state(run, None)), []
        for span in feed.spans:
            state, metrics = feed.advance(state, span)
            losses += np.atleast_1d(metrics.loss)[: len(span)].tolist()
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def streamed(small):
    return trained(small, DEFAULT)


@pytest.mark.parametrize(("count", "parallel"), [(1, "pmap"), (4, "pmap"), (4, "shard_map")])
def test_both_ways_train_the_same_network(small, streamed, count, parallel):
    options = dataclasses.replace(RESIDENT, num_devices=count, snapshot_steps=3)
    state, losses = trained(replace(small, parallel=parallel), options)
    assert losses == pytest.approx(streamed[1], rel=1e-3)
    assert state.step == 8
    # A value at a rounding edge may fall on the other side of it, so that single entries differ.
    for a, b in zip(*map(jax.tree.leaves, (state.params, streamed[0].params)), strict=True):
        assert np.mean(np.abs(a - b) > 1e-3) < 0.01


def test_images_that_lie_on_the_device_make_the_same_batches():
    spec = Spec(4, (8, 8, 3), *PHOTOGRAPHS)
    stored = np.random.default_rng(1).integers(0, 256, (22, 8, 8, 3), np.uint8)
    labels = np.arange(22, dtype=np.int32) % 4

    def step(state, images, labels, key):
        prepared = augment_batch(jax.random.fold_in(key, state), images, spec, "autoaugment")
        return state + 1, (prepared, labels)

    key, chosen = jax.random.key(5), step_indices(22, 0, range(4), 8)
    loop = jax.jit(resident_steps, static_argnums=0)
    found = loop(step, jnp.int32(0), chosen.T, stored, labels, 3, key)
    fed = [jax.jit(step)(i, stored[chosen[i]], labels[chosen[i]], key)[1] for i in range(3)]
    fed.append(jax.tree.map(jnp.zeros_like, fed[0]))
    chex.assert_trees_all_equal(found, (3, jax.tree.map(lambda *x: jnp.stack(x), *fed)))


def test_a_run_that_resumes_inside_an_epoch_ends_as_the_one_that_does_not(small, tmp_path):
    options = dataclasses.replace(RESIDENT, snapshot_steps=3, keep=9)
    whole = train(small, tmp_path / "whole", options)
    rows = [json.loads(x) for x in (whole.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    cut = tmp_path / "cut" / "small" / "snapshots"
    shutil.copytree(whole.parent / "snapshots", cut)
    assert sorted(int(p.name) for p in cut.iterdir()) == [3, 4, 6, 8]
    for step in ("4", "6", "8"):
        shutil.rmtree(cut / step)
    again = train(small, tmp_path / "cut", options)
    of_whole, of_again = (load_card(folder, "ann") for folder in (whole, again))
    assert of_again["digests"] == of_whole["digests"]
    assert of_again["metrics"]["loss"] == of_whole["metrics"]["loss"]


def test_images_that_the_host_must_crop_are_refused(small):
    cropped = replace(small, augmentation="random_resized_crop")
    with pytest.raises(ValueError, match=r"random_resized_crop is done on the host; leave --res"):
        open_run(cropped, RESIDENT)
    assert not open_run(cropped, DEFAULT).resident
