import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nadaptor._files import (
    check_place,
    check_writable,
    hold,
    making,
    write_bytes,
    write_csv,
    write_json,
)
from nadaptor.errors import PassingError
from nadaptor.training.logs import write_metrics

ROWS = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_csv_and_json_lines_hold_the_same_rows(tmp_path):
    write_metrics(tmp_path / "run", ROWS)
    assert (tmp_path / "run/metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", ROWS)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert json.loads((tmp_path / "a.json").read_text()) == ROWS
    with pytest.raises(ValueError, match="fields not in"):
        write_csv(tmp_path / "b.csv", [{"a": 1}, {"b": 2}])
    write_bytes(tmp_path / "c" / "d", b"content")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.json", "c", "d"]


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    with hold(tmp_path / "run"):
        holder = f"run is being made by process {os.getpid()}, since"
        with pytest.raises(PassingError, match=holder), hold(tmp_path / "run"):
            pass
        with hold(tmp_path / "other"):
            pass
    with hold(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_being_made_is_not_made_a_second_time_meanwhile(tmp_path):
    """As a conversion and a fine-tuning are: the second is refused before it works."""
    begun = []

    @making("out")
    def make(source, out):
        begun.append(source)
        if source == "first":
            make("second", out=out)

    with pytest.raises(PassingError, match="out is being made by process"):
        make("first", tmp_path / "out")
    assert begun == ["first"]
    make("third", tmp_path / "out")
    assert begun == ["first", "third"]


def test_a_lock_does_not_outlive_a_holder_that_was_killed(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from nadaptor._files import hold\n"
        "with hold(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "run"], check=False)
    assert (tmp_path / ".run.lock").exists()
    with hold(tmp_path / "run"):
        pass


def test_a_second_ctrl_c_ends_a_block_that_a_first_one_waits_for():
    program = (
        "import signal; from nadaptor._files import uninterrupted\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with uninterrupted():\n"
        "    signal.raise_signal(signal.SIGINT); print('goes on', flush=True)\n"
        "    signal.raise_signal(signal.SIGINT); print('never', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"goes on\n", b"")


def test_a_file_that_the_disk_has_no_room_for_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "card.json").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(tmp_path / "card.json", {})
    assert caught.value.filename == str(tmp_path / "card.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_read_only_folder_is_refused_before_the_work_and_none_is_made(tmp_path, monkeypatch):
    """As root is stopped by no permission, the system call fails in its place."""

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    check_place(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(ValueError, match="Read-only file system; choose another folder"):
        check_place(tmp_path / "new" / "folder")


def test_a_folder_that_is_a_file_cannot_be_written_in(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write in .*file"):
        check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
