"""Converts a trained network to a spiking one: python convert.py runs/digits_na/checkpoint"""

from nadaptor.cli.command import run_command
from nadaptor.cli.convert import main

if __name__ == "__main__":
    run_command(main)
