"""A command of several processes that loses the others: one line, and none of what is no error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STACK = "".join(f"    @ 0x7f{i:010x}  xla::f()\n" for i in range(20))
LOST = "F1126 14:00:00.0 7 rendezvous.cc:138] Termination timeout for collective of 40 seconds\n"
GLOO = "terminate called after throwing an instance of 'gloo::IoException'\n"
OTHER = "F1126 14:00:00.0 7 shape.cc:1] Check failed: x == y\n"
SLOW = (
    "E1126 14:00:00.0 7 slow_operation_alarm.cc:73] \n\n" + 32 * "*" + "\n"
    "[Compiling module jit__fun for CPU] Very slow compile? If you want to file a bug, run\n"
    + 32 * "*" + "\n[Gloo] Rank 0 is connected to 1 peer ranks. Expected number is 1\n"
)  # fmt: skip


def supervised(words, end="os.abort()"):
    child = f"import os, sys; sys.stderr.write({words!r}); sys.stderr.flush(); {end}"
    program = (
        "import sys; from nadaptor.cli import supervised; supervised._HELD_SECONDS = 0.1;"
        f"sys.exit(supervised.supervise([sys.executable, '-c', {child!r}], 'train.py'))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("first", [LOST, GLOO])
def test_an_abort_for_want_of_the_others_is_one_line_and_no_stack(first):
    code, err = supervised(f"{first}{STACK}")
    assert code == 1
    assert err == (
        "train.py: another process of the run has ended or cannot be reached; the same command "
        "resumes\n"
    )


def test_an_abort_that_takes_long_is_one_line_as_well():
    slow = f"import time; time.sleep(0.5); sys.stderr.write({STACK!r}); os.abort()"
    code, err = supervised(LOST, slow)
    assert (code, len(err.splitlines())) == (1, 1)


def test_an_abort_of_another_kind_is_shown():
    assert supervised(f"{OTHER}{STACK}") == (134, f"{OTHER}{STACK}")


def test_what_is_no_error_is_left_out_and_other_lines_are_passed_on():
    assert supervised(f"a\n{SLOW}b\n", "sys.exit(3)") == (3, "a\nb\n")
