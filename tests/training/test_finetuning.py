"""Fine-tuning in time: gradients through spikes, and a network that is better for it."""

import dataclasses
import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nadaptor.checkpoints.checkpoint import load_card, save_checkpoint
from nadaptor.cli import finetune
from nadaptor.data.loader import batches, load_images
from nadaptor.data.registry import open_source, open_split
from nadaptor.errors import RunError
from nadaptor.parallel import choose_devices, place_step
from nadaptor.training import load_snn
from nadaptor.training.finetuning import _update, digits_na_finetuned, fine_tune, time_loss

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def snn(runs):
    return runs / "digits_na" / "snn"


@pytest.fixture(scope="module")
def untaught(snn, tmp_path_factory):
    """The network with zeros for its last layer's weights: to it all classes are alike."""
    out = tmp_path_factory.mktemp("untaught") / "snn"
    params = load_snn(snn)[1]["params"]
    params["fc"] = jax.tree.map(np.zeros_like, params["fc"])
    save_checkpoint(out, "snn", {"params": params}, load_card(snn, "snn"))
    return out


@pytest.fixture(scope="module")
def tuned(untaught, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "snn"
    return out, fine_tune(untaught, out, dataclasses.replace(digits_na_finetuned(), epochs=2))


def test_every_parameter_has_a_gradient_through_the_spikes(snn):
    model, variables, _ = load_snn(snn)
    images, labels = (x[:32] for x in load_images(open_source("digits", "train", 150)))
    loss = jax.jit(jax.grad(lambda p: time_loss(model, p, images, labels, 2)))
    grads = loss(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf), path


def test_fine_tuning_lowers_the_loss_and_keeps_what_the_network_is(tuned, untaught):
    out, losses = tuned
    assert losses[-1] < losses[0]
    images, labels = (x[:256] for x in load_images(open_source("digits", "train", 150)))
    measured = []
    for folder in (untaught, out):
        model, variables, config = load_snn(folder)
        loss = time_loss(model, variables["params"], images, labels, 2)
        measured.append((config, float(loss)))
    assert measured[0][1] == pytest.approx(np.log(10))
    assert measured[1][1] < 0.7 * measured[0][1]
    assert measured[1][0] == measured[0][0]


def test_two_devices_fine_tune_as_one(snn):
    """Equal to the rounding of sums: each device has half of the batch."""
    model, variables, config = load_snn(snn)
    source = open_split(config.data, "train")
    batch = next(batches(source, "none", 0, 8, stop_step=1))
    optimizer = optax.sgd(0.1)
    ended = []
    for count in (1, 2):
        devices = choose_devices(count)
        update = functools.partial(_update, model, optimizer, 2, source.spec, devices.axis_name)
        placed = place_step(update, devices, "pmap", (False, True, True))
        params = jax.tree.map(jnp.array, variables["params"])
        state = placed.replicate((params, optimizer.init(params)))
        state, loss = placed.step(state, placed.put(batch.images), placed.put(batch.labels))
        ended.append(jax.device_get((state[0], loss)))
    chex.assert_trees_all_close(*ended, rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(snn, tmp_path):
    with pytest.raises(ValueError, match="64 does not divide by 3 devices"):
        fine_tune(snn, tmp_path / "snn", digits_na_finetuned(), num_devices=3)


def test_a_loss_that_is_not_finite_writes_nothing(snn, tmp_path):
    wild = dataclasses.replace(digits_na_finetuned(), learning_rate=1e30, epochs=1)
    with pytest.raises(RunError, match="lower the learning rate"):
        fine_tune(snn, tmp_path / "snn", wild)
    assert not (tmp_path / "snn").exists()


def test_an_existing_folder_and_bad_counts_are_refused(snn, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        fine_tune(snn, tmp_path, digits_na_finetuned())
    bad = dataclasses.replace(digits_na_finetuned(), num_steps=0)
    with pytest.raises(ValueError, match="num_steps"):
        fine_tune(snn, tmp_path / "snn", bad)


def test_the_command_asks_for_what_it_was_given_and_writes_beside_the_checkpoint(monkeypatch):
    asked = []
    monkeypatch.setattr(finetune, "fine_tune", lambda *given: asked.append(given))
    finetune.main(["runs/x/snn", "--epochs", "7", "--num-steps", "3", "--num-devices", "1"])
    finetune.main(["runs/x/snn", "--data-dir", "d", "--out", "o", "--num-devices", "1"])
    default, place = digits_na_finetuned(), Path("runs/x")
    changed = dataclasses.replace(default, epochs=7, num_steps=3)
    assert asked == [
        (place / "snn", place / "snn-finetuned", changed, None, 1),
        (place / "snn", Path("o"), default, Path("d"), 1),
    ]
