"""The training step: the noise adaptor beside `lsq` and ReLU, and beside torch's step.

`python -m benchmarks.training` makes the whole table, with `--quick` in a few minutes the cells of
its last line: `resnet18_vs_torch=R resnet20_vs_torch=R noise_over_lsq=R`, our images per second
over those of torch's best setting, with ReLUs, and the noisy step's time over LSQ's on ResNet-20. A
step is the whole of it, on the devices that `train.py` takes by default, the state donated:
normalisation, forward, backward and SGD; random images, not augmented. torch runs eagerly and
compiled, in both layouts, in a process of its own (see `benchmarks.torch_training`). Every
competitor runs two steps a round, in turn, and its second is timed; a ratio is the median over
rounds of the ratio within a round. Memory is that of the compiled step on all devices, without the
state.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from benchmarks.timing import fastest, in_turn, median, ratio
from benchmarks.torch_process import TorchProcess
from nadaptor._files import write_csv, write_json
from nadaptor._provenance import machine
from nadaptor.cli.command import spread_over_cores
from nadaptor.cli.pages import take_huge_pages
from nadaptor.configs.build import build_model, build_optimizer
from nadaptor.configs.config import Config, Dtype, Prng, replace
from nadaptor.data.registry import get_spec
from nadaptor.models.config import Activation
from nadaptor.parallel import STEP, NumDevices, choose_devices, place_step
from nadaptor.reports.tables import markdown
from nadaptor.training import get_config
from nadaptor.training.state import init_state
from nadaptor.training.step import build_step

RESULTS = Path(__file__).parent / "results"
BASE = get_config("digits_na")  # p = 2, threefry2x32
BASELINE = "lsq"
MIB = 2**20
STEPS = 100_000  # of the learning rate's schedule


class Cell(NamedTuple):
    """A network and a batch to train."""

    model: str
    dataset: str
    batch: int


RESNET20 = Cell("cifar_resnet20", "cifar10", 128)
RESNET18 = Cell("cifar_resnet18", "cifar10", 64)


class Competitor(NamedTuple):
    """A compiled step that keeps its own state; of torch, only its call."""

    call: Callable[[], None]
    devices: int | None = None
    temporary_bytes: int | None = None
    parameters: int | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Only the cells of the last line, and LSQ in torch eagerly.
    quick: bool = False
    # Also torch.compile, where torch is there.
    compiled: bool = True
    # For a busy machine: one core, and the seconds that it computes in place of those that pass.
    processor_time: bool = False
    # Rounds a cell; by default 15, or 5 where it is to be quick.
    rounds: int | None = None
    # Images a step of ResNet-50 at 224 pixels; an accelerator takes more.
    large_batch: int = 4
    # Type of the computation.
    dtype: Dtype = "float32"
    # Devices to train on; by default those of train.py.
    num_devices: NumDevices = None
    # Folder of the results; by default benchmarks/results, or none where it is to be quick.
    out: Path | None = None


def run(options: Options) -> dict[str, float | None]:
    """Times every cell, writes a table and what it was made on, prints the last line."""
    if options.processor_time:
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    count = spread_over_cores(options.num_devices)
    options = dataclasses.replace(options, num_devices=count)
    rounds = options.rounds or (5 if options.quick else 15)
    more = [RESNET20._replace(batch=64), Cell("resnet50", "imagenet2012", options.large_batch)]
    cells = [RESNET18, RESNET20, *([] if options.quick else more)]
    with TorchProcess() as torch:
        if torch.missing:
            print(f"torch is left out: {torch.missing}")
        rows = [row for cell in cells for row in time_cell(cell, options, rounds, torch)]
    print(markdown([{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]))
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        _write(rows, out, options, {"torch": torch.version, "rounds": rounds})
    found = summarise(rows)
    print(" ".join(f"{k}={'none' if v is None else f'{v:.3f}'}" for k, v in found.items()))
    return found


def time_cell(
    cell: Cell, options: Options, rounds: int, torch: TorchProcess
) -> list[dict[str, Any]]:
    """Times all competitors on one network and batch; returns a row for each."""
    competitors = {
        name: build(replace(config, dtype=options.dtype), cell, options.num_devices)
        for name, config in _configs().items()
        if not options.quick or config.step.prng == BASE.step.prng
    }
    if cell.dataset == "cifar10" and options.dtype == "float32":
        competitors |= build_torch(cell, competitors, torch, options)
    calls = {name: c.call for name, c in competitors.items()}

    def processor_time() -> float:
        return time.process_time() + torch.processor_time()

    clock = processor_time if options.processor_time else time.perf_counter
    seconds = in_turn(calls, rounds, warmup=1 if options.quick else 2, clock=clock, lead_in=1)
    return [_row(cell, options.dtype, name, competitors, seconds) for name in seconds]


def build(config: Config, cell: Cell, num_devices: NumDevices) -> Competitor:
    """Compiles one competitor's step, as `train.py` runs it."""
    spec = get_spec(cell.dataset)
    config = replace(config, model=cell.model)
    devices = choose_devices(num_devices, cell.batch)
    step = build_step(config, spec, STEPS, devices.axis_name)
    placed = place_step(step, devices, config.step.parallel, STEP)
    model = build_model(config, num_classes=spec.num_classes)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (cell.batch, *spec.image_shape), np.uint8)
    labels = np.arange(cell.batch, dtype=np.int32) % spec.num_classes
    key = jax.random.key(0, impl=config.step.prng)
    start = jax.numpy.asarray(rng.standard_normal(pixels.shape, np.float32))
    state = init_state(model, build_optimizer(config, STEPS), start, key)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    states, whole = [placed.replicate(state)], placed.replicate(key)
    parts = placed.put(pixels), placed.put(labels)
    memory = placed.step.lower(states[0], *parts, whole).compile().memory_analysis()

    def call() -> None:
        states[0], _ = placed.step(states[0], *parts, whole)
        jax.block_until_ready(states[0])

    temporary = memory.temp_size_in_bytes * devices.total
    return Competitor(call, devices.total, temporary, parameters)


def build_torch(
    cell: Cell, ours: Mapping[str, Competitor], torch: TorchProcess, options: Options
) -> dict[str, Competitor]:
    """Builds torch's steps; says which fail, and leaves them out."""
    built: dict[str, Competitor] = {}
    for activation in () if torch.missing else ("relu", "lsq"):
        also = options.compiled and not (options.quick and activation == "lsq")
        for way in ("eager", "compiled") if also else ("eager",):
            for layout in ("nchw", "nhwc"):
                name = f"torch {activation} {way} {layout}"
                found = torch.build(name, cell.model, cell.batch, activation, way, layout)
                if "error" in found:
                    print(f"{cell.model}, {name} is left out: {found['error']}")
                elif found["parameters"] != (own := ours[activation].parameters):
                    raise ValueError(f"{name} has {found['parameters']} parameters, not {own}")
                else:
                    built[name] = Competitor(torch.step(name))
    return built


def summarise(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns what the last line says."""

    def value(cell: Cell, competitor: str, column: str) -> float | None:
        wanted, names = (cell.model, cell.batch, competitor), ("network", "batch", "competitor")
        return next(row[column] for row in rows if tuple(row[n] for n in names) == wanted)

    noisy = _name("noise_adaptor", BASE.step.prng)
    return {
        "resnet18_vs_torch": value(RESNET18, "relu", "vs_torch"),
        "resnet20_vs_torch": value(RESNET20, "relu", "vs_torch"),
        "noise_over_lsq": value(RESNET20, noisy, "time_over_lsq"),
    }


def device() -> str:
    """Returns the kind of the device that runs the steps."""
    first = jax.devices()[0]
    return machine() if first.platform == "cpu" else first.device_kind


def _write(
    rows: list[dict[str, Any]], out: Path, options: Options, facts: Mapping[str, Any]
) -> None:
    name = "training_quick" if options.quick else "training"
    name = f"{name}_processor_time" if options.processor_time else name
    made_on = {"machine": device(), "jax": jax.__version__, **facts}
    write_csv(out / f"{name}.csv", [{"machine": device(), **row} for row in rows])
    write_json(out / f"{name}.json", {**made_on, "rows": rows})


def _row(
    cell: Cell,
    dtype: Dtype,
    name: str,
    competitors: Mapping[str, Competitor],
    seconds: Mapping[str, list[float]],
) -> dict[str, Any]:
    own, base, times = competitors[name], competitors[BASELINE].temporary_bytes, seconds[name]
    # The noise has no counterpart in torch: it is held against LSQ there.
    rival = f"torch {'relu' if name == 'relu' else 'lsq'}"
    known = own.devices is not None and any(n.startswith(rival) for n in seconds)
    memory = own.temporary_bytes
    return {
        "network": cell.model,
        "batch": cell.batch,
        "dtype": dtype,
        "competitor": name,
        "devices": own.devices,
        "milliseconds": round(1000 * median(times), 1),
        "images_per_second": round(cell.batch / median(times), 1),
        "vs_torch": round(ratio(seconds[fastest(seconds, rival)], times), 3) if known else None,
        "time_over_lsq": round(ratio(times, seconds[BASELINE]), 3),
        "temporary_MiB": memory and round(memory / MIB, 1),
        "memory_over_lsq": memory and base and round(memory / base, 3),
    }


def _configs() -> dict[str, Config]:
    """The competitors: without noise no generator matters."""
    plain: tuple[Activation, ...] = ("relu", "lsq")
    configs = {name: replace(BASE, activation=name) for name in plain}
    noisy = {_name(BASE.quantizer.activation, p): replace(BASE, prng=p) for p in get_args(Prng)}
    return {**configs, **noisy}


def _name(activation: Activation, prng: Prng) -> str:
    return f"{activation} {prng}"


if __name__ == "__main__":
    import tyro

    # As train.py does; torch's process has what this one has.
    take_huge_pages(sys.argv[1:], "train")
    run(tyro.cli(Options))
