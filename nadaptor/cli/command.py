"""What the three commands share: named configs on the command line, and errors in one line."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from nadaptor._checks import check_name
from nadaptor.cli.failures import end
from nadaptor.configs.config import Config
from nadaptor.configs.named import CONFIGS
from nadaptor.training.options import Options


@dataclasses.dataclass(frozen=True)
class Run:
    """What `train.py` is asked for."""

    config: Config
    options: Options
    # Folder of runs; the run is a folder in it.
    workdir: Path = Path("runs")


def run_door(main: Callable[[], object]) -> None:
    """Runs a command, and ends the program with a code where it fails.

    Bad input, a run that failed, a machine that failed and a signal are one line on stderr and an
    exit code, as `nadaptor.cli.failures` says. Any other error is a defect and keeps its traceback.

    What jax compiles is kept for the next command in ~/.cache/nadaptor/xla, or where the user's
    JAX_COMPILATION_CACHE_DIR says; JAX_ENABLE_COMPILATION_CACHE=false turns that off.

    Args:
        main: the command.
    """
    _keep_compiled()
    try:
        main()
        sys.stdout.flush()
    except Exception as error:
        end(error)
        raise
    except KeyboardInterrupt as error:
        end(error)


def use_every_core() -> None:
    """Gives jax a CPU device for each core, where XLA_FLAGS do not say how many.

    XLA does not share operations as small as a simulator's among cores; a device for each simulates
    images of its own. Call it before jax is first used.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", _cores())


def parse_run(description: str) -> Run:
    """Reads a config's name and what overrides it from the command line.

    Args:
        description: shown by --help.

    Returns:
        The run.

    Raises:
        ValueError: there is no config of that name; the message suggests the nearest.
        SystemExit: --help was asked for, or an option is unknown (exit code 2).
    """
    import tyro

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if not name.startswith("-"):
        check_name(name, CONFIGS, "config")
    named = {name: (make.__doc__ or "", Run(make(), Options())) for name, make in CONFIGS.items()}
    return tyro.extras.overridable_config_cli(
        named, description=description, config=(tyro.conf.OmitArgPrefixes,)
    )


def train_door(run: Run) -> None:
    """Does what `train.py` was asked for, and says what came of it in its last line.

    Args:
        run: as `parse_run` gives it.

    Raises:
        ValueError: as `nadaptor.training.train`.
        RunError: as `nadaptor.training.train`.
        Interrupted: as `nadaptor.training.train`.
    """
    from nadaptor.training.dry_run import dry_run
    from nadaptor.training.loop import evaluate, train

    if run.options.dry_run:
        dry_run(run.config, run.options)
    elif run.options.evaluate_only:
        print(f"accuracy {100 * evaluate(run.config, run.workdir, run.options):.2f}")
    else:
        print(f"checkpoint: {train(run.config, run.workdir, run.options)}")


def _keep_compiled() -> None:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    # A "~" that stays is that of a user without a home.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and caches.is_absolute():
        jax.config.update("jax_compilation_cache_dir", str(caches / "nadaptor" / "xla"))
        # Small networks are a hundred programs of less than a second, jax's own limit.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cores() -> int:
    # Not every system can bind a process to some of its cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
