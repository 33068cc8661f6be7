"""What a run is asked for beside its config: weights from a file, the best epoch, a dry run."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from nadaptor._files import hold
from nadaptor._files.card import seal
from nadaptor.checkpoints.checkpoint import load_card, load_checkpoint
from nadaptor.checkpoints.snapshots import Snapshot
from nadaptor.cli import train as command
from nadaptor.configs.config import replace
from nadaptor.configs.named import get_config
from nadaptor.data.registry import open_split
from nadaptor.data.stand_in import stand_in
from nadaptor.errors import HeldError, RunError
from nadaptor.evaluation.accuracy import ann_accuracy
from nadaptor.parallel import choose_devices
from nadaptor.training import loop, train
from nadaptor.training.dry_run import dry_run
from nadaptor.training.options import DEFAULT
from nadaptor.training.run import first_state, open_run, read_weights


@pytest.fixture(scope="module")
def small():
    """The config of a full-precision network that trains in a moment."""
    sizes = {"train_size": 64, "batch_size": 16, "epochs": 2, "learning_rate": 0.01}
    changes = {"model": "digits_resnet8", "width": 4, "parent": None, "activation": "relu"}
    return replace(get_config("digits_na"), name="small", **sizes, **changes)


@pytest.fixture(scope="module")
def done(small, tmp_path_factory, torch_layout):
    """A trained network, and its weights as a file in torch's layout."""
    workdir = tmp_path_factory.mktemp("options")
    checkpoint = train(small, workdir)
    variables, _ = load_checkpoint(checkpoint, "ann")
    save_file(torch_layout(variables), workdir / "small.safetensors")
    return workdir, variables


def from_file(workdir, **changes):
    return dataclasses.replace(DEFAULT, init_from=workdir / "small.safetensors", **changes)


def test_a_run_that_starts_from_a_file_has_its_weights_and_names_it(small, done):
    workdir, variables = done
    run = open_run(small, from_file(workdir))
    weights, origin = read_weights(run, run.options.init_from)
    state = first_state(run, weights)
    jax.tree.map(np.testing.assert_array_equal, state.variables, variables)
    assert origin["file"] == "small.safetensors"
    child = replace(small, name="child", epochs=1, activation="lsq")
    assert load_card(train(child, workdir, from_file(workdir)), "ann")["parent"] == origin


def test_a_new_head_alone_starts_anew(small, done):
    workdir, variables = done
    run = open_run(replace(small, seed=5), from_file(workdir, new_head=True))
    state = first_state(run, read_weights(run, run.options.init_from)[0])
    params = dict(state.params)
    head = params.pop("fc")
    trained = {name: leaf for name, leaf in variables["params"].items() if name != "fc"}
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    assert np.abs(head["kernel"] - variables["params"]["fc"]["kernel"]).max() > 0.01


def test_a_file_of_max_pools_is_not_read_into_means_in_silence(
    small, tmp_path, torch_layout, capsys
):
    config = replace(small, model="resnet18")
    run = open_run(config, DEFAULT)
    variables = first_state(run, None).variables
    save_file(torch_layout(jax.device_get(variables)), tmp_path / "net.safetensors")
    for pool, lines in ((None, 1), ("mean", 1), ("max", 0)):
        read_weights(open_run(replace(config, pool=pool), DEFAULT), tmp_path / "net.safetensors")
        said = capsys.readouterr().out
        assert said.count("a mean is in the place of each max-pool; --pool max keeps") == lines


def test_a_file_of_another_network_or_of_other_classes_is_refused_in_the_words_of_a_command(
    small, done, torch_layout, tmp_path
):
    workdir, variables = done
    with pytest.raises(ValueError, match=r"small.safetensors is not of digits_resnet20: .* miss"):
        read_weights(
            open_run(replace(small, model="digits_resnet20"), DEFAULT),
            workdir / "small.safetensors",
        )
    arrays = torch_layout(variables)
    arrays |= {name: np.concatenate([x, x]) for name, x in arrays.items() if name.startswith("fc")}
    save_file(arrays, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="of 20 classes, and data set digits has 10: --new-head"):
        read_weights(open_run(small, DEFAULT), tmp_path / "other.safetensors")


def test_an_evaluation_measures_the_file_or_the_finished_run(small, done):
    workdir, variables = done
    run = open_run(small, DEFAULT)
    test = open_split(small.data, "test", None)
    accuracy = ann_accuracy(run.model, variables, test, devices=choose_devices(1))
    of_run = loop.evaluate(small, workdir)
    assert of_run.accuracy == loop.evaluate(small, workdir, from_file(workdir)).accuracy == accuracy
    assert (of_run.num_images, of_run.weights) == (test.size, workdir / "small" / "checkpoint")


def test_a_finished_run_of_another_config_is_not_evaluated(small, done):
    with pytest.raises(ValueError, match=r"was trained with epochs=2, not 3; choose another"):
        loop.evaluate(replace(small, epochs=3), done[0])


def test_a_run_that_is_not_finished_is_not_evaluated(small, done):
    with pytest.raises(ValueError, match=r"no checkpoint at .*/other/checkpoint"):
        loop.evaluate(replace(small, name="other"), done[0])


def test_a_damaged_checkpoint_is_not_taken_for_a_finished_run(small, done, tmp_path):
    shutil.copytree(done[0] / "small", tmp_path / "small")
    files = [path for path in (tmp_path / "small/checkpoint/arrays").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    # Half of its bytes: a single one may be of none of the arrays.
    for i in range(len(content) // 4, 3 * len(content) // 4):
        content[i] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        train(small, tmp_path)


def test_the_command_evaluates_a_file_of_weights_and_names_it(small, done, capsys):
    workdir, file = done[0], done[0] / "small.safetensors"
    sizes = ["--model", "digits_resnet8", "--width", "4", "--workdir", str(workdir)]
    command.main(["digits_relu", *sizes, "--evaluate-only", "--init-from", str(file)])
    words, last = capsys.readouterr().out.splitlines()[-2:]
    assert f"digits_resnet8 with relu, weights of {file}, on 450 test images" in words
    assert last == f"accuracy {100 * loop.evaluate(small, workdir).accuracy:.2f}"


def test_the_command_hands_on_what_it_was_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("nadaptor.training.dry_run.dry_run", lambda *given: asked.append(given))
    changes = ["--seed", "3", "--width", "4", "--select", "best"]
    weights = ["--init-from", str(tmp_path / "w.safetensors"), "--new-head"]
    command.main(["digits_na", "--dry-run", *changes, *weights, "--keep", "5"])
    ((config, options),) = asked
    assert config == replace(get_config("digits_na"), seed=3, width=4, select="best")
    assert options == dataclasses.replace(
        DEFAULT, dry_run=True, init_from=tmp_path / "w.safetensors", new_head=True, keep=5
    )


def test_the_best_epoch_is_handed_on_where_that_is_asked_for(small, tmp_path, monkeypatch):
    for select, step in (("best", 4), ("last", 8)):
        measured = iter((0.9, 0.4))
        monkeypatch.setattr(loop, "ann_accuracy", lambda *args, m=measured, **_: next(m))
        card = load_card(train(replace(small, name=select, select=select), tmp_path), "ann")
        assert card["metrics"]["step"] == step
        assert card["metrics"]["validation_accuracy"] == (0.9 if select == "best" else 0.4)
    best, last = (load_card(tmp_path / n / "checkpoint", "ann") for n in ("best", "last"))
    assert best["digests"] != last["digests"]


def test_a_dry_run_says_what_the_run_costs_and_writes_nothing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cost = dry_run(small, DEFAULT)
    state = first_state(open_run(small, DEFAULT), None)
    assert cost.parameters == sum(x.size for x in jax.tree.leaves(state.params))
    assert cost.total_steps == 8
    assert cost.step_seconds > 0
    assert "8 steps would take" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_what_does_not_fit_here_says_all_but_the_time(small, monkeypatch, capsys):
    monkeypatch.setattr("nadaptor.training.dry_run.free_bytes", lambda: 0)
    cost = dry_run(small, DEFAULT)
    assert cost.step_seconds is None
    assert cost.temporary_bytes > 0
    assert "step unknown: it does not fit into the memory here; 8 steps" in capsys.readouterr().out


def test_a_dry_run_of_imagenet_needs_no_data_set(tmp_path, capsys):
    small = {"model": "resnet18", "width": 2, "image_size": 32, "batch_size": 4, "parent": None}
    config = replace(get_config("imagenet_resnet50_na_p3"), epochs=2, **small)
    options = dataclasses.replace(DEFAULT, data_dir=tmp_path)
    cost = dry_run(config, options)
    assert cost.total_steps == 2 * ((1_281_167 - 10_000) // 4)
    out = capsys.readouterr().out
    assert out.startswith("no data is needed: 1271167 images are made up")
    state, step, both = map(
        int, re.search(r"state (\d+) MiB \+ a step (\d+) MiB = (\d+)", out).groups()
    )
    assert cost.state_bytes > 8 * cost.parameters  # of float32, with momentum
    assert abs(both - state - step) <= 1 and state == round(cost.state_bytes / 2**20)
    with pytest.raises(ValueError, match="no prepared data set 'other'"):
        dry_run(replace(config, dataset="other"), options)


def test_an_evaluation_of_another_config_is_refused_as_a_training_is(small, done):
    workdir, _ = done
    other = replace(small, label_smoothing=0.1)
    for call in (loop.evaluate, train):
        with pytest.raises(ValueError, match=r"was trained with label_smoothing=0.0, not 0.1"):
            call(other, workdir)


def test_the_files_of_another_run_in_its_folder_are_not_evaluated(small, done, tmp_path):
    workdir, _ = done
    shutil.copytree(workdir / "small", tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained with .*'small'"):
        loop.evaluate(replace(small, name="other"), tmp_path)


@pytest.mark.parametrize("call", [loop.evaluate, train])
def test_a_network_of_other_classes_is_neither_evaluated_nor_believed(small, done, tmp_path, call):
    """Whose config is the same: the folder of its data set has changed since."""
    workdir, _ = done
    shutil.copytree(workdir / "small", tmp_path / "small")
    file = tmp_path / "small/checkpoint/card.json"
    card = json.loads(file.read_text())
    card["data"]["class_names"][0] = "a"
    file.write_text(json.dumps(seal(card)))
    with pytest.raises(ValueError, match="class 0 of data set digits is '0', and was 'a' when"):
        call(small, tmp_path)


def test_a_finished_run_whose_arrays_are_damaged_is_not_called_trained(small, done, tmp_path):
    workdir, _ = done
    shutil.copytree(workdir / "small", tmp_path / "small")
    card = json.loads((file := tmp_path / "small/checkpoint/card.json").read_text())
    name = next(iter(card["digests"]))
    card["digests"][name] = "0" * 64
    file.write_text(json.dumps(seal(card)))
    with pytest.raises(ValueError, match=f"is damaged: {name}"):
        train(small, tmp_path)


def test_two_runs_in_one_folder_do_not_both_work(small, tmp_path):
    with hold(tmp_path / "small"), pytest.raises(HeldError, match="is being made by process"):
        train(small, tmp_path)


@pytest.mark.parametrize("change", ["weight_decay", "seed", "epochs", "snapshot_steps", "keep"])
def test_processes_agree_on_whatever_changes_a_run(small, change):
    run = open_run(small, DEFAULT)
    if change in ("snapshot_steps", "keep"):
        other = open_run(small, dataclasses.replace(DEFAULT, **{change: 3}))
    else:
        other = open_run(replace(small, **{change: 3}), DEFAULT)
    assert loop._asked(run) != loop._asked(other)


def test_a_run_that_goes_on_elsewhere_says_what_differs(small):
    run = open_run(small, DEFAULT)
    setting = loop._setting(run)
    before = {**setting, "devices": 4, "resident": True, "jax": "0.9.0"}
    snapshot = Snapshot(3, None, {"setting": before})
    line = loop._where_it_starts(run, snapshot, {"setting": setting})
    assert line.startswith("resumed at step 3 of 8 on 1 CPU device; it was with devices 4, not 1")
    assert "resident True, not False" in line and "jax 0.9.0, not " in line
    same = snapshot._replace(card={"setting": setting})
    assert loop._where_it_starts(run, same, {"setting": setting}) == (
        "resumed at step 3 of 8 on 1 CPU device"
    )


def test_a_parent_of_other_classes_is_refused(small, done):
    run, config = open_run(small, DEFAULT), small
    names = [*run.images.identity["class_names"][1:], "z"]
    source = run.images._replace(identity={**run.images.identity, "class_names": names})
    with pytest.raises(ValueError, match="class 0 of data set digits is '1', and was '0' when"):
        loop._finished(done[0] / "small/checkpoint", run._replace(images=source), config, ["seed"])


def test_a_parent_is_looked_at_again_where_no_snapshot_is_there_yet(tmp_path, monkeypatch):
    def look(*_):
        raise RunError("the parent")

    config = get_config("digits_na")
    monkeypatch.setattr(loop, "_train_parent", look)
    (tmp_path / config.name / "snapshots").mkdir(parents=True)
    with pytest.raises(RunError, match="the parent"):
        train(config, tmp_path, DEFAULT)


def test_a_stand_in_has_the_sizes_that_the_data_set_has():
    data = get_config("cifar10_resnet20").data
    assert stand_in(dataclasses.replace(data, image_size=16)).spec.image_shape == (16, 16, 3)
    with pytest.raises(ValueError, match="image_size 64 cannot be had from images of 32x32"):
        stand_in(dataclasses.replace(data, image_size=64))
    photographs = dataclasses.replace(data, dataset="imagenet2012", image_size=256)
    assert stand_in(photographs).spec.image_shape == (256, 256, 3)
