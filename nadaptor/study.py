"""Compares methods, levels, seeds and corrections: python -m nadaptor.study --seeds 3."""

from pathlib import Path
from typing import Annotated

from nadaptor.training.doors import run_door
from nadaptor.training.grid import Study, run_study, write_study


def main() -> None:
    """Reads the study from the command line, runs what is missing of it, and writes the grid."""
    import tyro

    def study(
        study: Annotated[Study, tyro.conf.arg(name="")],
        workdir: Path = Path("runs/study"),
        out: Path | None = None,
    ) -> None:
        """Trains, converts and simulates a grid; goes on where an earlier run was stopped.

        Args:
            study: What to compare.
            workdir: Folder of the runs and of the cells.
            out: Folder for the CSV file, the table and the plots; by default "results" in workdir.
        """
        write_study(study, run_study(study, workdir), workdir / "results" if out is None else out)

    tyro.cli(study, description=__doc__)


if __name__ == "__main__":
    run_door(main)
