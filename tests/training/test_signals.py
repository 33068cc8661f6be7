"""How a run is told to end: every signal at its step, and during a compilation at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nadaptor.errors import ENDING, Interrupted
from nadaptor.training.signals import Told, told_to_end

ROOT = Path(__file__).parents[2]
# A compilation lets no handler of Python run; nor does this.
COMPILES = """
import hashlib, sys
from nadaptor.training.signals import told_to_end
sys.argv[0] = "train.py"
with told_to_end(1):
    print("compiles", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", ENDING)
def test_each_signal_ends_a_run_at_its_next_step_with_its_own_code(number):
    """A closed terminal and Ctrl-C as much as SIGTERM."""
    # A shell has what it runs in the background ignore Ctrl-C, and this test with it.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with told_to_end(1) as told:
            assert not told(0)
            os.kill(os.getpid(), number)
            assert told(1)
    finally:
        signal.signal(number, before)
    error = told.error("saved")
    assert isinstance(error, Interrupted)
    assert (error.number, str(error)) == (number, "told to end saved")


def test_a_process_of_several_that_hears_of_no_signal_does_not_say_that_it_was_told():
    error = Told(lambda _: True).error("after 2 steps")
    assert error.number == signal.SIGTERM
    assert str(error) == "this process or another was told to end after 2 steps"


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with told_to_end(1) as told:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not told(0)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_of_before_are_back_after_a_run():
    before = [signal.getsignal(number) for number in ENDING]
    with told_to_end(1):
        assert [signal.getsignal(number) for number in ENDING] != before
    assert [signal.getsignal(number) for number in ENDING] == before


def test_a_run_that_still_compiles_ends_at_once_and_in_one_line():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILES]
    process = subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "compiles\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err == (
        "train.py: told to end before its first step was done; the same command resumes\n"
    )
