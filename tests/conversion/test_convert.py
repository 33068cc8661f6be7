import functools
import json

import chex
import jax
import numpy as np
import pytest

import nadaptor
from nadaptor.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from nadaptor.cli import export
from nadaptor.configs.inference import RATES, Spikes
from nadaptor.conversion import convert as conversion
from nadaptor.conversion import identities
from nadaptor.conversion.convert import load_spikes
from nadaptor.conversion.identities import Check, check_conversion
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_source
from nadaptor.models import Lsq, create, fold_batch_norm, is_scale
from nadaptor.training import RunError, convert, load_snn


def network(levels):
    """A network with random weights, folded and not, and a batch."""
    images = load_images(open_source("digits", "validation", 150)).images[:16]
    activation = functools.partial(Lsq, levels=levels)
    model, folded = (
        create("digits_resnet8", 10, activation=activation, **norm) for norm in ({}, {"norm": None})
    )
    variables = jax.jit(model.init)(jax.random.key(levels), images)
    # Moments of the data, as after training: with those of the start, deep layers are silent.
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    for _ in range(20):
        variables = {**variables, **train(variables, images)[1]}
    return model, variables, folded, fold_batch_norm(variables), levels, images


@pytest.mark.parametrize("levels", [1, 3])
def test_the_identities_hold_for_random_weights(levels):
    checks = check_conversion(*network(levels))
    assert len(checks) == 6
    assert all(check.holds for check in checks), "\n".join(map(str, checks))


def test_every_kind_of_mistake_fails_a_check():
    model, variables, folded, good, levels, images = network(2)
    wrong_fold = fold_batch_norm(variables, epsilon=0.1)
    wrong_scale = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (1.5 if "quant_scale" in str(path) else 1), good
    )
    for name, bad, p in (
        ("folding, largest", wrong_fold, levels),
        ("folding, largest", wrong_scale, levels),
        ("T = 1", good, levels + 1),
    ):
        checks = check_conversion(model, variables, folded, bad, p, images)
        failed = [check.name for check in checks if not check.holds]
        assert any(name in check for check in failed), (name, failed)


def pooled(levels):
    """A network with a max-pool between its layers, folded and not, and a batch."""
    images = jax.random.normal(jax.random.key(0), (16, 16, 16, 3))
    sizes = {"stage_sizes": (1,), "width": 4, "pool": "max"}
    activation = functools.partial(Lsq, levels=levels)
    model, folded = (
        create("resnet18", 3, activation=activation, **sizes, **norm)
        for norm in ({}, {"norm": None})
    )
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(1), images)
    return model, variables, folded, fold_batch_norm(variables), levels, images


@pytest.mark.parametrize("spikes", [Spikes(nonaffine="running_mean"), Spikes("sum")])
def test_the_identities_hold_with_a_kept_pool_on_means_and_in_sums(spikes):
    checks = check_conversion(*pooled(3), spikes)
    assert len(checks) == 6
    assert all(check.holds for check in checks), "\n".join(map(str, checks))
    with pytest.raises(ValueError, match=r"max_pool.*nonaffine='running_mean'.*coding='sum'"):
        check_conversion(*pooled(3))


def test_sums_that_do_not_fall_silent_fail_a_check(monkeypatch):
    monkeypatch.setattr(identities, "LONGEST", 1)  # 8 steps are run, as many as one layer needs
    checks = check_conversion(*pooled(9), Spikes("sum"))
    assert "last step with a spike, of 8" in [check.name for check in checks if not check.holds]


def test_a_card_says_how_spikes_carry_numbers_and_an_old_one_that_they_are_rates(tmp_path):
    arrays, config = {"w": np.zeros(1)}, {"config": {}}
    for name, said in (("old", {}), ("new", {"coding": "sum"}), ("odd", {"coding": "phase"})):
        save_checkpoint(tmp_path / name, "snn", arrays, {**config, **said})
    assert load_spikes(tmp_path / "old") == RATES
    assert load_spikes(tmp_path / "new") == Spikes("sum")
    with pytest.raises(ValueError, match=r"odd is damaged: it says .*phase"):
        load_spikes(tmp_path / "odd")


def test_another_coding_takes_the_place_of_the_card_s_and_refuses_what_is_not_affine():
    kept = Spikes("rate", "running_mean")
    assert kept.override(None) == kept.override("rate") == kept
    assert kept.override("sum") == Spikes("sum", "refuse")


@pytest.mark.parametrize(("asked", "coding"), [((), "sum"), (("--coding", "rate"), "rate")])
def test_an_export_has_the_coding_of_the_card_or_the_one_asked_for(
    tmp_path, monkeypatch, asked, coding
):
    save_checkpoint(tmp_path / "snn", "snn", {"w": np.zeros(1)}, {"config": {}, "coding": "sum"})
    exported = []
    monkeypatch.setattr(export, "export_checkpoint", lambda *a: exported.append(a[4]))
    export.main([str(tmp_path / "snn"), *asked])
    assert exported[0].coding == coding


def test_a_check_that_is_not_a_number_does_not_hold():
    assert not Check("x", float("nan"), 1.0).holds
    assert "FAILED" in str(Check("x", float("nan"), 1.0))
    assert Check("x", 1.0, 1.0).holds


def test_the_card_says_what_the_spiking_network_is(runs):
    card = json.loads((runs / "digits_na" / "snn" / "card.json").read_text())
    source = json.loads((runs / "digits_na" / "checkpoint" / "card.json").read_text())
    variables, _ = load_checkpoint(runs / "digits_na" / "checkpoint", "ann")
    scale = variables["params"]["layer1_0"]["act1"]["quant_scale"]
    assert card["thresholds"]["layer1_0/act1"] == pytest.approx(2 * float(scale))
    assert len(card["thresholds"]) == 7
    assert (card["model"], card["levels"]) == ("digits_resnet8", 2)
    assert card["source"] == source["card_digest"]
    assert card["config"] == source["config"]
    assert card["data"] == source["data"]
    assert [check["holds"] for check in card["checks"]] == [True] * 6


def test_the_loaded_network_simulates_and_is_the_quantized_network_at_one_step(runs):
    model, variables, config = load_snn(runs / "digits_na" / "snn")
    assert config.name == "digits_na"
    images = load_images(open_source("digits", "validation", 150)).images[:4]
    layers = nadaptor.spiking(model.apply, variables, images).layers
    assert [layer.threshold for layer in layers] == [2] * 7
    sim = jax.jit(lambda v, x: nadaptor.simulate(model.apply, v, x, num_steps=2))(variables, images)
    # At one step a neuron is a quantizer with one level of height p*s.
    one_level = model.clone(activation=functools.partial(Lsq, levels=1))
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, x: 2 * x if is_scale(path) else x, variables
    )
    wanted = jax.jit(one_level.apply)(doubled, images)
    chex.assert_trees_all_close(sim.outputs[0], wanted, atol=1e-4)
    assert np.abs(np.asarray(sim.outputs[1] - sim.outputs[0])).max() > 0


def test_a_failing_check_writes_nothing(runs, tmp_path, monkeypatch):
    fold = functools.partial(fold_batch_norm, epsilon=0.1)
    monkeypatch.setattr(conversion, "fold_batch_norm", fold)
    with pytest.raises(RunError, match="checks failed, nothing written; the first: FAILED folding"):
        convert(runs / "digits_na" / "checkpoint", tmp_path / "snn")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="is a full-precision network, in which nothing would"):
        convert(runs / "digits_relu" / "checkpoint", tmp_path / "snn")
    with pytest.raises(ValueError, match="exists already"):
        convert(runs / "digits_na" / "checkpoint", runs / "digits_na" / "snn")
    with pytest.raises(ValueError, match="num_images must be at least 16, not 15"):
        convert(runs / "digits_na" / "checkpoint", tmp_path / "snn", num_images=15)
    assert list(tmp_path.iterdir()) == []
