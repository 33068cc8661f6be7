"""Several processes of one run: how they meet, and agree on what they were asked for."""

import contextlib
import functools
import hashlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nadaptor._checks import check_count
from nadaptor.errors import PassingError

# Seconds until a process that never comes, or that ends without a word, is missed by the others.
TIMEOUT = 60
# Bytes in which each process says what it was asked for, and letters of a value in them.
_AGREED, _SHOWN = 2**15, 80


def start_processes(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: int = TIMEOUT,
) -> None:
    """Connects the processes of a run; to be called before anything else uses jax.

    On TPU pods and under SLURM, where jax finds the others by itself, pass "auto" for
    `coordinator` and nothing more.

    Args:
        coordinator: HOST:PORT of process 0, "auto", or None for a run of one process.
        num_processes: processes of the run.
        process_id: which of them this is.
        timeout: seconds to wait for the others, and after which one that is silent counts as gone.

    Raises:
        ValueError: one of the three is given without the others, or is out of its range.
        PassingError: the others did not come in time.
    """
    if coordinator is None and num_processes is None and process_id is None:
        return
    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )
    if coordinator == "auto":
        initialize()
        return
    address = _checked(coordinator, num_processes, process_id)
    # jax itself ends a process that waits in vain by SIGABRT and a page.
    _meet(*address, timeout)
    initialize(*address)


def _checked(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int]:
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "--coordinator, --num-processes and --process-id go together, or --coordinator auto "
            f"alone; not {coordinator}, {num_processes} and {process_id}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator must be HOST:PORT, as 10.0.0.1:1234, not {coordinator}")
    if not 0 <= process_id < check_count(num_processes, "num_processes"):
        raise ValueError(f"--process-id must be from 0 to {num_processes - 1}, not {process_id}")
    return coordinator, num_processes, process_id


def _meet(coordinator: str, num_processes: int, process_id: int, timeout: int) -> None:
    """Waits at the coordinator's address until every process of a run has come there."""
    # An IPv6 address stands in brackets.
    host, _, port = coordinator.replace("[", "").replace("]", "").rpartition(":")
    until = time.monotonic() + timeout
    late = f"within {timeout} s; check that each process was started, and the address"
    if process_id > 0:
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1) as to:
                to.sendall(process_id.to_bytes(4, "big"))
                to.settimeout(max(1.0, until - time.monotonic()))
                if to.recv(1):
                    return
            time.sleep(0.1)
        raise PassingError(f"process 0 did not let process {process_id} in at {coordinator} {late}")
    with contextlib.ExitStack() as stack:
        both = socket.has_dualstack_ipv6()
        anywhere = ("::" if both else "", int(port))
        kind: Any = {"family": socket.AF_INET6 if both else socket.AF_INET, "dualstack_ipv6": both}
        try:
            door = stack.enter_context(socket.create_server(anywhere, **kind))
        except OSError as error:
            raise PassingError(
                f"cannot listen at {coordinator}: {error.strerror or error}"
            ) from error
        come: dict[int, socket.socket] = {}
        while len(come) < num_processes - 1:
            door.settimeout(max(0.01, until - time.monotonic()))
            try:
                other = stack.enter_context(door.accept()[0])
                other.settimeout(1)
                process = int.from_bytes(other.recv(4), "big")
                # What only looks for open ports says nothing, which is 0, or anything.
                if 0 < process < num_processes:
                    come[process] = other
            except OSError:
                if time.monotonic() < until:
                    continue
                missing = sorted(set(range(1, num_processes)) - come.keys())
                raise PassingError(
                    f"of {num_processes} processes, {missing} did not come to {coordinator} {late}"
                ) from None
        for process, other in come.items():
            try:
                other.sendall(b"!")
            except OSError as error:
                raise PassingError(f"process {process} came to {coordinator} and left") from error


def agree(fields: Mapping[str, Any]) -> None:
    """Checks that all processes of a run were asked for the same.

    Otherwise some would train one run and some another, and average the two; or wait for steps that
    never come.

    Args:
        fields: what must be the same everywhere, as JSON.

    Raises:
        ValueError: a field differs; the message names the first, and is the same everywhere.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    said = {name: _brief(value) for name, value in fields.items()}
    text = json.dumps(said).encode()[:_AGREED]
    mine = np.zeros(_AGREED, np.uint8)
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine))
    first, *others = [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]
    for process, other in enumerate(others, start=1):
        for field in sorted(first.keys() | other.keys()):
            if first.get(field) != other.get(field):
                raise ValueError(
                    f"process 0 has {field}={first.get(field)}, and process {process} has "
                    f"{other.get(field)}; start all with the same config, options, images and "
                    "versions"
                )


def _brief(value: Any) -> str:
    """A value as text, or its digest where that is long."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHOWN else hashlib.sha256(text.encode()).hexdigest()[:16]
