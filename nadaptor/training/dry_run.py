"""What a run costs, before it is started: parameters, memory, and the time of a step."""

import time
from typing import NamedTuple

import jax

from nadaptor.configs.config import Config
from nadaptor.data.loader import batches
from nadaptor.parallel import place_step, start_processes
from nadaptor.training.options import Options
from nadaptor.training.run import first_state, open_run
from nadaptor.training.step import build_step

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

    The weights are random: those that the run would start from are not needed.

    Args:
        config: the run.
        options: where to read and run.

    Returns:
        What was measured.

    Raises:
        ValueError: as `nadaptor.training.train`.
    """
    start_processes(options.coordinator, options.num_processes, options.process_id)
    run = open_run(config, options)
    step = build_step(config, run.images.spec, run.total_steps, run.devices.axis_name)
    placed = place_step(step, run.devices, config.step.parallel)
    state = placed.replicate(first_state(run, None))
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    stream = batches(
        run.images,
        config.step.augmentation,
        config.seed,
        config.step.batch_size,
        process_index=run.devices.process_index,
        process_count=run.devices.process_count,
    )
    batch = next(stream)
    stream.close()
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
