"""Runs a study: python -m nadaptor.study digits --seeds 3

A study compares methods, levels p, seeds and corrections. What is there from an earlier run is not
done again: the same command goes on where it was stopped.
"""

import dataclasses
import sys
from pathlib import Path

from nadaptor._checks import check_name
from nadaptor.cli.command import run_door
from nadaptor.studies.named import STUDIES
from nadaptor.studies.study import Study, run_study
from nadaptor.studies.table import write_study
from nadaptor.training.options import Options


@dataclasses.dataclass(frozen=True)
class Door:
    """What the command is asked for."""

    study: Study
    options: Options
    # Folder of the runs and of the cells.
    workdir: Path
    # Folder for the CSV file, the table and the plots; by default "results" in workdir.
    out: Path | None = None


def main() -> None:
    """Reads the study from the command line, runs what is missing of it, and writes the grid."""
    import tyro

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if not name.startswith("-"):
        check_name(name, STUDIES, "study")
    doors = {
        name: (make.__doc__ or "", Door(make(), Options(), Path("runs") / name))
        for name, make in STUDIES.items()
    }
    door = tyro.extras.overridable_config_cli(
        doors, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )
    cells = run_study(door.study, door.workdir, door.options)
    write_study(door.study, cells, door.workdir / "results" if door.out is None else door.out)


if __name__ == "__main__":
    run_door(main)
