"""What is handed out is whole: the sdist has the checkout, and the wheel runs alone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; print(build_meta.build_{}('dist'))"
# Not for users of a release: what the forge and the checks of a change read.
KERNELS = {f"nadaptor/_execution/{name}" for name in ("events.cc", "convolve.cc", "convolve.h")}
LEFT_OUT = (".ci/", ".github/", ".gitignore")


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not in a git checkout")
    return [name for name in listed.stdout.splitlines() if not name.startswith(LEFT_OUT)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tracked files: nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("copy")
    for name in tracked():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command, cwd, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_sdist_has_every_file_of_the_checkout(copy):
    file = run("-c", BUILD.format("sdist"), cwd=copy)[-1]
    with tarfile.open(copy / "dist" / file) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked() if (ROOT / name).exists()} <= packed
    assert {"conftest.py", "tests/conftest.py", "train.py", "docs/methods.md"} <= packed


@pytest.mark.slow
def test_the_wheel_alone_runs_the_code_of_the_readme_in_an_empty_folder(copy, tmp_path):
    file = run("-c", BUILD.format("wheel"), cwd=copy)[-1]
    with zipfile.ZipFile(copy / "dist" / file) as archive:
        names = archive.namelist()
        folders = {name.partition("/")[0] for name in names}
        assert {folder for folder in folders if "dist-info" not in folder} == {"nadaptor"}
        assert {"nadaptor/py.typed", *KERNELS} <= set(names)
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    five_lines = (ROOT / "tests" / "typed_readme.py").read_text()
    code = f"{five_lines}\nprint(nadaptor.__file__)\nprint(sim.outputs.shape)"
    # -S and the site's folder at the end: an editable installation would come first otherwise.
    site = os.pathsep.join([str(tmp_path / "site"), sysconfig.get_path("purelib")])
    lines = run("-S", "-c", code, cwd=tmp_path / "empty", PYTHONPATH=site)
    assert lines == [str(tmp_path / "site" / "nadaptor" / "__init__.py"), "(64, 4, 8)"]
