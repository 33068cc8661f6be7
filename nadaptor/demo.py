"""Runs the demo: python -m nadaptor.demo --seeds 3"""

from nadaptor.cli.command import run_command
from nadaptor.cli.demo import main

if __name__ == "__main__":
    run_command(main)
