"""The demo: the digits ResNet with and without the noise adaptor, over seeds, in one table.

It is a study of two methods at one p, on test images, with a table of its own.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nadaptor._files import check_place, write_csv, write_json
from nadaptor.checkpoints.checkpoint import versions
from nadaptor.errors import RunError
from nadaptor.reports.plots import Curve, plot_accuracy
from nadaptor.reports.tables import markdown
from nadaptor.studies.study import Study
from nadaptor.studies.variants import Method
from nadaptor.studies.workers import share_study
from nadaptor.training.options import DEFAULT, Options

ROWS: Mapping[Method, str] = {"lsq": "without", "noise_adaptor": "with"}
STUDY = Study(
    methods=tuple(ROWS), levels=(2,), seeds=3, corrections=("none",), num_steps=32, split="test"
)


def run_demo(
    study: Study, workdir: Path, out: Path, options: Options = DEFAULT, workers: int = 1
) -> None:
    """Trains, converts and simulates the digits ResNet with and without the noise adaptor.

    Prints one table of test accuracies, and saves it with the plot over all time steps.

    Args:
        study: `STUDY`, or one with other sizes; its methods are those of `ROWS`.
        workdir: folder of the runs; what is there from an earlier demo is not trained again.
        out: folder for table.csv, report.json and accuracy.png.
        options: where to read and run.
        workers: processes that share the networks.

    Raises:
        ValueError: there are fewer than 2 seeds, or cores than workers.
        RunError: a network failed.
    """
    if study.seeds < 2:
        raise ValueError(f"seeds must be at least 2, for a standard deviation, not {study.seeds!r}")
    check_place(out)
    started = time.perf_counter()
    reports: dict[str, list[Mapping[str, Any]]] = {row: [] for row in ROWS.values()}
    for cell, measured in share_study(study, workdir, options, workers).items():
        if "failed" in measured:
            raise RunError(
                f"{cell.network.name}, seed {cell.seed}: {measured['failed']}; the table is of all "
                "networks, so choose another --workdir to try again"
            )
        reports[ROWS[cell.network.method]].append(measured)
    table = [
        {"noise adaptor": row, **summarise(of_row, study.reported_steps)}
        for row, of_row in reports.items()
    ]
    seconds = time.perf_counter() - started
    write_csv(out / "table.csv", table)
    facts = {"cores": os.cpu_count(), "seconds": round(seconds), "versions": versions()}
    write_json(out / "report.json", {**facts, "table": table, "reports": reports})
    curves = [curve(row, of_row) for row, of_row in reports.items()]
    plot_accuracy(curves, f"{study.split} accuracy, %", out / "accuracy.png")
    size = reports["with"][0]["num_images"]
    print(
        f"\n{study.split.capitalize()} accuracy in %, {size} images, mean and std over "
        f"{study.seeds} seeds\n\n{markdown(table)}\n\n"
        f"{seconds:.0f} s on {os.cpu_count()} cores; table, report and plot: {out}"
    )


def summarise(reports: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> dict[str, str]:
    """Returns one row of the table: mean and sample standard deviation over reports, in %.

    Example:
        >>> one = {"ann_noisy": 0.9, "ann": 0.9, "accuracy": [0.5] * 32}
        >>> summarise([one, {**one, "ann_noisy": 0.8}], [1, 32])["ANN noisy"]
        '85.0±7.1'
    """
    columns = {
        "ANN noisy": [r["ann_noisy"] for r in reports],
        "ANN deterministic": [r["ann"] for r in reports],
        **{f"T = {t}": [r["accuracy"][t - 1] for r in reports] for t in steps},
    }
    return {
        name: f"{100 * np.mean(fractions):.1f}±{100 * np.std(fractions, ddof=1):.1f}"
        for name, fractions in columns.items()
    }


def curve(row: str, reports: Sequence[Mapping[str, Any]]) -> Curve:
    """Returns the mean and standard deviation over reports at every time step, for the plot."""
    fractions = np.array([report["accuracy"] for report in reports])
    return Curve(
        f"{row} noise adaptor", fractions.mean(0).tolist(), fractions.std(0, ddof=1).tolist()
    )
