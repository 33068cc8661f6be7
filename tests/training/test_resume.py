import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest

from nadaptor._files.card import seal
from nadaptor.checkpoints.checkpoint import load_card, load_checkpoint, save_checkpoint
from nadaptor.checkpoints.snapshots import Snapshots
from nadaptor.configs.config import replace
from nadaptor.training import RunError, loop, train
from nadaptor.training.options import DEFAULT

pytestmark = pytest.mark.usefixtures("optimized")

ROOT = Path(__file__).parents[2]


class State(NamedTuple):
    w: Any
    step: Any


STATE = State(np.arange(6, dtype=np.float32), np.int32(3))
CARD = {"config": {"seed": 0}, "data": {"class_names": ["a", "b"]}}


def opened(folder, card=CARD):
    return Snapshots(folder / "snapshots", 2, card)


def latest(folder, card=CARD):
    with contextlib.closing(opened(folder, card)) as snapshots:
        return snapshots.latest(STATE)


def save(snapshots, step, **card):
    snapshots.save(step, STATE._replace(step=np.int32(step)), card)


@pytest.fixture
def saved(tmp_path):
    snapshots = opened(tmp_path)
    rows = []
    for step, accuracy in ((1, 0.9), (2, 0.5), (3, None), (4, 0.1)):
        if accuracy:
            rows = [*rows, {"step": step, "validation_accuracy": accuracy}]
        save(snapshots, step, note=step, rows=rows)
    snapshots.close()
    return tmp_path


def test_the_latest_and_the_best_are_kept(saved):
    assert sorted(int(p.name) for p in (saved / "snapshots").iterdir()) == [1, 3, 4]
    with contextlib.closing(opened(saved)) as snapshots:
        assert snapshots.best(STATE).step == 1
        last = snapshots.latest(STATE)
    assert (last.step, last.card["note"]) == (4, 4)
    chex.assert_trees_all_equal(last.state, STATE._replace(step=np.int32(4)))
    chex.assert_trees_all_equal_dtypes(last.state, STATE)


def test_no_file_is_too_large_to_be_carried(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"one": (3, 3, 512, 512), "two": (3, 3, 512, 512), "large": (4096, 1200), "b": ()}
    state = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    state = State(jax.tree.map(np.asarray, state), np.int32(1))
    with contextlib.closing(opened(tmp_path)) as snapshots:
        snapshots.save(1, state, {})
        assert snapshots.wait()
        chex.assert_trees_all_equal(snapshots.latest(state).state, state)
    save_checkpoint(tmp_path / "checkpoint", "ann", state.w, {"config": {}})
    chex.assert_trees_all_equal(load_checkpoint(tmp_path / "checkpoint", "ann")[0], state.w)
    for folder in ("snapshots", "checkpoint"):
        sizes = [path.stat().st_size for path in (tmp_path / folder).rglob("*")]
        assert sum(sizes) > 32 * 2**20
        assert max(sizes) <= 16 * 2**20


# A truncated file leaves an exception in the storage layer's threads that nobody fetches.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_snapshot_is_skipped_with_a_line_and_moved_aside(saved, capsys, how):
    files = [p for p in (saved / "snapshots/4/state").rglob("*") if p.parent.name == "d"]
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if how == "flip" else content[:9])
        if how == "remove":
            file.unlink()
    assert latest(saved).step == 3
    assert capsys.readouterr().out.startswith("snapshot 4 skipped and moved to ")
    assert (saved / "damaged/4").is_dir()


def test_nothing_readable_is_an_error_and_nothing_at_all_is_none(saved, tmp_path):
    for card in (saved / "snapshots").glob("*/card/metadata"):
        card.write_text("{")
    with pytest.raises(RunError, match="none of the 3 snapshots"):
        latest(saved)
    assert latest(tmp_path / "new") is None


@pytest.mark.parametrize(
    ("card", "word"),
    [
        ({**CARD, "config": {"seed": 1}}, "has seed=0, not 1"),
        ({**CARD, "data": {"class_names": ["b", "a"]}}, r"has class_names=\['a', 'b'\]"),
    ],
)
def test_another_config_or_data_set_is_refused_by_the_field(saved, card, word):
    with pytest.raises(ValueError, match=word):
        latest(saved, card)


def test_a_snapshot_between_two_measurements_is_no_reason_to_warn(saved, caplog):
    with contextlib.closing(opened(saved)) as snapshots:
        save(snapshots, 9)
        assert snapshots.wait()
    assert not caplog.records


def test_a_state_that_is_not_finite_is_not_saved(saved):
    snapshots = opened(saved)
    with pytest.raises(RunError, match="w is not finite after 9 updates"):
        snapshots.save(9, STATE._replace(w=np.float32([np.nan])), {})
    assert snapshots.latest(STATE).step == 4
    snapshots.close()


def test_a_full_disk_leaves_the_earlier_snapshots_and_the_run_goes_on(saved, capsys, monkeypatch):
    snapshots = opened(saved)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def fail(*steps):
        for step in steps:
            monkeypatch.setattr(snapshots._manager, "save", full)
            save(snapshots, step)

    line = "a snapshot was not saved, the earlier ones are kept: No space left on device\n"
    fail(5, 6, 7)
    assert capsys.readouterr().out == line
    save(snapshots, 8)
    fail(9, 10)
    assert capsys.readouterr().out == line
    snapshots.close()
    assert latest(saved).step == 8


def test_a_save_that_failed_on_its_way_does_not_keep_the_next_from_the_disk(saved, monkeypatch):
    snapshots = opened(saved)

    def full():
        raise OSError(28, "No space left on device")

    # It fails where it is waited for, and what opens the next manager closes this one.
    failing = snapshots._manager
    monkeypatch.setattr(failing, "wait_until_finished", full)
    monkeypatch.setattr(failing, "close", lambda: None)
    save(snapshots, 5)
    assert snapshots.last_on_disk() == 5
    snapshots.close()


def change_card(folder, step, change, *, sealed):
    path = folder / "snapshots" / str(step) / "card/metadata"
    card = json.loads(path.read_text())
    change(card)
    if sealed:
        card = seal({k: v for k, v in card.items() if k not in ("format", "card_digest")})
    path.write_text(json.dumps(card))


def test_a_snapshot_in_the_folder_of_another_step_is_not_resumed_from(saved, capsys):
    (saved / "snapshots/4").rename(saved / "snapshots/6")
    assert latest(saved).step == 3
    assert "snapshot 6 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("old", [False, True])
def test_swapped_snapshots_are_not_resumed_from(saved, old):
    """Those of format 1 neither, whose cards have no step: the state's own is the folder's."""
    if old:
        for step in (3, 4):
            change_card(saved, step, as_of_format_1, sealed=False)
    for source, target in (("4", "x"), ("3", "4"), ("x", "3")):
        (saved / "snapshots" / source).rename(saved / "snapshots" / target)
    assert latest(saved).step == 1


def as_of_format_1(card):
    for field in ("format", "card_digest", "step"):
        del card[field]


def test_snapshots_of_format_1_are_resumed_from(saved):
    for step in (1, 3, 4):
        change_card(saved, step, as_of_format_1, sealed=False)
        # Which had a folder of metrics, too, that nothing depends on now.
        (saved / f"snapshots/{step}/metrics").mkdir()
        (saved / f"snapshots/{step}/metrics/metrics").write_text("{")
    assert latest(saved).step == 4
    with contextlib.closing(opened(saved)) as snapshots:
        assert snapshots.best(STATE).step == 1


def test_a_changed_accuracy_is_not_believed(saved):
    """The best is chosen by what the digest covers."""

    def better(card):
        card["rows"][-1].update(step=4, validation_accuracy=0.99)

    change_card(saved, 4, better, sealed=False)
    with contextlib.closing(opened(saved)) as snapshots:
        assert snapshots.best(STATE).step == 1
        assert snapshots.latest(STATE).step == 3


@pytest.mark.parametrize("field", ["config", "data", "digests", "versions"])
def test_a_card_without_a_field_is_skipped_by_its_name(saved, capsys, field):
    change_card(saved, 4, lambda card: card.pop(field), sealed=True)
    assert latest(saved).step == 3
    assert f"it lacks {field}" in capsys.readouterr().out


def test_where_no_snapshot_is_good_all_stay_and_the_same_command_says_the_same(saved):
    """The cause may pass: no permission for a moment, a disk that is away."""
    texts = {path: path.read_text() for path in (saved / "snapshots").glob("*/card/metadata")}
    for path in texts:
        path.write_text("{")
    for _ in range(2):
        with pytest.raises(RunError, match=r"none of the 3 snapshots .* they stay there"):
            latest(saved)
    for path, text in texts.items():
        path.write_text(text)
    assert latest(saved).step == 4


def test_what_is_said_to_be_saved_is_on_the_disk(saved, monkeypatch):
    with contextlib.closing(opened(saved)) as snapshots:
        assert snapshots.last_on_disk() == 4
        monkeypatch.setattr(snapshots._manager, "save", lambda *_, **__: None)
        save(snapshots, 7)
        assert snapshots.last_on_disk() == 4
    assert loop._what_is_saved(4, 4).endswith("4 steps, which are saved; the same command resumes")
    assert "the last that is saved is 4" in loop._what_is_saved(7, 4)
    assert "none is saved" in loop._what_is_saved(7, None)


def test_a_folder_that_cannot_be_written_in_is_refused_at_once(tmp_path):
    (tmp_path / "snapshots").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write in .*/snapshots: "):
        opened(tmp_path)


@pytest.fixture(scope="module")
def door(runs, tiny, tmp_path_factory):
    """Runs train.py as a process, in a folder in which the parent alone is trained."""

    def start(folder, *more):
        folder.mkdir(exist_ok=True)
        if not (folder / "digits_relu").exists():
            shutil.copytree(runs / "digits_relu", folder / "digits_relu")
        sizes = ["--model", tiny.network.model, "--epochs", tiny.epochs, "--workdir", folder]
        command = [sys.executable, "train.py", "digits_na", *sizes, "--snapshot-steps", "5", *more]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1
        )

    return start


def metrics(folder):
    lines = (folder / "digits_na" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "second" not in k} for x in lines]


def wait_for(folder, step, process):
    """Waits until there is a snapshot of that step or a later one."""
    while process.poll() is None:
        names = [p.name for p in (folder / "digits_na/snapshots").glob("*")]
        if any(name.isdigit() and int(name) >= step for name in names):
            return
        time.sleep(0.02)


def test_a_run_that_is_killed_ends_as_the_one_that_is_not(door, runs, tmp_path):
    for step, sent in ((5, signal.SIGKILL), (15, signal.SIGTERM)):
        process = door(tmp_path)
        wait_for(tmp_path, step, process)
        process.send_signal(sent)
        out, err = process.communicate()
        if sent == signal.SIGTERM:
            assert process.returncode == 143, err
            (saved,) = re.findall(r"told to end after (\d+) steps?, which (?:are|is) saved", err)
            assert (tmp_path / "digits_na/snapshots" / saved).is_dir()
            assert len(f"{out}{err}".splitlines()) <= 10
        assert not (tmp_path / "digits_na/checkpoint").exists()
    process = door(tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "digits_na: resumed at step" in out
    found, whole = (
        (load_card(folder / "digits_na/checkpoint", "ann")["digests"], metrics(folder))
        for folder in (tmp_path, runs)
    )
    assert found == whole


def test_a_run_resumed_with_another_config_is_refused(runs, tiny, tmp_path):
    shutil.copytree(runs / "digits_relu", tmp_path / "digits_relu")
    shutil.copytree(runs / "digits_na/snapshots", tmp_path / "digits_na/snapshots")
    with pytest.raises(ValueError, match=r"has weight_decay=0.0005, not 0.1; resume it"):
        train(replace(tiny, weight_decay=0.1), tmp_path, DEFAULT)
