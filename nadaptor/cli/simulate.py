"""`nadaptor simulate CHECKPOINT`: measures a converted network at every time step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nadaptor._files import check_writable
from nadaptor.cli.command import program, use_every_core
from nadaptor.configs.inference import CorrectionName, get_inference
from nadaptor.evaluation.report import simulate_checkpoint, write_report


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and simulates.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `nadaptor.training.simulate_checkpoint`.
    """
    use_every_core()
    tyro.cli(simulate_command, prog=program("simulate"), args=list(arguments))


def simulate_command(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    num_steps: int = 32,
    split: Literal["validation", "test"] = "validation",
    correction: CorrectionName = "none",
    correction_steps: int = 4,
    num_images: int | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
) -> None:
    """Prints accuracy at every time step, spikes and early exit; saves CSV, JSON and a plot.

    Args:
        checkpoint: The folder that convert.py printed.
        num_steps: T, time steps.
        split: Images to read; the test set is for final figures, not for choices.
        correction: How to counter occasional noise at inference.
        correction_steps: Steps that offset spikes (rho) or SRP (tau) spend before the T counted.
        num_images: First images of the split to measure on; by default all.
        data_dir: Folder of data sets; by default the environment's NADAPTOR_DATA_DIR.
        out: Folder for the files; by default "simulation-SPLIT" beside the checkpoint, with
            "-CORRECTION" at the end where there is one.
    """
    name = f"simulation-{split}" if correction == "none" else f"simulation-{split}-{correction}"
    out = checkpoint.parent / name if out is None else out
    if checkpoint.exists():
        # Before all the work, not after it.
        check_writable(out)
    inference = get_inference(correction, correction_steps)
    report = simulate_checkpoint(checkpoint, num_steps, split, inference, data_dir, num_images)
    write_report(report, out)
