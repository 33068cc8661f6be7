"""What the fast convolution does to results: predictions that change, and the accuracy.

`python -m benchmarks.accuracy --data-dir DIR` simulates test images of CIFAR-10 with the direct and
with the fast convolution, on trained weights, and compares them at some numbers of steps.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.competitors import compile_simulator
from benchmarks.networks import Network, load
from nadaptor.training.doors import use_every_core
from nadaptor.training.files import markdown, write_csv
from nadaptor.training.provenance import machine

RESULTS = Path(__file__).parent / "results"
BATCH = 100
STEPS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare on."""

    # Folder with tfds/cifar10 and weights/resnet20-12fca82f.th.
    data_dir: Path
    # Test images, a multiple of 100.
    images: int = 2000
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> None:
    """Compares both networks, prints the table and writes accuracy.csv."""
    use_every_core()
    rows: list[dict[str, Any]] = []
    for name in ("resnet18", "resnet20"):
        network = load(name, options.data_dir, options.images)
        kinds = {"direct": False, "fast": True}
        classes = {k: predictions(network, fast_convolution=v) for k, v in kinds.items()}
        rows += [compare(name, network.labels, t, classes) for t in STEPS]
    print(markdown([{name: str(value) for name, value in row.items()} for row in rows]))
    write_csv(options.out / "accuracy.csv", rows)


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


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
