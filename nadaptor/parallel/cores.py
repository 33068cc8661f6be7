"""The cores of this process: a CPU device of jax for each, and an end with the parent."""

import ctypes
import os
import signal

import jax

# Of Linux's prctl.h.
_PR_SET_PDEATHSIG = 1


def cores() -> list[int]:
    """Returns the cores that this process may use, by their numbers."""
    # Not every system can bind a process to some of its cores.
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def use_every_core() -> bool:
    """Gives jax a CPU device for each core, where the user does not say how many.

    XLA shares small operations among cores badly or not at all; a device for each core computes
    images of its own. Call it before jax is first used.

    Returns:
        Whether it did; the user says it by XLA_FLAGS or JAX_NUM_CPU_DEVICES.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    said = "xla_force_host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ
    if not said:
        jax.config.update("jax_num_cpu_devices", len(cores()))
    return not said


def use_cores(numbers: list[int]) -> None:
    """Binds this process and the threads to come to some cores, where the system can.

    Args:
        numbers: of `cores`.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, numbers)


def end_with_parent() -> None:
    """Has this process told to end when its parent is killed; on Linux alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
