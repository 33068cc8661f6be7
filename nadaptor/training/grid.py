"""The study: methods, levels, seeds and corrections as a grid, one small file a cell.

A cell is one trained network simulated with one correction. Each is written whole or not at all, so
that a study that was stopped goes on where it was; the table, the CSV file and the plots are made
from the cells.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nadaptor._checks import check_count
from nadaptor.training.config import Activation, Config
from nadaptor.training.configs import get_config
from nadaptor.training.conversion import convert, load_snn
from nadaptor.training.data import load_split
from nadaptor.training.errors import RunError
from nadaptor.training.evaluation import ann_accuracy, snn_accuracy
from nadaptor.training.files import markdown, write_bytes, write_csv, write_json
from nadaptor.training.inference import CorrectionName, get_inference
from nadaptor.training.loop import train
from nadaptor.training.reports import Curve, plot_panels

# Methods whose levels are not a choice: one network serves every p of the study.
FIXED_LEVELS: Mapping[str, int] = {"clipped_relu": 1, "ttrbr": 32}
Cells = Mapping["Cell", Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """What to compare."""

    # Activations to train with.
    methods: tuple[Activation, ...] = (
        "lsq", "noise_adaptor", "qcfs", "slip_relu", "ttrbr", "clipped_relu"
    )
    # p; ttrbr and clipped_relu have theirs fixed.
    levels: tuple[int, ...] = (1, 2, 4)
    # How many seeds: 0, 1, ...
    seeds: int = 5
    # Corrections at inference; one simulation each.
    corrections: tuple[CorrectionName, ...] = (
        "none", "negative-spikes", "offset-spikes", "srp"
    )
    # Named config that all runs share but for activation, levels and seed.
    config: str = "digits_lsq"
    # Network, where it is not the config's.
    model: str | None = None
    # Passes over the training images, where they are not the config's.
    epochs: int | None = None
    # Step size of the first update, where it is not the config's.
    learning_rate: float | None = None
    # T, time steps of each simulation.
    num_steps: int = 32
    # Steps that offset spikes (rho) and SRP (tau) spend before the T that count.
    correction_steps: int = 4
    # Images to measure on; the test set is for final figures, not for choices.
    split: Literal["validation", "test"] = "validation"


class Network(NamedTuple):
    """One network to train, for each seed."""

    method: Activation
    levels: int

    @property
    def name(self) -> str:
        """Its name in tables and folders."""
        return self.method if self.method in FIXED_LEVELS else f"{self.method}_p{self.levels}"


class Cell(NamedTuple):
    """One measurement of the study."""

    network: Network
    correction: CorrectionName
    seed: int


def run_study(study: Study, workdir: Path) -> Cells:
    """Trains, converts and simulates all of a study that is not there yet.

    Args:
        study: what to compare.
        workdir: folder of the runs, `seedN/NETWORK`, and of `cells`.

    Returns:
        Each cell's measurement: `ann`, accuracy of the quantized network; `accuracy`, the spiking
        network's at t = 1 to T; `total_steps`, with those of the correction; or `failed`, why
        there is none. Accuracies are shares, 0 to 1.

    Raises:
        ValueError: a name or count is out of range, or `workdir` holds cells of other settings.
    """
    for count, name in ((study.seeds, "seeds"), (study.num_steps, "num_steps")):
        check_count(count, name)
    cells = list(cells_of(study))
    for done, cell in enumerate(cells, start=1):
        path = _path(workdir, cell)
        if path.exists():
            _read(path, cell, study)
            continue
        print(f"[{done} of {len(cells)}] {cell.network.name}, {cell.correction}, seed {cell.seed}")
        settings = _settings(cell, study)
        write_json(path, {"settings": settings, **_measure(cell, study, workdir)})
    return {cell: _read(_path(workdir, cell), cell, study) for cell in cells}


def cells_of(study: Study) -> Iterator[Cell]:
    """Yields the cells of a study, seed by seed.

    Example:
        >>> cells = cells_of(Study(methods=("lsq", "ttrbr"), levels=(1, 2), seeds=1))
        >>> sorted({cell.network.name for cell in cells})
        ['lsq_p1', 'lsq_p2', 'ttrbr']
    """
    for seed in range(study.seeds):
        yield from (Cell(network, correction, seed) for network, correction in _lines(study))


def write_study(study: Study, cells: Cells, out: Path) -> None:
    """Writes a study as `grid.csv`, `table.md`, `accuracy.png` and `total_steps.png`.

    Args:
        study: what was compared.
        cells: from `run_study`.
        out: folder for the files.
    """
    write_csv(out / "grid.csv", _rows(study, cells))
    table = markdown([_summary(study, cells, n, c) for n, c in _lines(study)])
    write_bytes(out / "table.md", f"{table}\n".encode())
    print(f"\n{table}\n")
    label = f"{study.split} accuracy, %"
    by_levels = {
        f"p = {p}, correction: {study.corrections[0]}": [
            _curve(study, cells, network, study.corrections[0], network.method)
            for network in _networks(study)
            if network.levels == p or network.method in FIXED_LEVELS
        ]
        for p in study.levels
    }
    plot_panels(by_levels, label, out / "accuracy.png")
    chosen = study.levels[len(study.levels) // 2]
    by_method = {
        network.name: [_curve(study, cells, network, c, c) for c in study.corrections]
        for network in _networks(study)
        if network.levels == chosen or network.method in FIXED_LEVELS
    }
    plot_panels(by_method, label, out / "total_steps.png", total=True)


def _networks(study: Study) -> list[Network]:
    return [
        Network(method, levels)
        for method in study.methods
        for levels in ([FIXED_LEVELS[method]] if method in FIXED_LEVELS else study.levels)
    ]


def _lines(study: Study) -> list[tuple[Network, CorrectionName]]:
    return list(itertools.product(_networks(study), study.corrections))


def _measure(cell: Cell, study: Study, workdir: Path) -> dict[str, Any]:
    """Trains and converts where that is still to be done, and simulates."""
    inference = get_inference(cell.correction, study.correction_steps)
    try:
        checkpoint = train(_config(cell, study), workdir / f"seed{cell.seed}")
        snn = checkpoint.parent / "snn"
        if not snn.exists():
            convert(checkpoint, snn)
    except RunError as error:
        return {"failed": str(error)}
    model, variables, config = load_snn(snn)
    images = load_split(config.dataset, study.split, config.validation_size)
    result = snn_accuracy(model, variables, images, study.num_steps, inference=inference)
    return {
        "ann": ann_accuracy(model, variables, images),
        "accuracy": result.accuracy,
        "total_steps": inference.total_steps(study.num_steps),
    }


def _config(cell: Cell, study: Study) -> Config:
    config = get_config(study.config)
    return dataclasses.replace(
        config,
        name=cell.network.name,
        activation=cell.network.method,
        levels=cell.network.levels,
        seed=cell.seed,
        model=study.model or config.model,
        epochs=study.epochs or config.epochs,
        learning_rate=study.learning_rate or config.learning_rate,
    )


def _path(workdir: Path, cell: Cell) -> Path:
    return workdir / "cells" / f"{cell.network.name}-{cell.correction}-seed{cell.seed}.json"


def _settings(cell: Cell, study: Study) -> dict[str, Any]:
    """All that a cell's figures depend on."""
    of_study = {name: getattr(study, name) for name in ("num_steps", "correction_steps", "split")}
    return {**of_study, "config": dataclasses.asdict(_config(cell, study))}


def _read(path: Path, cell: Cell, study: Study) -> dict[str, Any]:
    found = json.loads(path.read_text())
    wanted = _settings(cell, study)
    if found["settings"] != wanted:
        names = [name for name, value in wanted.items() if found["settings"].get(name) != value]
        raise ValueError(
            f"{path} was measured with another {', '.join(names)}; choose another workdir"
        )
    return found


def _steps(study: Study) -> list[int]:
    """The time steps to report: powers of 2, and the last."""
    powers = {2**k for k in range(study.num_steps.bit_length())}
    return sorted(powers | {study.num_steps})


def _rows(study: Study, cells: Cells) -> list[dict[str, Any]]:
    """One row for each cell and reported t; no accuracy where the network failed."""
    return [
        {
            "method": cell.network.method,
            "levels": cell.network.levels,
            "correction": cell.correction,
            "seed": cell.seed,
            "ann": "" if "failed" in measured else f"{measured['ann']:.4f}",
            "t": t,
            "network_steps": _total(cell.correction, study, t),
            "accuracy": "" if "failed" in measured else f"{measured['accuracy'][t - 1]:.4f}",
        }
        for cell, measured in cells.items()
        for t in _steps(study)
    ]


def _total(correction: CorrectionName, study: Study, num_steps: int) -> int:
    """Network steps that T counted steps take."""
    return get_inference(correction, study.correction_steps).total_steps(num_steps)


def _summary(
    study: Study, cells: Cells, network: Network, correction: CorrectionName
) -> dict[str, str]:
    """One row of the table: means and sample deviations over the seeds that gave a network."""
    of_line = _of(study, cells, network, correction)
    return {
        "method": network.name,
        "correction": correction,
        "steps before": str(_total(correction, study, 0)),
        "seeds": str(len(of_line)),
        "ANN": _mean([m["ann"] for m in of_line]),
        **{f"T = {t}": _mean([m["accuracy"][t - 1] for m in of_line]) for t in _steps(study)},
    }


def _of(study: Study, cells: Cells, network: Network, correction: CorrectionName) -> list[Any]:
    measured = [cells[Cell(network, correction, seed)] for seed in range(study.seeds)]
    return [m for m in measured if "failed" not in m]


def _mean(shares: Sequence[float]) -> str:
    """Mean and sample deviation in %; no deviation of one, nothing of none."""
    if not shares:
        return "failed"
    mean = f"{100 * np.mean(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean}±{100 * np.std(shares, ddof=1):.1f}"


def _curve(
    study: Study, cells: Cells, network: Network, correction: CorrectionName, label: str
) -> Curve:
    of_line = _of(study, cells, network, correction)
    shares = np.array([m["accuracy"] for m in of_line] or [[np.nan] * study.num_steps])
    deviation = shares.std(0, ddof=1) if len(shares) > 1 else np.zeros(study.num_steps)
    return Curve(label, shares.mean(0).tolist(), deviation.tolist(), _total(correction, study, 0))
