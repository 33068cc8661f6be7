"""`nadaptor study NAME`: compares methods, levels, seeds and corrections.

What is there from an earlier run is not done again: the same command goes on where it was stopped.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from nadaptor.cli.command import (
    changed,
    check_weights,
    parse_named,
    program,
    refuse_idle,
    spread_over_cores,
)
from nadaptor.configs.inference import TWO_STAGES
from nadaptor.studies.differences import named_network
from nadaptor.studies.named import STUDIES
from nadaptor.studies.study import Study
from nadaptor.studies.table import write_study
from nadaptor.studies.variants import FIXED_LEVELS
from nadaptor.studies.workers import share_study
from nadaptor.training.options import Options


@dataclasses.dataclass(frozen=True)
class StudyCommand:
    """What the command is asked for."""

    study: Study
    # As "run options" in the help.
    options: Annotated[Options, tyro.conf.arg(name="run")]
    # Folder of the runs and of the cells.
    workdir: Path
    # Folder for the CSV file, the table and the plots; by default "results" in workdir.
    out: Path | None = None
    # Processes of this machine that share the cells, each with its part of the cores; for CPUs.
    workers: int = 1
    # Network, as "noise_adaptor_p2", that all others are held against in a table of its own.
    against: str | None = None


def main(arguments: Sequence[str]) -> None:
    """Reads the study from the command line, runs what is missing of it, and writes the grid.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `share_study`, there is no study or network of that name, or an option would
            do nothing.
    """
    asked = parse_named(
        {name: _command(name, make) for name, make in STUDIES.items()},
        "study",
        arguments,
        command="study",
        description=f"{__doc__}\nFor example: {program('study')} digits --seeds 3",
    )
    _refuse_idle(asked, STUDIES[arguments[0]]())
    check_weights(asked.options.init_from)
    if asked.against is not None:
        named_network(asked.study, asked.against)
    count = spread_over_cores(asked.options.num_devices)
    options = dataclasses.replace(asked.options, num_devices=count)
    cells = share_study(asked.study, asked.workdir, options, asked.workers)
    out = asked.workdir / "results" if asked.out is None else asked.out
    write_study(asked.study, cells, out, asked.against)


def _refuse_idle(asked: StudyCommand, default: Study) -> None:
    """Refuses what would do nothing, or not what it says."""
    study, options = asked.study, asked.options
    alone = ("dry_run", "evaluate_only", "coordinator", "num_processes", "process_id")
    refuse_idle(
        changed(options, Options(), alone),
        "in a study, of which any number of processes share the cells in one workdir",
    )
    if not options.init_from:
        refuse_idle({"--new-head": options.new_head}, "without --init-from")
    if not set(study.corrections) & set(TWO_STAGES):
        given = changed(study, default, ["correction_steps"])
        refuse_idle(given, f"without --corrections {' or '.join(TWO_STAGES)}")
    if set(study.methods) <= FIXED_LEVELS.keys():
        refuse_idle(changed(study, default, ["levels"]), f"with {', '.join(study.methods)} alone")


def _command(name: str, make: Callable[[], Study]) -> Callable[[], StudyCommand]:
    def command() -> StudyCommand:
        return StudyCommand(make(), Options(), Path("runs") / name)

    command.__doc__ = make.__doc__
    return command
