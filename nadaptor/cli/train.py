"""`nadaptor train NAME`: trains a network, or measures it, or says what training it would cost."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nadaptor.cli.command import parse_named, program
from nadaptor.configs.config import Config
from nadaptor.configs.named import CONFIGS
from nadaptor.models.registry import MODELS
from nadaptor.training.options import Options

DESCRIPTION = "Trains a network, after the full-precision network that it starts from."


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """What the command is asked for."""

    config: Config
    options: Options
    # Folder of runs; the run is a folder in it.
    workdir: Path = Path("runs")


def main(arguments: Sequence[str]) -> None:
    """Reads a config's name and what overrides it, and does what was asked for.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `nadaptor.training.train`, or there is no config of that name.
        RunError: as `nadaptor.training.train`.
        Interrupted: as `nadaptor.training.train`.
    """
    known = f"{DESCRIPTION}\n\nFor example: {program('train')} digits_na --seed 1"
    models = f"\n\nNetworks for --model: {', '.join(MODELS)}"
    asked = parse_named(
        _commands(), "config", arguments, command="train", description=known, more=models
    )
    train_command(asked)


def train_command(asked: TrainCommand) -> None:
    """Does what was asked for, and says what came of it in its last line."""
    from nadaptor.training.dry_run import dry_run
    from nadaptor.training.loop import evaluate, train

    if asked.options.dry_run:
        dry_run(asked.config, asked.options)
    elif asked.options.evaluate_only:
        measured = evaluate(asked.config, asked.workdir, asked.options)
        print(f"{measured}\naccuracy {100 * measured.accuracy:.2f}")
    else:
        print(f"checkpoint: {train(asked.config, asked.workdir, asked.options)}")


def _commands() -> Mapping[str, Callable[[], TrainCommand]]:
    return {name: _command(make) for name, make in CONFIGS.items()}


def _command(make: Callable[[], Config]) -> Callable[[], TrainCommand]:
    def command() -> TrainCommand:
        return TrainCommand(make(), Options())

    command.__doc__ = make.__doc__
    return command
