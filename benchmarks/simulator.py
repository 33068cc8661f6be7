"""The simulator beside its peers: images x steps a second on the same weights, in one run.

`python -m benchmarks.simulator --data-dir DIR` makes the whole table, cell by cell; it goes on
where it was stopped, and adds to the table of another machine. With `--quick` it times the cells of
its last line alone, in under ten minutes, and writes no files. DIR holds `tfds/cifar10` and
`weights/`. Every competitor runs once a round, in turn; a ratio is the median over rounds of the
ratio within a round. The limit is T forward passes of the faster of torch's and JAX's ANN.
"""

import csv
import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.competitors import OURS, competitors, compile_simulator
from benchmarks.networks import Network, accuracy, load
from benchmarks.timing import fastest, in_turn, median, ratio
from nadaptor._files import write_csv, write_json
from nadaptor._provenance import machine
from nadaptor.parallel.cores import use_every_core

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "torch", "spikingjelly")
NETWORKS = ("resnet18", "resnet20")
# With thresholds at this percentile, behind the name of the network: for the share of spikes that a
# calibrated network has, with which events are faster. Without the peers.
CALIBRATED, PERCENTILE = " calibrated", 99.9
Seconds = Mapping[str, list[float]]  # of each competitor, round by round


class Cell(NamedTuple):
    """One comparison."""

    machine: str
    network: str
    batch: int
    T: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Folder with tfds/cifar10 and weights/resnet20-12fca82f.th.
    data_dir: Path
    # Weights of a CIFAR-10 ResNet-18: a checkpoint of train.py or a file in torch's layout. Without
    # them one is trained for 100 steps, and kept in runs/.
    resnet18: Path | None = None
    # Only the cells of the last line; writes no files.
    quick: bool = False
    # Networks whose cells to time; by default all.
    networks: tuple[str, ...] = (*NETWORKS, *(name + CALIBRATED for name in NETWORKS))
    # Images a cell; of calibrated networks 32.
    batches: tuple[int, ...] = (32, 100)
    # Rounds a cell.
    rounds: int = 7
    # Seconds after which no further round of a cell begins.
    cell_seconds: float = 60.0
    # Minutes after which no further cell begins: the next call goes on there.
    minutes: float = 1e9
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> None:
    """Times the cells that are not in the table yet, and prints the machine-readable line."""
    use_every_core()
    get = functools.cache(lambda name: _load(name, options))
    quick = [Cell(machine(), "resnet18", 32, 4), Cell(machine(), "resnet20", 32, 16)]
    table, start = options.out / "simulator.csv", time.monotonic()
    rows = [] if options.quick or not table.exists() else read(table)
    for cell in quick if options.quick else all_cells(options):
        if time.monotonic() - start > 60 * options.minutes or cell in by_cell(rows):
            continue
        rows += time_cell(get(cell.network), cell, options, best_settings(rows, cell))
        print(cell, _line(ratios(by_cell(rows)[cell], cell.T)), flush=True)
        if not options.quick:
            write_csv(table, rows)
            write_json(options.out / "simulator.json", summary(rows))
    found = {c: ratios(by_cell(rows)[c], c.T) for c in quick if c in by_cell(rows)}
    if not options.quick and set(NETWORKS) <= set(options.networks):
        sizes = [
            {"network": n, "T": t, "temporary_mib": memory_mib(get(n), t)}
            for n in NETWORKS
            for t in (4, 8, 16, 64, 256)
        ]
        write_csv(options.out / "simulator_memory.csv", sizes)
    line = {f"{c.network}_T{c.T}_{k}": v for c, kinds in found.items() for k, v in kinds.items()}
    print(_line({**line, "memory_T64_over_T4": memory_growth(get("resnet20"))}))


def all_cells(options: Options) -> list[Cell]:
    """The whole table of this machine; T = 4 first, where the peers' settings are compared."""
    return [
        Cell(machine(), network, batch, steps)
        for network in options.networks
        for batch in ((32,) if network.endswith(CALIBRATED) else options.batches)
        for steps in ((4, 16, 64) if network.endswith(CALIBRATED) else (4, 1, 16, 32))
    ]


def time_cell(
    network: Network, cell: Cell, options: Options, wanted: set[str] | None
) -> list[dict[str, Any]]:
    """Times the wanted competitors, or all, in one cell, and compares what they predict."""
    outputs: dict[str, np.ndarray] = {}
    calls = competitors(network, network.images[: cell.batch], cell.T, wanted)

    def keep(name: str) -> None:
        outputs[name] = calls[name]()

    kept = {name: functools.partial(keep, name) for name in calls}
    seconds = in_turn(kept, options.rounds, budget=options.cell_seconds)
    limit, reference = seconds[fastest(seconds, "limit")], outputs["ours direct"]
    rows = []
    for name, times in seconds.items():
        steps = 1 if name.startswith("limit") else cell.T
        rate = {"images_x_steps_per_second": round(cell.batch * steps / median(times), 1)}
        share = {"share_of_limit": round(ratio(limit, times) * steps, 3)}
        other = differing(outputs[name], reference) if outputs[name].ndim == 3 else ""
        raw = {"predictions_that_differ": other, "seconds": " ".join(f"{t:.4g}" for t in times)}
        rows.append({**cell._asdict(), "competitor": name, **rate, **share, **raw})
    return rows


def differing(outputs: np.ndarray, reference: np.ndarray) -> int:
    """Images whose prediction at any t is another than in the reference."""
    return int((outputs.argmax(-1) != reference.argmax(-1)).any(0).sum())


def ratios(seconds: Seconds, steps: int) -> dict[str, float]:
    """Ours against each peer's best setting, and against T passes of the ANN."""
    there = [n for n in ("spikingjelly", "limit", "qcfs") if any(n in name for name in seconds)]
    peers = {name: seconds[fastest(seconds, name)] for name in there}
    passes = {"spikingjelly": 1, "limit": steps, "qcfs": 1}
    return {
        f"vs_{name}_{kind}": passes[name] * ratio(peer, seconds[f"ours {kind}"])
        for kind in ("direct", "fast", "events")
        for name, peer in peers.items()
        if f"ours {kind}" in seconds  # cells of an earlier day have no events
    }


def best_settings(rows: Sequence[Mapping[str, Any]], cell: Cell) -> set[str] | None:
    """The better layout of each competitor at batch 32 and T = 4; None before that is known."""
    calibrated, network = cell.network.endswith(CALIBRATED), cell.network.removesuffix(CALIBRATED)
    seconds = by_cell(rows).get(cell._replace(network=network, batch=32, T=4))
    if seconds is None:
        return None
    heads = {name.removesuffix(" NHWC").removesuffix(" NCHW") for name in seconds}
    heads = {head for head in heads if "limit" in head} if calibrated else heads
    # "ours direct" is not to stand for "ours direct plain".
    return {fastest(seconds, head) for head in heads if "ours" not in head} | {
        name for name in OURS if "plain" not in name
    }


def by_cell(rows: Sequence[Mapping[str, Any]]) -> dict[Cell, dict[str, list[float]]]:
    """The seconds of each competitor in each cell of the table."""
    cells: dict[Cell, dict[str, list[float]]] = {}
    for row in rows:
        cell = Cell(row["machine"], row["network"], int(row["batch"]), int(row["T"]))
        times = [float(t) for t in row["seconds"].split()]
        cells.setdefault(cell, {})[row["competitor"]] = times
    return cells


def read(table: Path) -> list[dict[str, Any]]:
    """Reads the rows of an earlier call."""
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratios of every cell, with the versions of the packages."""
    cells = [
        {**cell._asdict(), **{k: round(v, 3) for k, v in ratios(seconds, cell.T).items()}}
        for cell, seconds in by_cell(rows).items()
    ]
    return {"versions": {p: importlib.metadata.version(p) for p in PACKAGES}, "cells": cells}


def memory_mib(network: Network, steps: int, **options: Any) -> float:
    """Temporary memory of the compiled simulator for 32 images, outputs excluded."""
    compiled = compile_simulator(network, network.images[:32], steps, **options)
    return round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 2)


def memory_growth(network: Network) -> float:
    """Memory at T = 64 over that at T = 4, by two steps a chunk.

    Of its own accord the simulator has all of T = 4 in one chunk, with no state to carry to a next.
    """
    size = functools.partial(memory_mib, network, steps_per_chunk=2)
    return size(64) / size(4)


def _load(name: str, options: Options) -> Network:
    plain, percentile = name.removesuffix(CALIBRATED), PERCENTILE if CALIBRATED in name else None
    weights = options.resnet18 if plain == "resnet18" else None
    network = load(plain, options.data_dir, 100, weights, percentile)
    print(f"{name}: {accuracy(network):.0%} of 100 test images right as an ANN", flush=True)
    return network


def _line(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.3f}" for name, value in values.items())


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
