"""The demo: the digits ResNet with and without the noise adaptor, over seeds, in one table.

Every step is what `train.py`, `convert.py` and `simulate.py` call; the demo repeats it and takes
means and deviations.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nadaptor._files import write_csv, write_json
from nadaptor.checkpoints.checkpoint import versions
from nadaptor.cli.command import run_door
from nadaptor.configs.config import replace
from nadaptor.reports.plots import Curve, plot_accuracy
from nadaptor.reports.tables import markdown
from nadaptor.training import convert, get_config, simulate_checkpoint, train

ROWS: Mapping[str, str] = {"without": "digits_lsq", "with": "digits_na"}
STEPS = (1, 2, 4, 8, 16, 32)


def demo(seeds: int = 3, workdir: Path = Path("runs/demo"), out: Path | None = None) -> None:
    """Trains, converts and simulates the digits ResNet with and without the noise adaptor.

    Prints one table of test accuracies, and saves it with the plot over all time steps.

    Args:
        seeds: Number of seeds, at least 2.
        workdir: Folder of the runs. What is there from an earlier demo is not trained again.
        out: Folder for table.csv, report.json and accuracy.png; by default "results" in workdir.

    Raises:
        ValueError: there are fewer than 2 seeds.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, for a deviation, not {seeds!r}")
    started = time.perf_counter()
    out = workdir / "results" if out is None else out
    reports = {row: [] for row in ROWS}
    for seed in range(seeds):
        for row, name in ROWS.items():
            print(f"\n[{time.perf_counter() - started:.0f} s] {row} the adaptor, seed {seed}")
            reports[row].append(run_one(name, seed, workdir / f"seed{seed}"))
    table = [{"noise adaptor": row, **summarise(of_row)} for row, of_row in reports.items()]
    seconds = time.perf_counter() - started
    write_csv(out / "table.csv", table)
    facts = {"cores": os.cpu_count(), "seconds": round(seconds), "versions": versions()}
    write_json(out / "report.json", {**facts, "table": table, "reports": reports})
    curves = [curve(row, of_row) for row, of_row in reports.items()]
    plot_accuracy(curves, "test accuracy, %", out / "accuracy.png")
    size = reports["with"][0]["num_images"]
    print(f"\nTest accuracy in %, {size} images, mean and deviation over {seeds} seeds\n")
    print(markdown(table))
    print(f"\n{seconds:.0f} s on {os.cpu_count()} cores; table, report and plot: {out}")


def run_one(name: str, seed: int, workdir: Path) -> dict[str, Any]:
    """Trains, converts and simulates one network; returns its report on the test set."""
    checkpoint = train(replace(get_config(name), seed=seed), workdir)
    snn = checkpoint.parent / "snn"
    if not snn.exists():
        convert(checkpoint, snn)
    return simulate_checkpoint(snn, max(STEPS), "test")


def summarise(reports: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns one row of the table: mean and sample deviation over reports, in %.

    Example:
        >>> one = {"ann_noisy": 0.9, "ann_deterministic": 0.9, "accuracy": [0.5] * 32}
        >>> summarise([one, {**one, "ann_noisy": 0.8}])["ANN noisy"]
        '85.0±7.1'
    """
    columns = {
        "ANN noisy": [r["ann_noisy"] for r in reports],
        "ANN deterministic": [r["ann_deterministic"] for r in reports],
        **{f"T = {t}": [r["accuracy"][t - 1] for r in reports] for t in STEPS},
    }
    return {
        name: f"{100 * np.mean(shares):.1f}±{100 * np.std(shares, ddof=1):.1f}"
        for name, shares in columns.items()
    }


def curve(row: str, reports: Sequence[Mapping[str, Any]]) -> Curve:
    """Returns the mean and deviation over reports at every time step, for the plot."""
    shares = np.array([report["accuracy"] for report in reports])
    return Curve(
        f"{row} noise adaptor", shares.mean(0).tolist(), shares.std(0, ddof=1).tolist()
    )


def main() -> None:
    """Reads the command line."""
    import tyro

    tyro.cli(demo)


if __name__ == "__main__":
    run_door(main)
