"""Training, conversion and evaluation from named configs: what the command line calls."""

from nadaptor._checks import extra

with extra("train", "nadaptor.training"):
    from nadaptor.configs.config import Config
    from nadaptor.configs.named import CONFIGS, get_config
    from nadaptor.conversion.convert import convert, load_snn
    from nadaptor.errors import RunError
    from nadaptor.evaluation.report import simulate_checkpoint, write_report
    from nadaptor.training.loop import train

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
