"""`nadaptor convert CHECKPOINT`: converts a trained network to a spiking one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from nadaptor.cli.command import program, refuse_idle, use_every_core
from nadaptor.conversion.calibrate import CalibrationOptions, RuleName, convert_calibrated
from nadaptor.conversion.convert import convert


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and converts.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `nadaptor.training.convert`, or `convert_calibrated`, or an option would do
            nothing.
        RunError: as `nadaptor.training.convert`.
    """
    use_every_core()
    tyro.cli(convert_command, prog=program("convert"), args=list(arguments))


def convert_command(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
    num_images: int | None = None,
    calibrate: RuleName | None = None,
    percent: float | None = None,
    biases: bool = False,
    num_steps: int | None = None,
    data_dir: Path | None = None,
) -> None:
    """Folds batch norm, checks the result, and writes the spiking network with its card.

    A full-precision network is converted with --calibrate: thresholds from training images, no
    further training.

    Args:
        checkpoint: The folder that train.py printed.
        out: Folder to make; by default "snn" beside the checkpoint.
        num_images: Validation images to check on (32), or training images to calibrate with (128).
        calibrate: Rule of the thresholds of a full-precision network.
        percent: Percentile of the nonzero activations, for --calibrate percentile (99.9).
        biases: Whether to calibrate the biases, too.
        num_steps: T to calibrate for, with --calibrate mmse or --biases (32).
        data_dir: Folder of data sets; by default the environment's NADAPTOR_DATA_DIR.
    """
    if calibrate is None:
        refuse_idle({"--biases": biases}, "without --calibrate")
    if calibrate != "percentile":
        refuse_idle({"--percent": percent}, "without --calibrate percentile")
    if calibrate != "mmse" and not biases:
        refuse_idle({"--num-steps": num_steps}, "without --calibrate mmse or --biases")
    out = checkpoint.parent / "snn" if out is None else out
    if calibrate is None:
        convert(checkpoint, out, 32 if num_images is None else num_images, data_dir)
    else:
        count = 128 if num_images is None else num_images
        percent = 99.9 if percent is None else percent
        steps = 32 if num_steps is None else num_steps
        options = CalibrationOptions(calibrate, percent, steps, biases, count)
        convert_calibrated(checkpoint, out, options, data_dir)
