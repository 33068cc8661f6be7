"""Fine-tunes a converted network in time: python -m nadaptor.finetune runs/digits_na/snn"""

from nadaptor.cli.command import run_command
from nadaptor.cli.finetune import main

if __name__ == "__main__":
    run_command(main)
