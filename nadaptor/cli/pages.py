"""Huge pages for a command that trains, which it can ask for at its very start alone.

XLA takes the memory of a step from the system anew at each step on a CPU, hundreds of MiB, and the
system clears it page by page when it is first touched: a good part of a step. By pages of 2 MiB in
place of 4 KiB that is nearly free. Where Linux gives them to those who ask, glibc asks if
`GLIBC_TUNABLES` says so when a program starts; so the program is started again in its own place.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nadaptor.cli.supervised import own_command

TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_TRAINING = {"train", "study", "finetune", "demo"}
# What is over before memory counts.
_SHORT = {"-h", "--help", "--dry-run"}
# "madvise" in brackets: to those who ask. "always" needs no asking.
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def take_huge_pages(words: Sequence[str], called: str | None = None) -> None:
    """Starts this program again with huge pages, if it trains and has none; else does nothing.

    Args:
        words: what follows the program's name.
        called: its name or path, if another than that by which it was started.
    """
    command = own_command(words)
    wanted = wants_huge_pages(called or sys.argv[0], words, os.environ) and _on_request()
    if command is not None and wanted:
        os.execve(sys.executable, command, {**os.environ, **TUNABLES})


def wants_huge_pages(called: str, words: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Says whether a command trains, on a CPU, in an environment that says nothing of the kind.

    Args:
        called: the program's name or path.
        words: what follows it.
        environment: of the program.

    Example:
        >>> wants_huge_pages("train.py", ["digits_na"], {})
        True
        >>> wants_huge_pages("nadaptor", ["simulate", "runs/digits_na/snn"], {})
        False
    """
    name = Path(called).stem
    command = words[0] if name == "nadaptor" and words else name
    if command not in _TRAINING or _SHORT & set(words):
        return False
    on_cpu = environment.get("JAX_PLATFORMS", "cpu") == "cpu"
    return on_cpu and not TUNABLES.keys() & environment.keys()


def _on_request() -> bool:
    try:
        return "[madvise]" in _MODE.read_text()
    except OSError:
        return False
