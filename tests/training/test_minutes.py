"""A run in pieces of so many minutes: each ends at a snapshot, and another machine goes on."""

import itertools
import shutil
import signal
from types import SimpleNamespace

import chex
import pytest

from nadaptor.checkpoints.checkpoint import load_checkpoint
from nadaptor.cli.failures import failure
from nadaptor.errors import OutOfTimeError
from nadaptor.training import options, train
from nadaptor.training.loop import _what_is_saved
from nadaptor.training.options import Deadline, Options
from nadaptor.training.signals import Told

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(options, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def test_a_run_that_moves_from_folder_to_folder_in_pieces_ends_as_the_one_in_one(
    tiny, runs, tmp_path, clock
):
    folder, pieces = tmp_path / "0", 0
    shutil.copytree(runs / "digits_relu", folder / "digits_relu")
    while True:
        try:
            checkpoint = train(tiny, folder, Options(max_minutes=13.5 / 60))
            break
        except OutOfTimeError:
            pieces += 1
        shutil.move(folder, tmp_path / str(pieces))
        folder = tmp_path / str(pieces)
    assert pieces == 2  # 36 steps, and 14 in a piece
    (found, card), (expected, whole) = (
        load_checkpoint(path, "ann") for path in (checkpoint, runs / "digits_na" / "checkpoint")
    )
    chex.assert_trees_all_equal(found, expected)
    for name in ("loss", "accuracy", "validation_accuracy"):
        assert card["metrics"][name] == whole["metrics"][name]


def test_a_deadline_is_over_when_its_minutes_are_and_never_without_any(clock):
    short, endless = Deadline(2 / 60), Deadline(None)
    assert not short.over() and short.over()
    assert not endless.over() and endless.minutes_left() is None
    with pytest.raises(OutOfTimeError):
        short.minutes_left()


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), float("inf")])
def test_minutes_that_never_come_or_end_at_once_are_refused(minutes):
    with pytest.raises(ValueError, match="max_minutes must be positive"):
        Deadline(minutes)


def test_a_command_whose_minutes_are_over_ends_with_a_code_of_its_own():
    assert failure(OutOfTimeError("after 3 steps")).code == 75


@pytest.mark.parametrize(
    ("done", "on_disk", "said"),
    [
        (1, 1, "after 1 step, which is saved; the same"),
        (2, 2, "after 2 steps, which are saved; the same"),
        (1, None, "after 1 step, and none is saved; the same"),
        (3, 1, "after 3 steps; the last that is saved is 1, from"),
    ],
)
def test_a_run_that_ends_says_of_its_steps_what_is_true(done, on_disk, said):
    assert _what_is_saved(done, on_disk).startswith(said)


def test_a_signal_that_came_first_is_what_a_late_run_says():
    late = SimpleNamespace(over=lambda: True)
    over = Told(deadline=late).error("after 1 step")
    assert isinstance(over, OutOfTimeError) and str(over) == "the minutes ran out after 1 step"
    told = Told(deadline=late)
    told.handle(signal.SIGHUP)
    assert told(0) and failure(told.error("told")).code == 128 + signal.SIGHUP
