"""Where an extra is not installed the error has its name; the core needs jax only."""

import importlib
import subprocess
import sys

import pytest

from nadaptor._checks import extra
from nadaptor.errors import MissingPackageError

# None in sys.modules is how Python says that there is no such module.
WITHOUT = """
import sys
for package in ("flax", "optax", "orbax", "grain", "matplotlib", "tyro", "tqdm", "safetensors"):
    sys.modules[package] = None
import importlib
import nadaptor, nadaptor.calibration, nadaptor.early_exit, nadaptor.analysis
for name in ("models", "interop", "training"):
    try:
        importlib.import_module("nadaptor." + name)
    except ImportError as error:
        print(error)
sys.argv = ["nadaptor", "simulate", "snn"]
from nadaptor.cli.main import main
main()
"""


def test_a_missing_package_is_named_with_the_extra_that_has_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    remedy = 'pip install "nadaptor[train]"'
    lines = done.stdout.splitlines()
    assert lines[0] == f"nadaptor.models needs flax: {remedy}"
    assert len(lines) == 3 and all(line.endswith(f": {remedy}") for line in lines)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"nadaptor: nadaptor simulate needs tyro: {remedy}"]


def test_a_missing_module_of_the_project_stays_a_defect():
    with pytest.raises(ModuleNotFoundError, match="no_such"), extra("train", "x"):
        importlib.import_module("nadaptor.no_such")


def test_another_error_of_an_import_stays_as_it_is():
    with pytest.raises(ZeroDivisionError), extra("train", "x"):
        raise ZeroDivisionError


def test_the_error_is_an_import_error_with_the_name_of_the_package():
    with pytest.raises(ImportError) as caught, extra("train", "x"):
        importlib.import_module("no_such_package.part")
    assert isinstance(caught.value, MissingPackageError)
    assert caught.value.name == "no_such_package"
