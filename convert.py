"""Converts a trained network to a spiking one: python convert.py runs/digits_na/checkpoint"""

from pathlib import Path
from typing import Annotated

import tyro

from nadaptor.cli.command import run_door
from nadaptor.conversion.calibrate import CalibrationOptions, RuleName, convert_calibrated
from nadaptor.training import convert


def main(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
    num_images: int | None = None,
    calibrate: RuleName | None = None,
    percent: float = 99.9,
    biases: bool = False,
    num_steps: int = 32,
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
        percent: Percentile of the nonzero activations, for --calibrate percentile.
        biases: Whether to calibrate the biases, too.
        num_steps: T to calibrate for: --calibrate mmse and --biases depend on it.
        data_dir: Folder of data sets; by default the environment's NADAPTOR_DATA_DIR.
    """
    out = checkpoint.parent / "snn" if out is None else out
    if calibrate is None:
        convert(checkpoint, out, 32 if num_images is None else num_images, data_dir)
    else:
        count = 128 if num_images is None else num_images
        options = CalibrationOptions(calibrate, percent, num_steps, biases, count)
        convert_calibrated(checkpoint, out, options)


if __name__ == "__main__":
    run_door(lambda: tyro.cli(main))
