"""Where a figure comes from: the day, the kind of machine, the revision of the code."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import jax

_ARCHITECTURES = {"x86_64": "x86", "AMD64": "x86", "aarch64": "ARM", "arm64": "ARM"}


def provenance() -> dict[str, str]:
    """Returns what a ledger says of a figure that is made now.

    Returns:
        `date`, in UTC; `machine`, its kind and never its name; `commit`, the revision of the
        checkout that this package lies in, empty outside of one, with a "+" where a file of the
        package was changed since.
    """
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "machine": machine(), "commit": revision()}


def machine() -> str:
    """Returns the kind of machine, such as "2-core x86 CPU" or "8 x NVIDIA H100"."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    kind = _ARCHITECTURES.get(platform.machine(), platform.machine())
    return f"{len(os.sched_getaffinity(0))}-core {kind} CPU"


def revision() -> str:
    """Returns the Git commit of the package's checkout; see `provenance`."""
    here = Path(__file__).parent
    # A package that is installed inside another project's checkout has no revision of its own.
    if _git(here, "ls-files", "--", "__init__.py"):
        changed = _git(here, "status", "--porcelain", "--", ".")
        return _git(here, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    return ""


def _git(folder: Path, *arguments: str) -> str:
    """What a git command prints; nothing where it fails, hangs or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def free_bytes() -> int:
    """The memory that is left here: a process that takes more is killed, and says nothing."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):
        # Without /proc all the memory that there is stands for what is free.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
