"""The published CIFAR-10 ResNet-20 in both codings, quantized to p levels with no training.

    python -m benchmarks.codings_resnet20 --data-dir DIR --init-from FILE

FILE is `resnet20-12fca82f.th` of akamaster/pytorch_resnet_cifar10, and DIR has the TFDS data set
`cifar10`. Each row is what these two commands print, for one p, coding and correction:

    nadaptor convert cifar10_resnet20 --init-from FILE --quantize P --coding CODING --out SNN
    nadaptor simulate SNN --split test --num-images N --num-steps T --correction CORRECTION

A row that is there from an earlier call is not measured again.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from nadaptor._files import write_csv, write_json
from nadaptor._provenance import provenance
from nadaptor.configs.inference import CorrectionName, Spikes, get_inference
from nadaptor.configs.named import get_config
from nadaptor.conversion.origin import Weights
from nadaptor.conversion.quantized import QuantizeOptions, convert_quantized
from nadaptor.evaluation.report import simulate_checkpoint
from nadaptor.neurons import Coding
from nadaptor.parallel.cores import use_every_core

SHOWN = (1, 2, 4, 6, 8, 10, 12, 16, 24)
# A row has reached the quantized accuracy where it stays within so much below it.
NEAR = 0.001


class Cell(NamedTuple):
    """One row of the table."""

    levels: int
    coding: Coding
    correction: CorrectionName


CELLS = [
    Cell(levels, coding, correction)
    for coding, correction in (("sum", "none"), ("rate", "none"), ("rate", "offset-spikes"))
    for levels in (8, 4, 2)
]


def main(
    data_dir: Path,
    init_from: Path,
    workdir: Path = Path("runs/codings_resnet20"),
    num_images: int = 10_000,
    num_steps: int = 24,
    out: Path = Path("results/codings_resnet20.csv"),
) -> None:
    """Measures the rows that are not there yet, and writes the table after each.

    Args:
        data_dir: Folder with the data set.
        init_from: The file of weights.
        workdir: Folder of the spiking networks and of what was measured.
        num_images: The first so many test images.
        num_steps: T.
        out: CSV file to write.
    """
    use_every_core()
    rows = []
    for cell in CELLS:
        path = workdir / f"{'-'.join(map(str, cell))}-n{num_images}-T{num_steps}.json"
        if not path.exists():
            report = _measure(cell, data_dir, init_from, workdir, num_images, num_steps)
            write_json(path, {**report, "made": provenance()})
        rows.append(row(cell, json.loads(path.read_text())))
        print(rows[-1], flush=True)
        write_csv(out, rows)


def row(cell: Cell, report: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a report of `simulate_checkpoint`."""
    quantized, accuracy = report["ann_deterministic"], report["accuracy"]
    below = [t for t, a in enumerate(accuracy, 1) if a < quantized - NEAR]
    reached = max(below, default=0) + 1
    return {
        **cell._asdict(),
        "images": report["num_images"],
        "quantized": f"{100 * quantized:.2f}",
        **{f"T = {t}": f"{100 * accuracy[t - 1]:.2f}" for t in SHOWN if t <= len(accuracy)},
        "reached at T": reached if reached <= len(accuracy) else f"> {len(accuracy)}",
        "spikes per neuron": f"{report['mean_spikes']:.2f}",
        "last spike": report["settled"] if report["settled"] is not None else "-",
    }


def _measure(
    cell: Cell, data_dir: Path, init_from: Path, workdir: Path, num_images: int, num_steps: int
) -> dict[str, Any]:
    snn = workdir / f"p{cell.levels}-{cell.coding}"
    if not snn.exists():
        weights = Weights(init_from, get_config("cifar10_resnet20"))
        options = QuantizeOptions(cell.levels)
        convert_quantized(weights, snn, options, data_dir, Spikes(cell.coding))
    inference = get_inference(cell.correction, coding=cell.coding)
    return simulate_checkpoint(snn, num_steps, "test", inference, data_dir, num_images)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
