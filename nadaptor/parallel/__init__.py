"""Where a step runs: one device, several of one process by pmap or shard_map, several processes.

The step is the same pure function everywhere; this room alone knows of devices, placement and
donation. The state is one replicated pytree with no leading axis of devices. A batch is split in
its order: device d of D computes the d-th part, and averages over the axis `AXIS` make one step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nadaptor._checks import check_count
from nadaptor.parallel.processes import agree as agree
from nadaptor.parallel.processes import start_processes as start_processes

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


# Of a CPU device's part of a batch: with 64 images of 8x8 one device takes 0.6 of two's time, with
# 16 of 32x32 1.4 times as long (ResNet-20 on two cores).
_LEAST_PIXELS = 4096


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
