"""`nadaptor demo`: the digits ResNet with and without the noise adaptor, in one table."""

from collections.abc import Sequence

import tyro

from nadaptor.cli.command import program, use_every_core
from nadaptor.studies.demo import demo


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and runs the demo.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `demo`.
    """
    use_every_core()
    tyro.cli(demo, prog=program("demo"), args=list(arguments))
