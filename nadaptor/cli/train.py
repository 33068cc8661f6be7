"""`nadaptor train NAME`: trains a network, or measures it, or says what training it would cost."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from nadaptor.cli.command import (
    changed,
    check_weights,
    parse_named,
    program,
    refuse_idle,
    say,
    spread_over_cores,
)
from nadaptor.configs.config import Config
from nadaptor.configs.named import CONFIGS
from nadaptor.models.config import ACTIVATIONS
from nadaptor.models.registry import MODELS
from nadaptor.training.options import Options

# Options that an evaluation has no use for.
OF_TRAINING = (
    "snapshot_steps",
    "max_minutes",
    "keep",
    "resident",
    "tensorboard",
    "coordinator",
    "num_processes",
    "process_id",
)
DESCRIPTION = "Trains a network, after the full-precision network that it starts from."


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """What the command is asked for."""

    config: Config
    # As "run options" in the help.
    options: Annotated[Options, tyro.conf.arg(name="run")]
    # Folder of runs; the run is a folder in it.
    workdir: Path = Path("runs")


def main(arguments: Sequence[str]) -> None:
    """Reads a config's name and what overrides it, and does what was asked for.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `nadaptor.training.train`, or there is no config of that name, or
            an option would do nothing.
        RunError: as `nadaptor.training.train`.
        Interrupted: as `nadaptor.training.train`.
    """
    known = f"{DESCRIPTION}\n\nFor example: {program('train')} digits_na --seed 1"
    models = f"\n\nNetworks for --model: {', '.join(MODELS)}"
    asked = parse_named(
        _commands(), "config", arguments, command="train", description=known, more=models
    )
    _refuse_idle(asked, CONFIGS[arguments[0]]())
    # A dry run has all weights at 1, and reads no file.
    if not asked.options.dry_run:
        check_weights(asked.options.init_from)
    # Each of several processes has the devices that it is given.
    if asked.options.coordinator is None:
        count = spread_over_cores(asked.options.num_devices)
        options = dataclasses.replace(asked.options, num_devices=count)
        asked = dataclasses.replace(asked, options=options)
    train_command(asked)


def train_command(asked: TrainCommand) -> None:
    """Does what was asked for, and says what came of it in its last line."""
    # Here, so that --help and a misspelt option need not wait for it.
    from nadaptor.training.dry_run import dry_run
    from nadaptor.training.loop import evaluate, train

    if asked.options.dry_run:
        dry_run(asked.config, asked.options)
    elif asked.options.evaluate_only:
        say("reading the network, and compiling it")
        measured = evaluate(asked.config, asked.workdir, asked.options)
        print(f"{measured}\naccuracy {100 * measured.accuracy:.2f}")
    else:
        print(f"checkpoint: {train(asked.config, asked.workdir, asked.options)}")


def _refuse_idle(asked: TrainCommand, default: Config) -> None:
    """Refuses what would do nothing. A dry run is of the same command without it: all counts."""
    options = asked.options
    if options.evaluate_only and options.dry_run:
        raise ValueError("--evaluate-only and --dry-run each take training's place; choose one")
    if not options.init_from:
        refuse_idle({"--new-head": options.new_head}, "without --init-from")
    if options.evaluate_only:
        refuse_idle(changed(options, Options(), OF_TRAINING), "with --evaluate-only")
        _check_trained(asked)
    quantizer = asked.config.quantizer
    used = {"activation", *ACTIVATIONS[quantizer.activation].attributes}
    idle = [f.name for f in dataclasses.fields(quantizer) if f.name not in used]
    given = changed(quantizer, default.quantizer, idle)
    refuse_idle(given, f"with --activation {quantizer.activation}")


def _check_trained(asked: TrainCommand) -> None:
    """Says what can be done where there is nothing yet to evaluate."""
    checkpoint = asked.workdir / asked.config.name / "checkpoint"
    if asked.options.init_from is None and not checkpoint.is_dir():
        raise ValueError(
            f"no checkpoint at {checkpoint}: train it first, without --evaluate-only, or name a "
            "file of weights with --init-from"
        )


def _commands() -> Mapping[str, Callable[[], TrainCommand]]:
    return {name: _command(make) for name, make in CONFIGS.items()}


def _command(make: Callable[[], Config]) -> Callable[[], TrainCommand]:
    def command() -> TrainCommand:
        return TrainCommand(make(), Options())

    command.__doc__ = make.__doc__
    return command
