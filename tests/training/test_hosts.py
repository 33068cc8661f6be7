"""Processes of one run that were asked for different things, that never come, or that die."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nadaptor.cli.failures import failure
from nadaptor.errors import Interrupted, RunError
from nadaptor.parallel import start_processes

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
import jax.numpy as jnp
from jax.experimental import multihost_utils
from nadaptor.cli.failures import end
from nadaptor.parallel import agree, start_processes

def main(rank, port, how):
    start_processes(f"127.0.0.1:{port}", 2, rank, timeout=20)
    agree({"seed": rank if how == "differs" else 0, "class_names": ["n"] * 5000})
    for step in range(1000):
        multihost_utils.process_allgather(jnp.ones(3))
        if how == "dies" and rank and step == 3:
            os._exit(7)

try:
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
except BaseException as error:
    end(error)
    raise
"""
# As a command, which says where its coordinator is.
APART = """
import os, sys, time
from nadaptor.cli.command import run_command
from nadaptor.parallel import agree, start_processes

def main(words):
    rank, dying, option, address = words
    start_processes(address, 2, int(rank), timeout=5)
    agree({"seed": 0})
    if rank == dying:
        os._exit(7)
    time.sleep(600)

sys.argv[0] = "train.py"
run_command(main)
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ends(how, ranks=(0, 1)):
    """Exit code and last line of each process, with the lines it printed."""
    port, env = free_port(), {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    started = [
        subprocess.Popen([*command, str(rank), str(port), how], env=env, stderr=-1, text=True)
        for rank in ranks
    ]
    found = []
    for process in started:
        err = process.communicate()[1]
        # Gloo says how many it has found.
        lines = [line for line in err.splitlines() if "[Gloo]" not in line]
        found.append((process.returncode, lines))
    return found


def test_processes_that_were_asked_for_different_runs_all_name_the_first_difference():
    for code, lines in ends("differs"):
        assert (code, len(lines)) == (2, 1)
        assert "process 0 has seed=0, and process 1 has 1" in lines[0]


def test_a_process_that_dies_ends_the_other_with_one_line():
    (code, lines), (died, _) = ends("dies")
    assert (code, died, len(lines)) == (1, 7, 1), lines
    assert "another process of the run has ended or cannot be reached" in lines[0]


@pytest.mark.parametrize("dying", ["0", "1"])
def test_a_process_that_dies_outside_of_a_collective_ends_the_other_with_one_line(dying):
    address, env = f"127.0.0.1:{free_port()}", {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", APART, rank, dying, "--coordinator", address],
            env={**env, "JAX_PLATFORMS": "cpu"}, stderr=-1, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    for rank, process in zip("01", started, strict=True):
        err = process.communicate()[1]
        lines = [line for line in err.splitlines() if "[Gloo]" not in line]
        if rank != dying:
            assert (process.returncode, len(lines)) == (1, 1), err
            assert lines[0].startswith("train.py: another process of the run has ended")


@pytest.mark.parametrize(
    ("rank", "word"), [(0, r"\[1\] did not come"), (1, "process 0 did not let process 1 in")]
)
def test_a_process_that_never_comes_is_missed_within_the_time_that_is_stated(rank, word):
    started = time.monotonic()
    with pytest.raises(RunError, match=rf"{word}.* within 1 s"):
        start_processes(f"127.0.0.1:{free_port()}", 2, rank, timeout=1)
    assert time.monotonic() - started < 200  # by default it would be 300


def test_a_visitor_that_is_no_process_is_not_counted():
    port, said = free_port(), []

    def visit():
        while not said:
            for word in (b"", b"GET /"):
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port)) as to,
                ):
                    # Closed at once by a reset.
                    to.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    to.sendall(word)
            time.sleep(0.05)

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        with pytest.raises(RunError, match=r"\[1\] did not come"):
            start_processes(f"127.0.0.1:{port}", 2, 0, timeout=1)
    finally:
        said.append("enough")
        visitor.join()


@pytest.mark.parametrize(
    ("coordinator", "count", "rank", "word"),
    [
        ("127.0.0.1", 2, 0, "must be HOST:PORT"),
        ("127.0.0.1:", 2, 0, "must be HOST:PORT"),
        ("h:99999", 2, 0, "must be HOST:PORT"),
        ("h:1234", 2, 5, "--process-id must be from 0 to 1, not 5"),
        ("h:1234", 2, -1, "--process-id must be from 0 to 1, not -1"),
        ("h:1234", 0, 0, "num_processes must be a positive int"),
        ("h:1234", None, 0, "go together"),
    ],
)
def test_an_address_or_a_number_that_is_none_is_refused(coordinator, count, rank, word):
    with pytest.raises(ValueError, match=word):
        start_processes(coordinator, count, rank)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("a\nb"), 1, "a b"),
        (Interrupted("saved", 1), 129, "saved"),
        (KeyboardInterrupt(), 130, "told to end"),
        (NotADirectoryError(20, "Not a directory", "a\x1bb"), 1, "a\\x1bb: Not a directory"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (RuntimeError("Unable to initialize backend 'nonsense'"), 2, "JAX_PLATFORMS"),
    ],
)
def test_an_error_that_is_no_defect_is_one_line_and_a_code(error, code, line):
    found = failure(error)
    assert found.code == code
    assert line in found.line
    assert found.line.isprintable()


def test_a_defect_has_no_line():
    assert failure(ZeroDivisionError()) is None
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert failure(caught.value) is None
