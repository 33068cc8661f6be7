"""Where a step runs: one device, several of one process by pmap or shard_map, several processes.

The step is the same pure function everywhere; this file alone knows of devices, placement and
donation. The state is one replicated pytree with no leading axis of devices. A batch is split in
its order: device d of D computes the d-th part, and averages over the axis `AXIS` make one step.
"""

import contextlib
import functools
import hashlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nadaptor._checks import check_count
from nadaptor.errors import PassingError

AXIS = "batch"
Parallel = Literal["pmap", "shard_map"]
# Of one process; None and "auto" leave the choice to `choose_devices`.
NumDevices = int | Literal["auto"] | None
# Of `step(state, images, labels, key)`: which arguments each device gets its part of.
STEP = (False, True, True, False)


class Devices(NamedTuple):
    """The devices of a run, of this process and in all."""

    local: tuple[Any, ...]  # of jax.Device
    process_index: int
    process_count: int

    @property
    def total(self) -> int:
        """Devices of all processes; each has as many as this one."""
        return len(self.local) * self.process_count

    @property
    def axis_name(self) -> str | None:
        """The mapped axis to build a network with; None on one device."""
        return AXIS if self.total > 1 else None

    def __str__(self) -> str:
        """In words, such as "2 CPU devices"."""
        kind = self.local[0].platform.upper()
        return f"{self.total} {kind} device{'s' if self.total > 1 else ''}"

    @property
    def in_flight(self) -> int:
        """Steps to start before the first of them must be done."""
        # On CPU, collectives of steps that nobody waits for deadlock after about 64 of them.
        return 1 if self.local[0].platform == "cpu" else 8


class Placed(NamedTuple):
    """A step on its devices, and how to bring its arguments there."""

    step: Any  # jitted or mapped; takes its state as a donation
    put: Callable[[Any], Any]  # this process's part of a batch, to its devices, without waiting
    replicate: Callable[[Any], Any]  # a pytree, whole, to every device


# Seconds until a process that never comes, or that ends without a word, is missed by the others.
TIMEOUT = 60
# Of a CPU device's part of a batch: with 64 images of 8x8 one device takes 0.6 of two's time, with
# 16 of 32x32 1.4 times as long (ResNet-20 on two cores).
_LEAST_PIXELS = 4096
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


def choose_devices(
    num_local: NumDevices,
    divided: int = 1,
    before: int | None = None,
    pixels: int | None = None,
) -> Devices:
    """Returns the devices to run on.

    Args:
        num_local: devices of this process; None and "auto" for all of them, or, where one process
            has only a CPU, for one (None) or as many as divide the images and pay ("auto").
        divided: images of a batch or micro-batch.
        before: CPU devices on which the run began, which it keeps where the number is not given.
        pixels: of those images, at the network's entrance; None for plenty. A CPU device with few
            waits for the others longer than it computes.

    Raises:
        ValueError: there are fewer, or there are several processes and it is not all.
    """
    local, processes = jax.local_devices(), jax.process_count()
    if num_local in (None, "auto"):
        one_cpu, most = local[0].platform == "cpu" and processes == 1, num_local == "auto"
        num_local = len(local)
        if one_cpu and before and before <= len(local) and divided % before == 0:
            num_local = before
        elif one_cpu:
            paying = len(local) if pixels is None else min(len(local), pixels // _LEAST_PIXELS)
            counts = [n for n in range(2, paying + 1) if divided % n == 0] if most else []
            num_local = max(counts, default=1)
    if processes > 1 and num_local != len(local):
        raise ValueError(f"num_devices must be {len(local)}, all of each process, not {num_local}")
    if check_count(num_local, "num_devices") > len(local):
        raise ValueError(
            f"num_devices {num_local} is more than the {len(local)} of this process; on CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_local} makes virtual ones"
        )
    return Devices(tuple(local[:num_local]), jax.process_index(), processes)


def check_batch(batch_size: int, micro_batches: int, devices: Devices) -> None:
    """Checks that a batch divides among devices and micro-batches.

    Raises:
        ValueError: it does not; the message names the nearest size that does.
    """
    parts = devices.total * micro_batches
    if batch_size % parts:
        nearest = max(1, round(batch_size / parts)) * parts
        raise ValueError(
            f"batch_size {batch_size} does not divide by {devices.total} devices times "
            f"{micro_batches} micro_batches; {nearest} does"
        )


def place_step(
    step: Callable[..., tuple[Any, Any]],
    devices: Devices,
    parallel: Parallel,
    divided: Sequence[bool] = STEP,
) -> Placed:
    """Compiles a step for its devices, the state donated and replicated.

    Args:
        step: pure; built with `devices.axis_name`, over which it averages. Its first argument is
            the state; it returns the new state and what it measured.
        devices: where to run.
        parallel: "pmap" or "shard_map"; on one device neither is needed, and jit alone serves.
        divided: for each argument, whether its leading axis is that of the batch, and each device
            gets its part; all others are whole on every device.

    Returns:
        The placed step.

    Raises:
        ValueError: `parallel` is neither.
    """
    if parallel not in ("pmap", "shard_map"):
        raise ValueError(f"parallel must be 'pmap' or 'shard_map', not {parallel!r}")
    if devices.total == 1:
        put = functools.partial(jax.device_put, device=devices.local[0])
        return Placed(jax.jit(step, donate_argnums=0), put, put)
    return (_with_pmap if parallel == "pmap" else _with_shard_map)(step, devices, divided)


def _with_pmap(
    step: Callable[..., tuple[Any, Any]], devices: Devices, divided: Sequence[bool]
) -> Placed:
    count = len(devices.local)
    # The state has no axis of devices, neither in nor out: out_axes=None takes one replica.
    mapped = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=tuple(0 if part else None for part in divided),
        out_axes=(None, None),
        donate_argnums=0,
        devices=None if devices.process_count > 1 else devices.local,
    )
    mesh = Mesh(np.array(devices.local), (AXIS,))

    def put(batch: Any) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), batch)
        return jax.device_put(parts, NamedSharding(mesh, PartitionSpec(AXIS)))

    whole = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    return Placed(mapped, put, whole)


def _with_shard_map(
    step: Callable[..., tuple[Any, Any]], devices: Devices, divided: Sequence[bool]
) -> Placed:
    mesh = Mesh(np.array(_all_devices(devices)), (AXIS,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
    # check_vma=True, the default, would multiply the gradients by the number of devices.
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=tuple(split.spec if part else whole.spec for part in divided),
        out_specs=(whole.spec, whole.spec),
        check_vma=False,
    )

    def put(batch: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(split, np.asarray(x)), batch
        )

    def everywhere(x: Any) -> jax.Array:
        # Between processes only host arrays can be placed, and a typed key is none.
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            words = jax.device_put(np.asarray(jax.random.key_data(x)), whole)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
        return jax.device_put(np.asarray(x), whole)

    replicate = functools.partial(jax.tree.map, everywhere)
    return Placed(jax.jit(mapped, donate_argnums=0), put, replicate)


def _all_devices(devices: Devices) -> Sequence[Any]:
    """Devices of all processes, in the order in which the processes hold the batch."""
    if devices.process_count == 1:
        return devices.local
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
