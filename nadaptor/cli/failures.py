"""What a command says when it fails, and its exit code: one line for everything but a defect."""

import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import jax

from nadaptor.errors import Interrupted, MissingPackageError, OutOfTimeError, RunError

_PACKAGE = str(Path(__file__).parents[1])
# A network of a command is one of these, and its lines are not the user's.
_MODELS = re.escape(os.path.join("nadaptor", "models") + os.sep)
# Letters of what jax says, which may be pages.
_SHOWN = 600
# sysexits.h: a failure that passes, the same command goes on.
OUT_OF_TIME = 75


class Failure(NamedTuple):
    """How a command ends: a line without the program's name, and an exit code."""

    line: str
    code: int


def failure(error: BaseException) -> Failure | None:
    """Returns how a command ends that raised an error; None for a defect, which is to be raised.

    Args:
        error: any.

    Returns:
        The line and the code: 2 for bad input, 1 for a run or a machine that failed, 75 for a run
        whose minutes are over, and 128 and the number of the signal for a run that one ended.

    Example:
        >>> failure(RunError("the loss is nan"))
        Failure(line='the loss is nan', code=1)
        >>> failure(KeyboardInterrupt()).code
        130
    """
    # Before RunError, of which it is one.
    if isinstance(error, OutOfTimeError):
        return Failure(_line(error), OUT_OF_TIME)
    if isinstance(error, RunError):
        return Failure(_line(error), 1)
    if isinstance(error, Interrupted):
        return Failure(_line(error), 128 + error.number)
    if isinstance(error, KeyboardInterrupt):
        return Failure("told to end; what was saved before stays", 128 + signal.SIGINT)
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return Failure(printable(f"{named}{error.strerror or error}"), 1)
    if isinstance(error, MemoryError):
        return Failure(f"out of memory, ask for less at once: {_line(error) or 'MemoryError'}", 1)
    # What jax's collectives on CPU raise is a ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
        return _of_jax(str(error))
    if isinstance(error, RuntimeError) and str(error).startswith("Unable to initialize backend"):
        return Failure(f"{_line(error)}; see JAX_PLATFORMS", 2)
    ours = isinstance(error, ValueError) and _is_ours(error)
    if ours or isinstance(error, MissingPackageError):
        return Failure(as_options(_line(error)), 2)
    return None


def end(error: BaseException) -> None:
    """Prints the line of an error and ends the program; returns where it is a defect.

    A process of several ends without waiting for the others, of which one may be gone.
    """
    if isinstance(error, BrokenPipeError):
        # The reader has seen enough, as that of `--help | head -1`; the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    if found := failure(error):
        print(f"{Path(sys.argv[0]).name}: {found.line}", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(found.code)
        sys.exit(found.code)


def printable(text: str) -> str:
    """Returns a text as one line that a terminal only shows: names may hold anything.

    Example:
        >>> printable("a\\x1b[31m b")
        'a\\\\x1b[31m b'
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def as_options(line: str) -> str:
    """Returns a message with the library's arguments as options, and no line of its own networks.

    Example:
        >>> as_options("max_pool at /x/nadaptor/models/vgg.py:9 in Vgg: take coding='sum'")
        'max_pool in Vgg: take --coding sum'
    """
    line = re.sub(rf" at \S*{_MODELS}\w+\.py:\d+", "", line)
    return re.sub(r"\b(nonaffine|coding)='(\w+)'", r"--\1 \2", line)


def _line(error: BaseException) -> str:
    return printable(str(error))


def _is_ours(error: BaseException) -> bool:
    # What a dependency raises by itself is a defect, and keeps its traceback.
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE)


def _of_jax(text: str) -> Failure | None:
    line = printable(text)[:_SHOWN]
    if jax.distributed.is_initialized():
        return Failure(f"another process of the run has ended or cannot be reached: {line}", 1)
    if "RESOURCE_EXHAUSTED" in text:
        return Failure(f"out of memory, take a smaller batch: {line}", 1)
    return None
