"""Workers of a study: cells that they share, cores of their own, and what ends one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nadaptor.cli import demo as of_demo
from nadaptor.errors import OutOfTimeError
from nadaptor.parallel import cores as of_process
from nadaptor.studies import study as grid
from nadaptor.studies import workers
from nadaptor.studies.study import Study
from nadaptor.training import options
from nadaptor.training.options import Options

STUDY = Study(methods=("lsq",), levels=(2,), seeds=4, corrections=("none",))

# Children import this file again, and so their cells are made up, too.
SCRIPT = """
import os, sys, time
import jax
from pathlib import Path
from nadaptor.studies import study as grid
from nadaptor.studies.study import Study
from nadaptor.studies.workers import share_study

def measure(cell, *_):
    assert jax.config.jax_enable_x64 and jax.config.jax_compilation_cache_dir == "kept"
    print("cell", cell.seed, *os.sched_getaffinity(0), flush=True)
    {body}
    return dict(failed="made up")

grid._measure = measure
if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", "kept")
    study = Study(methods=("lsq",), levels=(2,), seeds=4, corrections=("none",))
    print("done", len(share_study(study, Path("s"), workers=2)))
"""

needs_two_cores = pytest.mark.skipif(len(of_process.cores()) < 2, reason="needs two cores")


def start(folder, body):
    (folder / "script.py").write_text(SCRIPT.format(body=body))
    return subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(grid.__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )


def lines(process):
    with process:
        return process.stdout.read().splitlines()


@needs_two_cores
def test_each_cell_is_measured_by_one_worker_on_cores_of_its_own(tmp_path):
    # Until both have had a cell, neither ends one.
    both = """Path(f"{os.getpid()}.begun").touch()
    while len(list(Path().glob("*.begun"))) < 2: time.sleep(0.01)"""
    said = [line.split() for line in lines(start(tmp_path, both))]
    cells = [(mark, int(seed), set(own)) for mark, word, seed, *own in said[:-1] if word == "cell"]
    assert sorted(seed for _, seed, _ in cells) == [0, 1, 2, 3]
    by_worker = {mark: own for mark, _, own in cells}
    assert sorted(by_worker) == ["[1]", "[2]"]
    assert not by_worker["[1]"] & by_worker["[2]"]
    assert said[-1] == ["done", "4"]


@needs_two_cores
def test_what_workers_leave_that_were_killed_is_done_by_the_parent(tmp_path):
    killed = "cell.seed < 2 and __name__ == '__mp_main__' and os.kill(os.getpid(), 9)"
    said = lines(start(tmp_path, killed))
    assert said[-1] == "done 4"
    assert "worker 1 ended with exit code -9" in said
    by_parent = [line.split()[1] for line in said if line.startswith("cell")]
    by_workers = [line.split()[2] for line in said if "] cell" in line]
    assert by_parent == ["0", "1"] and {"0", "2", "3"} <= set(by_workers)


@needs_two_cores
def test_a_signal_reaches_the_workers_and_nothing_is_begun_after_it(tmp_path):
    process = start(tmp_path, "time.sleep(600)")
    begun = [process.stdout.readline() for _ in range(4)]
    assert sum(" cell " in line for line in begun) == 2
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest = lines(process)
    assert process.returncode == 1 and time.monotonic() - before < 300
    assert not any("cell" in line or "done" in line for line in rest)


def test_one_worker_is_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "_measure", lambda *_: {"failed": "made up"})
    monkeypatch.setattr(workers, "_run", lambda *_: pytest.fail("a process was started"))
    assert len(workers.share_study(STUDY, tmp_path)) == 4


def test_minutes_are_those_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: [0, 1])
    now = [0.0]
    monkeypatch.setattr(options.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(workers, "_run", lambda *_: now.__setitem__(0, 61.0))
    with pytest.raises(OutOfTimeError, match="the same command goes on"):
        workers.share_study(STUDY, tmp_path, Options(max_minutes=1), workers=2)


def test_more_workers_than_cores_are_refused(tmp_path):
    count = len(of_process.cores())
    with pytest.raises(ValueError, match=f"at most {count}, one per core, not {count + 1}"):
        workers.share_study(STUDY, tmp_path, workers=count + 1)
    with pytest.raises(ValueError, match="workers must be"):
        workers.share_study(STUDY, tmp_path, workers=0)


def test_an_error_of_a_worker_is_met_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: [0, 1])
    monkeypatch.setattr(workers, "_run", lambda *_: None)
    cells = tmp_path / "cells" / "validation"
    cells.mkdir(parents=True)
    monkeypatch.setattr(grid, "_measure", lambda *_: {"failed": "made up"})
    workers.share_study(STUDY, tmp_path, workers=2)
    found = json.loads(next(cells.glob("*.json")).read_text())
    assert found["failed"] == "made up"
    with pytest.raises(ValueError, match="another num_images"):
        workers.share_study(Study(**{**vars(STUDY), "num_images": 7}), tmp_path, workers=2)


def test_accelerators_are_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: [0, 1])
    monkeypatch.setattr(workers.jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="here is a gpu: start the command several times"):
        workers.share_study(STUDY, tmp_path, workers=2)


def test_a_worker_has_no_more_devices_than_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: [0, 1, 2])
    with pytest.raises(ValueError, match="at most 1, a worker's cores, with 2 workers, not 2"):
        workers.share_study(STUDY, tmp_path, Options(num_devices=2), workers=2)


@pytest.mark.parametrize(("asked", "found"), [(None, 2), (1, 1)])
def test_the_demo_takes_a_worker_per_core_unless_it_is_told_its_devices(
    asked, found, tmp_path, monkeypatch
):
    shared = []
    monkeypatch.setattr(of_demo, "cores", lambda: [0, 1])
    monkeypatch.setattr(of_demo, "spread_over_cores", lambda devices: devices)
    monkeypatch.setattr(of_demo, "run_demo", lambda *given: shared.append(given[-1]))
    of_demo.demo_command(workdir=tmp_path, num_devices=asked)
    assert shared == [found]
