"""What the fast convolution does to results: predictions that change, and the accuracy.

`python -m benchmarks.accuracy --data-dir DIR` simulates test images of CIFAR-10 with the direct and
with the fast convolution, on trained weights, and compares them at some numbers of steps: on the
networks of the other benchmarks, whose thresholds at the maximum need many steps, or with `--snn`
on one that `convert.py` wrote.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.competitors import compile_simulator
from benchmarks.networks import Network, load
from benchmarks.simulator import read
from nadaptor._files import write_csv
from nadaptor._provenance import machine
from nadaptor.conversion.convert import load_snn
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_split
from nadaptor.parallel.cores import use_every_core
from nadaptor.reports.tables import markdown

RESULTS = Path(__file__).parent / "results"
BATCH = 100
STEPS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare on."""

    # Folder with tfds/cifar10 and weights/resnet20-12fca82f.th.
    data_dir: Path
    # A network trained on CIFAR-10, as convert.py wrote it, in place of the benchmarks' two.
    snn: Path | None = None
    # Test images, a multiple of 100.
    images: int = 2000
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> None:
    """Compares the networks, prints the table and adds to accuracy.csv."""
    use_every_core()
    rows: list[dict[str, Any]] = []
    for name, network in _networks(options):
        kinds = {"direct": False, "fast": True}
        classes = {k: predictions(network, fast_convolution=v) for k, v in kinds.items()}
        rows += [compare(name, network.labels, t, classes) for t in STEPS]
    print(markdown([{name: str(value) for name, value in row.items()} for row in rows]))
    table = options.out / "accuracy.csv"
    names = {row["network"] for row in rows}
    before = [row for row in read(table) if row["network"] not in names] if table.exists() else []
    write_csv(table, before + rows)


def compare(
    name: str, labels: np.ndarray, t: int, classes: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """One row of the table: after t steps."""
    at = {kind: found[t - 1] for kind, found in classes.items()}
    right = {f"accuracy_{k}": round(100 * float((p == labels).mean()), 2) for k, p in at.items()}
    differ = int((at["direct"] != at["fast"]).sum())
    where = {"machine": machine(), "network": name, "images": len(labels), "T": t}
    return {**where, **right, "predictions_that_differ": differ}


def predictions(network: Network, **options: Any) -> np.ndarray:
    """The class of each image after t steps, [T, N]."""
    images = network.images.reshape(-1, BATCH, *network.images.shape[1:])
    compiled = compile_simulator(network, images[0], max(STEPS), **options)
    batches = [np.asarray(compiled(network.variables, batch)).argmax(-1) for batch in images]
    return np.concatenate(batches, 1)


def _networks(options: Options) -> Iterator[tuple[str, Network]]:
    if options.snn is None:
        for name in ("resnet18", "resnet20"):
            yield name, load(name, options.data_dir, options.images)
        return
    model, variables, config = load_snn(options.snn)
    split = load_images(open_split(config.data, "test", options.data_dir, options.images))
    yield f"{config.network.model} {config.name}", Network(model, variables, *split)


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
