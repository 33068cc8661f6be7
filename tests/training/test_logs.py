"""The record of a run: the same rows in both files, and a line now and then without a terminal."""

import csv
import json
import sys
import types

import pytest

from nadaptor.training import logs
from nadaptor.training.logs import LINE_SECONDS, Log, Pace, write_metrics

ROWS = [
    {"step": 2, "loss": 1.5, "accuracy": 0.25, "images_per_second": 8.0},
    {"step": 4, "loss": 0.75, "accuracy": 0.5, "images_per_second": 16.0},
]


def opened(folder, **changes):
    return Log("run", 10, folder, 0, **{"silent": False, "board": False, **changes})


@pytest.fixture
def clock(monkeypatch):
    """The time, as a list of one number that a test moves on."""
    now = [0.0]
    monkeypatch.setattr(logs, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_both_files_have_every_row(tmp_path):
    write_metrics(tmp_path / "new", ROWS)
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    table = csv.DictReader((tmp_path / "new" / "metrics.csv").read_text().splitlines())
    assert [{name: float(value) for name, value in row.items()} for row in table] == ROWS


def test_an_epoch_more_keeps_those_before_it_and_leaves_no_file_beside(tmp_path):
    with opened(tmp_path) as log:
        for count in (1, 2):
            log.epoch(ROWS[:count])
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_without_a_terminal_a_line_is_printed_every_half_minute(tmp_path, clock, capsys):
    with opened(tmp_path) as log:
        for step, seconds in enumerate((1, LINE_SECONDS - 1, LINE_SECONDS, LINE_SECONDS + 1)):
            clock[0] = seconds
            log.step(step, 1.25, 0.5, 4.0, 8)
        clock[0] = 2 * LINE_SECONDS
        log.step(4, 1.0, 0.75, 4.0, 8)
    found = capsys.readouterr().err.splitlines()
    # 7 and 5 steps of 8 images are left, at 4 images per second.
    assert found == [
        "run: step 3 of 10, loss 1.2500, accuracy 50.00 %, 4.0 images/s, 14 s left",
        "run: step 5 of 10, loss 1.0000, accuracy 75.00 %, 4.0 images/s, 10 s left",
    ]


def test_a_rate_leaves_out_the_compilation_and_the_steps_of_the_first_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    pace, found = Pace(8), []
    now[0] = 100.0
    pace.compiled(2)
    for second in (101.0, 102.0, 103.0, 104.0):
        now[0] = second
        found.append(pace.step())
    # From 100 on, by which time two of the steps may or may not have been done.
    assert found == [(8 / 101, False), (16 / 102, False), (8 / 3, True), (16 / 4, True)]
    pace.restart()
    now[0] = 106.0
    assert pace.step() == (8 / 2, True)


def test_no_time_is_estimated_before_there_is_a_rate(tmp_path, clock, capsys):
    with opened(tmp_path) as log:
        log.compiles()
        clock[0] = LINE_SECONDS
        log.step(0, 1.0, 0.5, None, 8)
    assert capsys.readouterr().err.splitlines() == [
        "run: compiling the step",
        "run: step 1 of 10, loss 1.0000, accuracy 50.00 %",
    ]


def test_a_process_that_is_not_the_first_says_and_writes_nothing(tmp_path, clock, capsys):
    with opened(tmp_path, silent=True, board=True) as log:
        log.compiles()
        clock[0] = 2 * LINE_SECONDS
        log.step(0, 1.0, 0.5, 4.0, 8)
        log.epoch(ROWS)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert not any(tmp_path.iterdir())


def test_the_board_gets_each_figure_of_the_last_row_at_its_step(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, *figure):
            written.append(figure)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    with opened(tmp_path, board=True) as log:
        log.epoch(ROWS)
    folder, *figures, closed = written
    assert (folder, closed) == (str(tmp_path / "tensorboard"), "closed")
    assert figures == [(name, value, 4) for name, value in ROWS[1].items()]


def test_a_board_without_its_package_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="--tensorboard needs a package: pip install tensorboardX"):
        opened(tmp_path, board=True)
