"""Trains a network: python train.py digits_na --seed 1 --workdir runs/mine"""

from nadaptor.cli.command import parse_run, run_door, train_door

if __name__ == "__main__":
    run_door(lambda: train_door(parse_run(__doc__ or "")))
