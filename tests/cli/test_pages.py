import os
import subprocess
import sys
from pathlib import Path

import pytest

from nadaptor.cli import pages

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
from nadaptor.cli.command import run_command
run_command(lambda words: print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *words))
"""


@pytest.mark.parametrize(
    ("called", "words", "wanted"),
    [
        ("train.py", ["digits_na", "--seed", "1"], True),
        ("/usr/bin/nadaptor", ["train", "digits_na"], True),
        ("/lib/nadaptor/study.py", ["fit"], True),
        ("/lib/nadaptor/demo.py", [], True),
        ("nadaptor", ["finetune", "--checkpoint", "x"], True),
        # Over before memory counts, or nothing that trains.
        ("train.py", ["digits_na", "--help"], False),
        ("train.py", ["digits_na", "--dry-run"], False),
        ("nadaptor", [], False),
        ("nadaptor", ["convert", "x"], False),
        ("simulate.py", ["x"], False),
    ],
)
def test_a_command_that_trains_wants_huge_pages(called, words, wanted):
    assert pages.wants_huge_pages(called, words, {}) == wanted


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "cuda"}, False),
        ({"GLIBC_TUNABLES": ""}, False),
        (pages.TUNABLES, False),
    ],
)
def test_what_the_user_has_said_of_memory_and_platform_stays(environment, wanted):
    assert pages.wants_huge_pages("train.py", ["digits_na"], environment) == wanted


@pytest.mark.parametrize("mode", ["always [madvise] never", "[always] madvise never", None])
def test_the_program_starts_again_in_its_place_once_and_only_where_asking_helps(mode, tmp_path):
    file, told = tmp_path / "train.py", tmp_path / "enabled"
    if mode is not None:
        told.write_text(mode)
    setting = f"from nadaptor.cli import pages; pages._MODE = pages.Path({str(told)!r})"
    file.write_text(f"{setting}\nprint('starts', flush=True)\n{SCRIPT}")
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    kept["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(file), "digits_na", "a b", "--name="]
    with subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate()
    again = mode is not None and "[madvise]" in mode
    value = pages.TUNABLES["GLIBC_TUNABLES"] if again else None
    said = f"{process.pid} {value} digits_na a b --name="
    assert out.splitlines() == ["starts"] * (2 if again else 1) + [said]
    assert process.returncode == 0


def test_what_another_program_calls_does_not_start_that_one_again(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "argv", ["train.py", "digits_na"])
    pages.take_huge_pages(["digits_na"])
