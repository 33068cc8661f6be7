"""What a run costs, before it is started: parameters, memory, and the time of a step."""

import contextlib
import time
from typing import NamedTuple

import jax

from nadaptor.configs.config import Config, check_config
from nadaptor.data.registry import open_split
from nadaptor.data.source import Source
from nadaptor.data.stand_in import stand_in
from nadaptor.parallel import start_processes
from nadaptor.training.options import Options
from nadaptor.training.run import first_state, open_run

STEPS = 3
MIB = 2**20


class Cost(NamedTuple):
    """What a dry run measures."""

    parameters: int
    temporary_bytes: int | None  # of a step on one device; None where the compiler does not say
    compile_seconds: float
    step_seconds: float
    total_steps: int


def dry_run(config: Config, options: Options) -> Cost:
    """Compiles the step of a run, does a few, and prints what they cost; trains and writes nothing.

    The weights are random: those that the run would start from are not needed. Nor is a data set
    whose size is known, as ImageNet's: where it is not there, the images are made up.

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
    placed = run.placed
    state = placed.replicate(first_state(run, None))
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    with contextlib.closing(run.batches()) as stream:
        batch = next(stream)
    images, labels, key = placed.put(batch.images), placed.put(batch.labels), run.keys.steps
    key = placed.replicate(key)
    started = time.perf_counter()
    compiled = placed.step.lower(state, images, labels, key).compile()
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    state, _ = jax.block_until_ready(placed.step(state, images, labels, key))
    started = time.perf_counter()
    for _ in range(STEPS):
        state, _ = jax.block_until_ready(placed.step(state, images, labels, key))
    seconds = (time.perf_counter() - started) / STEPS
    temporary = getattr(memory, "temp_size_in_bytes", None)
    cost = Cost(parameters, temporary, compile_seconds, seconds, run.total_steps)
    print(_report(cost, config.step.batch_size, run.devices.total))
    return cost


def _made_up(config: Config, options: Options) -> Source | None:
    """Images in place of those that are not there and need not be; None to read the config's."""
    try:
        open_split(config.data, "train", options.data_dir)
    except ValueError as error:
        images = stand_in(check_config(config).data)
        if images is None:
            raise
        print(f"images are made up, {images.size} of them: {error}")
        return images
    return None


def _report(cost: Cost, batch_size: int, num_devices: int) -> str:
    memory = "unknown" if cost.temporary_bytes is None else f"{cost.temporary_bytes / MIB:.0f} MiB"
    hours = cost.step_seconds * cost.total_steps / 3600
    return (
        f"parameters {cost.parameters}\n"
        f"memory {memory} a device beside the state, {num_devices} devices\n"
        f"compilation {cost.compile_seconds:.1f} s\n"
        f"step {1000 * cost.step_seconds:.1f} ms, {batch_size / cost.step_seconds:.0f} images/s\n"
        f"{cost.total_steps} steps would take {hours:.2f} hours"
    )
