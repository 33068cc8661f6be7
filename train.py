"""Trains a network: python train.py digits_na --seed 1 --workdir runs/mine"""

from nadaptor.cli.command import run_command
from nadaptor.cli.train import main

if __name__ == "__main__":
    run_command(main)
