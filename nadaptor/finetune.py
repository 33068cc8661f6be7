"""Fine-tunes a converted network in time: python -m nadaptor.finetune runs/digits_na/snn."""

from pathlib import Path
from typing import Annotated

from nadaptor.cli.command import run_door
from nadaptor.training.finetuning import FineTuning, digits_na_finetuned, fine_tune

DEFAULT = digits_na_finetuned()


def main() -> None:
    """Reads the command line and trains the network through its first time steps."""
    import tyro

    def finetune(
        checkpoint: Annotated[Path, tyro.conf.Positional],
        tuning: Annotated[FineTuning, tyro.conf.arg(name="")] = DEFAULT,
        out: Path | None = None,
    ) -> None:
        """Trains the folded weights and thresholds on what the network does in its first T steps.

        Args:
            checkpoint: The folder that convert.py printed.
            tuning: The run.
            out: Folder to make; by default "snn-finetuned" beside the checkpoint.
        """
        fine_tune(checkpoint, checkpoint.parent / "snn-finetuned" if out is None else out, tuning)

    tyro.cli(finetune, description=__doc__)


if __name__ == "__main__":
    run_door(main)
