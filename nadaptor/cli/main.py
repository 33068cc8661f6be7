"""`nadaptor COMMAND`: the commands by name, each in a module that is imported alone."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nadaptor._checks import check_name, extra
from nadaptor._version import __version__
from nadaptor.cli.command import run_command

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "train": "trains a named config",
        "convert": "converts a trained network to a spiking one",
        "simulate": "measures a spiking network at every time step",
        "export": "writes a spiking network for what runs without this library",
        "study": "compares methods, levels, seeds and corrections",
        "finetune": "trains a spiking network through its first time steps",
        "demo": "does all of it on 8x8 digits, in minutes",
    }
)


def run(arguments: Sequence[str]) -> None:
    """Runs a command, or lists them.

    Args:
        arguments: the command's name, and its own arguments.

    Raises:
        ValueError: there is no command of that name; the message suggests the nearest.
        MissingPackageError: the command needs a package that is not installed.
    """
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"nadaptor {__version__}")
    elif name in ("-h", "--help"):
        print("usage: nadaptor COMMAND [OPTIONS]\n")
        print("\n".join(f"  {command:9} {text}" for command, text in COMMANDS.items()))
        print("\nnadaptor COMMAND --help says more.")
    else:
        module = f"nadaptor.cli.{check_name(name, COMMANDS, 'command')}"
        with extra("train", f"nadaptor {name}"):
            importlib.import_module(module).main(arguments[1:])


def main() -> None:
    """The console script."""
    run_command(run)


if __name__ == "__main__":
    # After `python -m` it is the path of this file.
    sys.argv[0] = "nadaptor"
    main()
