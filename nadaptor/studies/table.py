"""The tables and plots of a study, beside the paper's figures where it has them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nadaptor._files import write_bytes, write_csv
from nadaptor.configs.inference import CorrectionName, get_inference
from nadaptor.configs.paper import published
from nadaptor.reports.plots import Curve, plot_panels
from nadaptor.reports.tables import markdown
from nadaptor.studies.differences import write_against, write_differences
from nadaptor.studies.study import (
    Cell,
    Cells,
    Network,
    Study,
    config_of,
    lines_of,
    networks_of,
)
from nadaptor.studies.variants import FIXED_LEVELS


def write_study(study: Study, cells: Cells, out: Path, against: str | None = None) -> None:
    """Writes a study as `grid.csv`, `table.md`, `accuracy.png` and `total_steps.png`.

    Where it has the noise adaptor and LSQ, their differences are written, too.

    Args:
        study: what was compared.
        cells: from `run_study`.
        out: folder for the files.
        against: a network, as `noise_adaptor_p2`, from which the differences of all others are
            written, too.

    Raises:
        ValueError: the study has no network of that name.
    """
    write_csv(out / "grid.csv", _rows(study, cells))
    lines = [_summary(study, cells, n, c) for n, c in lines_of(study)]
    table = markdown([row for line in lines for row in line])
    write_bytes(out / "table.md", f"{table}\n".encode())
    print(f"\n{table}\n")
    label = f"{study.split} accuracy, %"
    networks = networks_of(study)
    # A method whose levels are fixed stands in every panel, to be compared with.
    by_levels = {
        ", ".join([f"p = {p}", *(f"{name} {value}" for name, value in values)]): [
            _curve(study, cells, network, study.corrections[0], network.method)
            for network in networks
            if network.values == values and (network.levels == p or network.method in FIXED_LEVELS)
        ]
        for p in study.levels
        for values in dict.fromkeys(network.values for network in networks)
    }
    plot_panels(by_levels, label, out / "accuracy.png")
    chosen = study.levels[len(study.levels) // 2]
    by_method = {
        network.name: [_curve(study, cells, network, c, c) for c in study.corrections]
        for network in networks_of(study)
        if network.levels == chosen or network.method in FIXED_LEVELS
    }
    plot_panels(by_method, label, out / "total_steps.png", total=True)
    write_differences(study, cells, out)
    if against is not None:
        write_against(study, cells, against, out)


def _rows(study: Study, cells: Cells) -> list[dict[str, Any]]:
    """One row for each cell and reported t; no accuracy where the network failed."""
    return [
        {
            "method": cell.network.method,
            "levels": cell.network.levels,
            **dict(cell.network.values),
            "correction": cell.correction,
            "seed": cell.seed,
            "ann": _fraction(measured.get("ann")),
            "ann_noisy": _fraction(measured.get("ann_noisy")),
            "training_accuracy": _fraction(measured.get("training_accuracy")),
            "t": t,
            "network_steps": _total(cell.correction, study, t),
            "accuracy": _fraction(None if "failed" in measured else measured["accuracy"][t - 1]),
            **measured["made"],
        }
        for cell, measured in cells.items()
        for t in study.reported_steps
    ]


def _fraction(value: float | None) -> str:
    """A fraction for the CSV file; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"


def _total(correction: CorrectionName, study: Study, num_steps: int) -> int:
    """Network steps that T counted steps take."""
    return get_inference(correction, study.correction_steps).total_steps(num_steps)


def _summary(
    study: Study, cells: Cells, network: Network, correction: CorrectionName
) -> list[dict[str, str]]:
    """Means and their std over the seeds that gave a network; below, what the paper states."""
    of_line = _of(study, cells, network, correction)
    noisy, steps = [m["ann_noisy"] for m in of_line], study.reported_steps
    measured = {
        "method": network.name,
        "correction": correction,
        "steps before": str(_total(correction, study, 0)),
        "seeds": str(len(of_line)),
        "ANN noisy": "" if None in noisy else _mean(noisy),
        "ANN": _mean([m["ann"] for m in of_line]),
        **{f"T = {t}": _mean([m["accuracy"][t - 1] for m in of_line]) for t in steps},
    }
    paper = published(config_of(Cell(network, correction, 0), study), correction)
    if paper is None:
        return [measured]
    stated = {f"T = {t}": f"{accuracy:.2f}" for t, accuracy in paper.snn.items()}
    beside = {"method": "the paper", "ANN": f"{paper.ann:.2f}", **stated}
    return [measured, {column: beside.get(column, "") for column in measured}]


def _of(study: Study, cells: Cells, network: Network, correction: CorrectionName) -> list[Any]:
    measured = [cells[Cell(network, correction, seed)] for seed in range(study.seeds)]
    return [m for m in measured if "failed" not in m]


def _mean(fractions: Sequence[float]) -> str:
    """Mean and sample standard deviation in %; none of one, nothing of none."""
    if not fractions:
        return "failed"
    mean = f"{100 * np.mean(fractions):.2f}"
    return mean if len(fractions) == 1 else f"{mean}±{100 * np.std(fractions, ddof=1):.2f}"


def _curve(
    study: Study, cells: Cells, network: Network, correction: CorrectionName, label: str
) -> Curve:
    of_line = _of(study, cells, network, correction)
    # A network that failed keeps its place in the legend.
    fractions = np.array([m["accuracy"] for m in of_line] or [[np.nan] * study.num_steps])
    std = fractions.std(0, ddof=1) if len(fractions) > 1 else np.zeros(study.num_steps)
    return Curve(label, fractions.mean(0).tolist(), std.tolist(), _total(correction, study, 0))
