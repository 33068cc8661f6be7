import datetime
import re
import subprocess

import pytest

from nadaptor import _provenance as module
from nadaptor._provenance import machine, provenance, revision


def test_a_figure_has_a_day_a_kind_of_machine_and_a_revision():
    made = provenance()
    assert list(made) == ["date", "machine", "commit"]
    assert abs(datetime.date.fromisoformat(made["date"]) - datetime.date.today()).days <= 1
    assert re.fullmatch(r"\d+-core \w+ CPU", machine())


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(package / "_provenance.py"))
    git(tmp_path, "init", "-q")
    return tmp_path


def test_the_revision_is_the_commit_and_says_when_the_code_is_another(checkout):
    assert revision() == ""  # in a checkout, but not of it
    git(checkout, "add", "package")
    git(checkout, "commit", "-qm", "a")
    assert re.fullmatch("[0-9a-f]{12}", revision())
    (checkout / "notes.txt").write_text("not of the package")
    assert "+" not in revision()
    (checkout / "package" / "__init__.py").write_text("changed = True")
    assert re.fullmatch(r"[0-9a-f]{12}\+", revision())


def test_git_that_hangs_is_none(monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert revision() == ""


def test_without_git_there_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert revision() == ""
