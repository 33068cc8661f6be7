"""`nadaptor demo`: the digits ResNet with and without the noise adaptor, in one table."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from nadaptor.cli.command import program, read_words, spread_over_cores
from nadaptor.parallel import NumDevices
from nadaptor.parallel.cores import cores
from nadaptor.studies.demo import STUDY, run_demo
from nadaptor.training.options import Options


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and runs the demo.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `run_demo`.
        RunError: as `run_demo`.
    """
    read_words(demo_command, prog=program("demo"), args=list(arguments))


def demo_command(
    seeds: int = 3,
    workdir: Path = Path("runs/demo"),
    out: Path | None = None,
    num_devices: NumDevices = None,
    workers: int | None = None,
) -> None:
    """Trains, converts and simulates the digits ResNet with and without the noise adaptor.

    Prints one table of test accuracies, and saves it with the plot over all time steps.

    Args:
        seeds: Number of seeds, at least 2.
        workdir: Folder of the runs. What is there from an earlier demo is not trained again.
        out: Folder for table.csv, report.json and accuracy.png; by default "results" in workdir.
        num_devices: Devices to train on; by default all accelerators, or as many CPU devices, one
            per core, as divide the batch.
        workers: Processes that share the networks, each with its part of the cores; by default one
            per core on a CPU, but no more than seeds, and one with accelerators or --num-devices.
    """
    options = Options(num_devices=spread_over_cores(num_devices))
    study = dataclasses.replace(STUDY, seeds=seeds)
    if workers is None:
        alone = num_devices is not None or jax.default_backend() != "cpu"
        workers = 1 if alone else min(len(cores()), seeds)
    run_demo(study, workdir, out or workdir / "results", options, workers)
