"""Training, conversion and evaluation from named configs: what the command line calls."""

from nadaptor.training.config import Config
from nadaptor.training.configs import CONFIGS, get_config
from nadaptor.training.conversion import convert, load_snn
from nadaptor.training.errors import RunError
from nadaptor.training.loop import train
from nadaptor.training.reports import simulate_checkpoint, write_report

__all__ = [
    "CONFIGS",
    "Config",
    "RunError",
    "convert",
    "get_config",
    "load_snn",
    "simulate_checkpoint",
    "train",
    "write_report",
]
