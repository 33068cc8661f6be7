"""Networks that the paper does not have, trained with and without the noise adaptor, as spikes.

    python -m benchmarks.beyond --data-dir DIR

A narrow VGG-16 with norms on 1,000 images of CIFAR-10 at 32 pixels, with its max-pools and with
means in their place, and a small vision transformer on 2,000 at 16 pixels, p = 2. A full-precision
parent comes first for each network and seed, and both methods start from it. DIR has the TFDS data
set `cifar10`. What is there from an earlier call is not done again.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nadaptor._files import write_csv, write_json
from nadaptor._provenance import provenance
from nadaptor.configs.config import Config, replace
from nadaptor.configs.inference import Spikes
from nadaptor.configs.named import get_config
from nadaptor.conversion.convert import convert, load_snn
from nadaptor.data.registry import open_split
from nadaptor.evaluation.accuracy import ann_accuracy
from nadaptor.evaluation.report import SplitToMeasure, simulate_checkpoint
from nadaptor.neurons import Coding
from nadaptor.training.loop import train
from nadaptor.training.options import Options

SHOWN = (1, 2, 4, 8, 16)
# What each network sets in a config, and whether all between its neurons is affine.
VGG = {"model": "cifar_vgg16_bn", "width": 8, "image_size": 32, "train_size": 1000}
VIT = {"model": "cifar_vit", "width": 48, "image_size": 16, "train_size": 2000}
NETWORKS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "VGG-16, mean-pools": ({**VGG, "pool": "mean"}, True),
    "VGG-16, max-pools": ({**VGG, "pool": "max"}, False),
    "vision transformer": (VIT, False),
}
Method = Literal["lsq", "noise_adaptor"]


class Cell(NamedTuple):
    """One measurement: a network, how it was trained, and how its spikes carry numbers."""

    network: str
    coding: Coding
    method: Method
    seed: int


def main(
    data_dir: Path,
    workdir: Path = Path("runs/beyond"),
    out: Path = Path("results/beyond"),
    networks: tuple[str, ...] = tuple(NETWORKS),
    seeds: int = 2,
    epochs: int = 10,
    learning_rate: float = 0.03,
    split: SplitToMeasure = "test",
    num_images: int = 2000,
) -> None:
    """Measures what is not there yet, and writes `grid.csv` and `table.csv`.

    Args:
        data_dir: Folder with the data set.
        workdir: Folder of the networks and of what was measured.
        out: Folder of the tables.
        networks: Names in NETWORKS.
        seeds: How many seeds.
        epochs: Quantized epochs, after the parent's.
        learning_rate: Of the first quantized update.
        split: Images to measure on; the test set is for final figures.
        num_images: The first so many of them.
    """
    found: dict[Cell, dict[str, Any]] = {}
    for cell in cells_of(networks, seeds):
        path = workdir / split / f"{'-'.join(map(str, cell))}.json".replace(" ", "_")
        if not path.exists():
            print(*cell, flush=True)
            config = config_of(cell, epochs=epochs, learning_rate=learning_rate)
            report = _measure(cell, config, workdir, data_dir, split, num_images)
            write_json(path, {**report, "made": provenance()})
        found[cell] = json.loads(path.read_text())
    write_csv(out / "grid.csv", [_row(cell, report) for cell, report in found.items()])
    write_csv(out / "table.csv", table(found))


def cells_of(networks: Sequence[str], seeds: int) -> list[Cell]:
    """Returns the cells, seed by seed."""
    return [
        Cell(network, coding, method, seed)
        for seed in range(seeds)
        for network in networks
        for method in ("lsq", "noise_adaptor")
        for coding in ("rate", "sum")
    ]


def config_of(cell: Cell, **changes: Any) -> Config:
    """Returns the config that a cell's network is trained with."""
    return replace(
        get_config("cifar10_8px_lsq"),
        name=cell.method,
        activation=cell.method,
        seed=cell.seed,
        **NETWORKS[cell.network][0],
        **changes,
    )


def spikes_of(cell: Cell) -> Spikes:
    """Returns how the spikes of a cell's network carry numbers."""
    affine = NETWORKS[cell.network][1]
    # Sums take any operation, and rates are refused where there is nothing to average.
    return Spikes(cell.coding, "refuse" if affine or cell.coding == "sum" else "running_mean")


def table(found: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns a row for each network, coding and method, and one for the adaptor minus LSQ.

    Figures are means over the seeds, in % or points, with the sample deviation behind them; a
    difference is taken within a seed.
    """
    rows = []
    for network, coding in dict.fromkeys((cell.network, cell.coding) for cell in found):
        of_method = {
            method: {
                cell.seed: figures(report)
                for cell, report in found.items()
                if cell[:3] == (network, coding, method)
            }
            for method in ("lsq", "noise_adaptor")
        }
        plain, noisy = of_method.values()
        gain = {
            seed: {name: noisy[seed][name] - value for name, value in of_seed.items()}
            for seed, of_seed in plain.items()
        }
        head = {"network": network, "coding": coding, "seeds": str(len(plain))}
        for name, of_seeds in (*of_method.items(), ("difference", gain)):
            rows.append({**head, "trained with": name, **_means(list(of_seeds.values()))})
    return rows


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the accuracies of a table's row, in %."""
    accuracy = report["accuracy"]
    fractions = {
        "training": report["training_accuracy"],
        "quantized": report["ann_deterministic"],
        **{f"T = {t}": accuracy[t - 1] for t in SHOWN},
    }
    return {name: 100 * value for name, value in fractions.items()}


def _means(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, str]:
    columns = {name: [figures[name] for figures in of_seeds] for name in of_seeds[0]}
    return {
        name: f"{statistics.mean(values):.1f}"
        + (f"±{statistics.stdev(values):.1f}" if len(values) > 1 else "")
        for name, values in columns.items()
    }


def _row(cell: Cell, report: Mapping[str, Any]) -> dict[str, Any]:
    rounded = {name: f"{value:.2f}" for name, value in figures(report).items()}
    spikes = f"{report['mean_spikes']:.2f}"
    images = report["num_images"]
    return {**cell._asdict(), "images": images, **rounded, "spikes": spikes, **report["made"]}


def _measure(
    cell: Cell,
    config: Config,
    workdir: Path,
    data_dir: Path,
    split: SplitToMeasure,
    num_images: int,
) -> dict[str, Any]:
    """Trains and converts where that is still to be done, and simulates."""
    folder = workdir / f"{cell.network}-seed{cell.seed}".replace(" ", "_")
    checkpoint = train(config, folder, Options(data_dir=data_dir, num_devices=1))
    snn = checkpoint.parent / f"snn_{cell.coding}"
    if not snn.exists():
        convert(checkpoint, snn, data_dir=data_dir, spikes=spikes_of(cell))
    report = simulate_checkpoint(snn, SHOWN[-1], split, None, data_dir, num_images)
    model, variables, trained = load_snn(snn)
    images = open_split(trained.data, "train", data_dir)
    return {**report, "training_accuracy": ann_accuracy(model, variables, images)}


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
