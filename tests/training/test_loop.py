import json
import shutil

import pytest

from nadaptor.checkpoints.checkpoint import load_card, load_checkpoint
from nadaptor.configs.build import build_model
from nadaptor.configs.config import replace
from nadaptor.configs.named import parent_of
from nadaptor.data.registry import open_source, open_split
from nadaptor.evaluation.accuracy import ann_accuracy
from nadaptor.training import RunError, run, train
from nadaptor.training.monitor import verdict
from nadaptor.training.options import DEFAULT, Options

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture
def with_parent(runs, tmp_path):
    """A folder of runs in which the full-precision network alone is trained."""
    shutil.copytree(runs / "digits_relu", tmp_path / "digits_relu")
    return tmp_path


def test_the_same_config_trains_the_same_network_to_the_bit(runs, tiny, with_parent):
    again = load_card(train(tiny, with_parent), "ann")
    assert again["digests"] == load_card(runs / "digits_na" / "checkpoint", "ann")["digests"]


def test_another_seed_trains_another_network(runs, tiny, with_parent):
    (with_parent / "digits_relu").rename(with_parent / "parent")
    config = replace(tiny, activation="relu", parent=None, name="x")
    cards = [
        load_card(train(replace(config, seed=s, name=f"x{s}"), with_parent), "ann") for s in (0, 1)
    ]
    weights = [card["digests"]["params/conv1/kernel"] for card in cards]
    assert weights[0] != weights[1]


def test_a_network_starts_from_its_parent_and_names_it(runs):
    names = ("digits_relu", "digits_na")
    parent, child = (load_card(runs / name / "checkpoint", "ann") for name in names)
    assert child["parent"] == parent["card_digest"]
    assert parent["parent"] is None
    assert parent["config"]["model"] == child["config"]["model"]


def test_the_metrics_are_those_of_the_network_that_was_saved(runs, tiny):
    variables, card = load_checkpoint(runs / "digits_na" / "checkpoint", "ann")
    validation = open_source("digits", "validation", tiny.data.validation_size)
    accuracy = ann_accuracy(build_model(tiny), variables, validation)
    assert card["metrics"]["validation_accuracy"] == pytest.approx(accuracy, abs=0.01)
    rows = (runs / "digits_na" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [18, 36]
    assert json.loads(rows[-1]) == card["metrics"]


def test_a_run_on_two_devices_is_that_on_one_and_is_resumed_on_two(tiny, tmp_path, capsys):
    """Equal to the rounding of sums; the number of devices stands in card and snapshots."""
    sizes = {"epochs": 1, "batch_size": 62, "train_size": 124}
    config = replace(parent_of(tiny), name="x", **sizes)
    one, two = (Options(num_devices=count) for count in (1, 2))
    cards = []
    for options in (one, two):
        checkpoint = train(config, tmp_path / str(options.num_devices), options)
        cards.append(load_card(checkpoint, "ann"))
    assert [card["setting"]["devices"] for card in cards] == [1, 2]
    assert cards[1]["metrics"]["loss"] == pytest.approx(cards[0]["metrics"]["loss"], rel=1e-4)
    said, accuracy = capsys.readouterr().out, cards[1]["metrics"]["validation_accuracy"]
    assert "x: starts at step 0 of 2 on 2 CPU devices" in said
    assert said.endswith(f"x: {verdict(accuracy, config.data.validation_size, 10)}\n")
    for options, words in (
        (DEFAULT, "2 CPU devices\n"),
        (one, "1 CPU device; it was with devices 2"),
    ):
        shutil.rmtree(checkpoint)
        train(config, tmp_path / "2", options)
        assert f"x: resumed at step 2 of 2 on {words}" in capsys.readouterr().out


def test_a_finished_run_is_not_repeated(runs, tiny, capsys):
    before = (runs / "digits_na" / "metrics.csv").stat().st_mtime_ns
    assert train(tiny, runs) == runs / "digits_na" / "checkpoint"
    assert (runs / "digits_na" / "metrics.csv").stat().st_mtime_ns == before
    assert "already trained" in capsys.readouterr().out


def test_a_finished_run_of_another_config_is_refused_by_the_field(runs, tiny):
    with pytest.raises(ValueError, match=r"was trained with epochs=2, not 3; choose another"):
        train(replace(tiny, epochs=3), runs)


def test_a_parent_of_another_model_is_refused(with_parent, tiny):
    other = replace(tiny, model="digits_resnet20")
    with pytest.raises(ValueError, match=r"was trained with model='digits_resnet8'"):
        train(other, with_parent)


def test_training_never_reads_the_test_set(with_parent, tiny, monkeypatch):
    read = []

    def opened(data, split, data_dir, **more):
        read.append(split)
        return open_split(data, split, data_dir, **more)

    monkeypatch.setattr(run, "open_split", opened)
    train(replace(tiny, epochs=1), with_parent)
    assert sorted(set(read)) == ["train", "validation"]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(with_parent, tiny):
    diverging = replace(tiny, learning_rate=1e20, epochs=1)
    with pytest.raises(RunError, match=r"the loss is nan at step \d+; lower the learning rate"):
        train(diverging, with_parent)
    assert not (with_parent / "digits_na" / "checkpoint").exists()
    assert list((with_parent / "digits_na" / "snapshots").iterdir()) == []


def test_bad_input_shows_before_anything_is_trained(tmp_path, tiny):
    with pytest.raises(ValueError, match="unknown model"):
        train(replace(tiny, model="resnet"), tmp_path)
    with pytest.raises(ValueError, match="unknown config 'digits_rely'; did you mean"):
        train(replace(tiny, parent="digits_rely"), tmp_path)
    assert list(tmp_path.iterdir()) == []
