"""Puts each row of the paper's Tables 1 to 5 beside ours: python -m benchmarks.paper_page

Ours are the reports that `simulate.py --out results/paper/ROW` writes; a row without one says what
it needs. The floating-point operations of a run are counted from its network, and the minutes
follow from them: they are estimates.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from nadaptor._files import write_bytes
from nadaptor.configs.config import Config
from nadaptor.configs.named import get_config
from nadaptor.configs.tables import CIFAR10, CORRECTED, IMAGENET, Row
from nadaptor.models import create
from nadaptor.reports.tables import markdown

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
IMAGES = {"cifar10": (45_000, (32, 32, 3), 10), "imagenet2012": (1_271_167, (224, 224, 3), 1000)}
# A third of the peak of float32 on an H100's tensor cores (TF32, 495e12 a second).
RATE = 165e12

INTRODUCTION = """# The paper's tables, and ours beside them

Made by `python -m benchmarks.paper_page` from the paper's figures in `nadaptor/configs/tables.py`
and from the reports in `results/paper/`. Accuracy in %; T = 256 stands for 256 and more. A row is
run by

    python train.py ROW --data-dir DIR
    python convert.py runs/ROW/checkpoint
    python simulate.py runs/ROW/snn --split test --num-steps 256 --out results/paper/ROW

and with a correction, as in Tables 4 and 5, by the same `simulate.py` with
`--correction CORRECTION --out results/paper/ROW-CORRECTION`.
"""
NEEDS = "not run: needs {what}"
ESTIMATED = """
Minutes are **estimates**, never measured: 3 times the multiply-adds of the network, twice as many
operations, all images and epochs, at 165e12 operations per second, a third of what one H100 has in
TF32; the full-precision network that a row starts from is not counted. `python train.py ROW
--dry-run` measures a step, and what memory it takes, on the machine at hand.
"""


class Line(NamedTuple):
    """A row of the paper with or without a correction."""

    row: Row
    correction: str
    snn: Any  # the paper's accuracy by T

    @property
    def name(self) -> str:
        """Of its folder in the results."""
        plain = self.correction == "none"
        return self.row.name if plain else f"{self.row.name}-{self.correction}"


def main(results: Path = Path("results/paper"), out: Path = Path("docs/results/paper.md")) -> None:
    """Writes the page.

    Args:
        results: Folder of the reports, one folder for each row.
        out: The page.
    """
    parts = [INTRODUCTION]
    for title, rows in (("CIFAR-10", CIFAR10), ("ImageNet", IMAGENET)):
        table = markdown([cells for line in lines(rows) for cells in _cells(line, results)])
        parts.append(f"\n## {title}\n\n{table}\n")
    write_bytes(out, "".join([*parts, ESTIMATED]).encode())
    print(f"written: {out}")


def lines(rows: Sequence[Row]) -> Iterator[Line]:
    """Yields the rows, each followed by those of the same network with corrections."""
    for row in rows:
        yield Line(row, "none", row.snn)
        for correction, snn in CORRECTED.get(row.name, {}).items():
            yield Line(row, correction, snn)


def read_report(line: Line, results: Path) -> dict[str, Any] | None:
    """Returns the report of a row, or None where there is none.

    Raises:
        ValueError: it is of another network, split or of part of the images.
    """
    path = results / line.name / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    dataset = get_config(line.row.name).data.dataset
    wanted = {"split": "test", "num_images": 10_000 if dataset == "cifar10" else 50_000}
    other = [name for name, value in wanted.items() if report[name] != value]
    config = report["config"]
    fields = {"model": line.row.model, "levels": line.row.levels, "epochs": line.row.epochs}
    other += [name for name, value in fields.items() if config[name] != value]
    if config["activation"] != line.row.activation or other:
        raise ValueError(f"{path} is of another {', '.join(other) or 'activation'}")
    return report


def minutes(config: Config) -> float:
    """Returns how long a run lasts on an H100, an estimate."""
    images, shape, classes = IMAGES[config.data.dataset]
    operations = 3 * 2 * multiply_adds(config.network.model, shape, classes)
    return operations * images * config.epochs / RATE / 60


@functools.cache
def multiply_adds(model: str, shape: tuple[int, int, int], classes: int) -> float:
    """Returns the multiply-adds of a network for one image, its convolutions' and dense layers'.

    Example:
        >>> round(multiply_adds("resnet50", (224, 224, 3), 1000) / 1e9, 1)
        4.1
    """
    network = create(model, classes)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    equations = jax.make_jaxpr(network.apply)(variables, image).jaxpr
    return float(sum(_of_equations(equations)))


def _of_equations(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        size = equation.outvars[0].aval.size if equation.outvars else 0
        if equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval
            yield size * kernel.size // kernel.shape[numbers.rhs_spec[0]]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            yield size * functools.reduce(lambda n, axis: n * shape[axis], contracted, 1)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _of_equations(inner)


def _cells(line: Line, results: Path) -> Iterator[dict[str, str]]:
    """The paper's line of the table, and ours below."""
    stated = {f"T = {t}": f"{line.snn[t]:.2f}" if t in line.snn else "" for t in STEPS}
    where = line.row.where if line.correction == "none" else line.correction
    ann = f"{line.row.ann:.2f}"
    yield {"row": line.name, "": f"the paper: {where}", "ANN": ann, **stated}
    report = read_report(line, results)
    if report is None:
        cost = minutes(get_config(line.row.name))
        text = f"about {cost:.0f} minutes" if cost < 120 else f"about {cost / 60:.0f} hours"
        text += " of an H100"
        if line.correction != "none":
            text = f"the network of {line.row.name}"
        empty = dict.fromkeys(("ANN", *stated), "")
        yield {"row": "", "": NEEDS.format(what=text), **empty}
        return
    ours = {
        f"T = {t}": f"{100 * report['accuracy'][t - 1]:.2f}" if t <= report["num_steps"] else ""
        for t in STEPS
    }
    yield {"row": "", "": "ours", "ANN": f"{100 * report['ann_deterministic']:.2f}", **ours}


if __name__ == "__main__":
    tyro.cli(main)
