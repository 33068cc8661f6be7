"""Sphinx's settings: the site is the pages as they stand in the checkout, and the API's docstrings.

Built by `make docs`, which calls `sphinx-build -c docs . build/site`: the source is the checkout,
so that a link leads to the same place on the site as in the repository.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
REFERENCE = ROOT / "docs" / "reference"

project = "nadaptor"
author = "the nadaptor authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    "README.md",
    "RESULTS.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/**.md",
]
html_theme = "furo"
html_title = "nadaptor"
myst_heading_anchors = 3
# A docstring has `f(x)` for code, as the comments of this project do.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"

PAGES = {
    "Guides": (
        "docs/quickstart",
        "docs/your_network",
        "docs/pretrained",
        "docs/choosing",
        "docs/coding",
        "docs/command_line",
        "docs/insight",
        "docs/deploy",
        "docs/imagenet",
        "docs/paper_scale",
    ),
    "How it works": (
        "docs/transformations",
        "docs/methods",
        "docs/numerics",
        "docs/drills",
        "docs/design",
        "docs/glossary",
    ),
    "Results": (
        "RESULTS",
        "docs/results/paper",
        "docs/results/fit",
        "docs/results/recipe",
        "docs/results/cifar10_cpu",
        "docs/results/beyond",
        "docs/results/digits",
        "docs/results/speed",
    ),
    "Reference": ("docs/api", "CONTRIBUTING", "SECURITY", "CHANGELOG"),
}


def _api() -> Any:
    """docs/api.py, which knows the modules that are public."""
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_reference() -> list[str]:
    """Writes a page for each public module, and returns their names."""
    modules = _api().MODULES
    REFERENCE.mkdir(exist_ok=True)
    for name in modules:
        page = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
        file = REFERENCE / f"{name}.md"
        if not file.exists() or file.read_text() != page:
            file.write_text(page)
    return [f"docs/reference/{name}" for name in modules]


def _toctree(pages: Any, caption: str = "") -> str:
    lines = "\n".join(f"/{page}" for page in pages)
    head = f":caption: {caption}\n" if caption else ""
    return f"\n\n```{{toctree}}\n:hidden:\n{head}\n{lines}\n```\n"


def _add_trees(app: Any, name: str, source: list[str]) -> None:
    """Adds the table of contents of the site, which the pages in the repository do without."""
    if name == root_doc:
        source[0] += "".join(_toctree(pages, caption) for caption, pages in PAGES.items())
    elif name == "docs/api":
        source[0] += _toctree(write_reference())


def _add_index(app: Any, error: Exception | None) -> None:
    """Leads from the address of the site to its first page."""
    if error is None:
        page = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Any) -> None:
    """Is called by Sphinx."""
    write_reference()
    app.connect("source-read", _add_trees)
    app.connect("build-finished", _add_index)
