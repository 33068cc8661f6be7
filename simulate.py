"""Simulates a converted network: python simulate.py runs/digits_na/snn --num-steps 32"""

from nadaptor.cli.command import run_command
from nadaptor.cli.simulate import main

if __name__ == "__main__":
    run_command(main)
