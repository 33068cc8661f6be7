"""What is handed out is whole: the sdist has all that its tests and documents need."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
# Not for users of a release: what the forge and the checks of a change read.
LEFT_OUT = (".ci/", ".github/", ".gitignore")


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not in a git checkout")
    return [name for name in listed.stdout.splitlines() if not name.startswith(LEFT_OUT)]


@pytest.mark.slow
def test_the_sdist_has_every_file_of_the_checkout(tmp_path):
    names = [name for name in tracked() if (ROOT / name).exists()]
    # In a copy, so that nothing is left in the checkout, and no old list of files is read.
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", BUILD]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "dist" / done.stdout.splitlines()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(names) <= packed
    assert {"conftest.py", "tests/conftest.py", "train.py", "docs/methods.md"} <= packed
