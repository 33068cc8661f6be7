"""Code of a page runs and prints what the page shows; links and the names of the API are there."""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import re
from pathlib import Path

import pytest

import nadaptor
from nadaptor.cli.train import TrainCommand
from nadaptor.configs.config import Config
from nadaptor.configs.named import CONFIGS, get_config
from nadaptor.training.options import Options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
API = (ROOT / "docs" / "api.md").read_text()
# A fenced block of python, and the text that it prints where that follows.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def with_code():
    return [page for page in PAGES if BLOCK.search(page.read_text())]


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", with_code(), ids=name_of)
def test_code_of_a_page_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for code, shown in BLOCK.findall(page.read_text()):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, name_of(page), "exec"), names)
        assert printed.getvalue() == shown


def test_pages_with_code_are_found():
    assert {"README.md", "docs/your_network.md"} <= set(map(name_of, with_code()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def commands():
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = [block for page in PAGES for block in fenced.findall(page.read_text())]
    text = "\n".join(lines for language, lines in blocks if not language)
    return re.findall(r"^nadaptor (\w+) (\S+)(.*?)(?:#.*)?$", text, re.MULTILINE)


def options_of(command):
    if command == "train":
        kinds = (TrainCommand, Options, Config, *map(type, groups(get_config("digits_na"))))
        return {field.name for kind in kinds for field in dataclasses.fields(kind)}
    module = importlib.import_module(f"nadaptor.cli.{command}")
    taken = inspect.signature(getattr(module, f"{command}_command")).parameters.values()
    of_groups = {
        field.name
        for parameter in taken
        if dataclasses.is_dataclass(parameter.default)
        for field in dataclasses.fields(parameter.default)
    }
    return {parameter.name for parameter in taken} | of_groups


def groups(config):
    values = (getattr(config, field.name) for field in dataclasses.fields(config))
    return [value for value in values if dataclasses.is_dataclass(value)]


def test_the_commands_of_the_pages_have_the_options_that_they_are_given():
    assert {"train", "convert", "simulate"} <= {command for command, _, _ in commands()}
    for command, what, rest in commands():
        if command == "train":
            assert what in CONFIGS
        given = {option.replace("-", "_") for option in re.findall(r"--([\w-]+)", rest)}
        assert given <= options_of(command)


def load(name):
    """A program of the docs as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_results_are_those_of_their_files():
    pages = load("results")
    assert sum(page.read_text().count("<!-- from ") for page in pages.PAGES) > 10
    for page in pages.PAGES:
        assert page.read_text() == pages.refreshed(page.read_text()), "run make results"


def test_every_public_name_is_in_the_list_of_the_api():
    listed = re.findall(r"^\| `(nadaptor[\w.]*)\.(\w+)` \| \S", API, re.MULTILINE)
    missing = set(nadaptor.__all__) - {name for module, name in listed if module == "nadaptor"}
    gone = {(m, n) for m, n in listed if not hasattr(importlib.import_module(m), n)}
    assert missing | gone == set(), "run python docs/api.py"


def test_the_list_of_the_api_has_a_row_for_each_public_name():
    rows = load("api").page().splitlines()
    assert sum(row.startswith("| `nadaptor.") for row in rows) >= len(nadaptor.__all__)
    assert [row for row in rows if row.endswith("|  |")] == []
