"""`nadaptor finetune CHECKPOINT`: fine-tunes a converted network in time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from nadaptor.cli.command import program, read_words, spread_over_cores
from nadaptor.parallel import NumDevices
from nadaptor.training.finetuning import FineTuning, digits_na_finetuned, fine_tune

DEFAULT = digits_na_finetuned()


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and trains the network through its first time steps.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `fine_tune`.
        RunError: as `fine_tune`.
    """
    read_words(finetune_command, prog=program("finetune"), args=list(arguments))


def finetune_command(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    tuning: Annotated[FineTuning, tyro.conf.arg(name="")] = DEFAULT,
    data_dir: Path | None = None,
    out: Path | None = None,
    num_devices: NumDevices = None,
) -> None:
    """Trains the folded weights and thresholds on what the network does in its first T steps.

    Args:
        checkpoint: The folder that nadaptor convert printed.
        tuning: The run.
        data_dir: Folder of data sets; by default the environment's NADAPTOR_DATA_DIR.
        out: Folder to make; by default "snn-finetuned" beside the checkpoint.
        num_devices: Devices to train on; by default all accelerators, or as many CPU devices, one
            per core, as divide the batch.
    """
    out = checkpoint.parent / "snn-finetuned" if out is None else out
    fine_tune(checkpoint, out, tuning, data_dir, spread_over_cores(num_devices))
