"""Runs a study: python -m nadaptor.study digits --seeds 3"""

from nadaptor.cli.command import run_command
from nadaptor.cli.study import main

if __name__ == "__main__":
    run_command(main)
