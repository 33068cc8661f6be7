"""Writes docs/api.md, the names of the API with the first line of each docstring."""

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).with_suffix(".md")
MODULES = (
    "nadaptor",
    "nadaptor.neurons",
    "nadaptor.quantization",
    "nadaptor.quantization.rules",
    "nadaptor.calibration",
    "nadaptor.early_exit",
    "nadaptor.analysis",
    "nadaptor.recording",
    "nadaptor.operations",
    "nadaptor.simulation.deployment",
    "nadaptor.models",
    "nadaptor.interop",
    "nadaptor.interop.nir",
    "nadaptor.interop.onnx",
    "nadaptor.conversion.weights",
    "nadaptor.checkpoints",
    "nadaptor.training",
)
HEAD = """# Names of the API

Made from the docstrings by `python docs/api.py`; `help(nadaptor.simulate)` has the whole of one:
arguments, shapes, errors, an example and its source. What is not listed here may change.
"""


def page() -> str:
    """Returns the text of the page."""
    return HEAD + "".join(map(_section, MODULES))


def _section(name: str) -> str:
    module = importlib.import_module(name)
    lines = [_row(name, value) for value in _public(module)]
    title = (module.__doc__ or "").partition("\n")[0]
    table = "\n".join(["| name | what it is |", "| --- | --- |", *lines])
    return f"\n## {name}\n\n{title}\n\n{table}\n"


def _public(module: ModuleType) -> list[str]:
    """The classes and functions of a module; its constants say what they are where they stand."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    names = getattr(module, "__all__", own)
    return [name for name in names if _has_docstring(getattr(module, name))]


def _has_docstring(value: object) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value)


def _row(module: str, name: str) -> str:
    value = getattr(importlib.import_module(module), name)
    first = (inspect.getdoc(value) or "").partition("\n")[0].replace("|", "\\|")
    return f"| `{module}.{name}` | {first} |"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(MODULES)} modules", file=sys.stderr)
