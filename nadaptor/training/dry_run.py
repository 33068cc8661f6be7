"""What a run costs, before it is started: parameters, memory, and the time of a step."""

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nadaptor._provenance import free_bytes
from nadaptor.configs.config import Config, check_config
from nadaptor.data.registry import open_split
from nadaptor.data.source import Source
from nadaptor.data.stand_in import stand_in
from nadaptor.parallel import Devices, start_processes
from nadaptor.training.options import Options
from nadaptor.training.run import open_run, state_shape

STEPS = 3
MIB = 2**20


class Cost(NamedTuple):
    """What a dry run measures."""

    parameters: int
    state_bytes: int  # of parameters, optimizer and statistics, all of them on each device
    temporary_bytes: int | None  # of a step on one device; None where the compiler does not say
    compile_seconds: float
    step_seconds: float | None  # None where a step does not fit into the memory
    total_steps: int


def dry_run(config: Config, options: Options) -> Cost:
    """Compiles the step of a run, does a few, and prints what they cost; trains and writes nothing.

    All weights are 1: those that the run would start from are not needed. Nor is a data set whose
    size is known, as ImageNet's: where it is not there, the images are made up. Where a step does
    not fit into the memory, the rest is printed all the same: a laptop says what a pod would do.

    Args:
        config: the run.
        options: where to read and run.

    Returns:
        What was measured.

    Raises:
        ValueError: as `nadaptor.training.train`.
    """
    start_processes(options.coordinator, options.num_processes, options.process_id)
    run = open_run(config, options, _made_up(config, options))
    placed, shapes = run.placed, state_shape(run)
    parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
    with contextlib.closing(run.batches()) as stream:
        batch = next(stream)
    key = placed.replicate(run.keys.steps)
    inputs = placed.put(batch.images), placed.put(batch.labels), key
    print(f"parameters {parameters}\ncompiling a step, which takes minutes on a CPU", flush=True)
    started = time.perf_counter()
    # From the shapes of the state: to compile a step takes no memory for what it will run on.
    compiled = placed.step.lower(shapes, *inputs).compile()
    compile_seconds = time.perf_counter() - started
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    seconds = None
    # All devices of a CPU have one memory.
    needed = (temporary or 0) * len(run.devices.local)
    if run.devices.local[0].platform != "cpu" or needed < free_bytes():
        state = placed.replicate(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes))
        seconds = _step_seconds(compiled, state, inputs)
    cost = Cost(parameters, _bytes(shapes), temporary, compile_seconds, seconds, run.total_steps)
    print(_report(cost, config.step.batch_size, run.devices))
    return cost


def _bytes(shapes: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _step_seconds(step: Callable[..., Any], state: Any, inputs: tuple[Any, ...]) -> float | None:
    """The mean time of some steps after a first one; None where the memory does not do."""
    try:
        state, _ = jax.block_until_ready(step(state, *inputs))
        started = time.perf_counter()
        for _ in range(STEPS):
            state, _ = jax.block_until_ready(step(state, *inputs))
    # An accelerator refuses what it cannot hold by an error; on a CPU the program would be killed.
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return (time.perf_counter() - started) / STEPS


def _made_up(config: Config, options: Options) -> Source | None:
    """Images in place of those that are not there and need not be; None to read the config's."""
    try:
        open_split(config.data, "train", options.data_dir)
    except ValueError:
        # A bad value is told as such, and not as images that are missing.
        images = stand_in(check_config(config).data)
        if images is None:
            raise
        print(f"no data is needed: {images.size} images are made up, as many as there would be")
        return images
    return None


def _memory(cost: Cost) -> str:
    """What a device must hold: on a CPU all devices have one memory."""
    state = f"memory of a device: state {cost.state_bytes / MIB:.0f} MiB"
    if cost.temporary_bytes is None:
        return f"{state}, and what a step takes, which is unknown"
    step, both = cost.temporary_bytes, cost.state_bytes + cost.temporary_bytes
    return f"{state} + a step {step / MIB:.0f} MiB = {both / MIB:.0f} MiB"


def _report(cost: Cost, batch_size: int, devices: Devices) -> str:
    known = f"{_memory(cost)}, {devices}\ncompilation {cost.compile_seconds:.1f} s\n"
    if cost.step_seconds is None:
        why = "it does not fit into the memory here"
        return f"{known}step unknown: {why}; {cost.total_steps} steps"
    hours = cost.step_seconds * cost.total_steps / 3600
    return (
        f"{known}step {1000 * cost.step_seconds:.1f} ms, "
        f"{batch_size / cost.step_seconds:.0f} images/s\n"
        f"{cost.total_steps} steps would take {hours:.2f} hours"
    )
