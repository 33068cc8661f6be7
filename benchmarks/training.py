"""The training step: time and memory of the noise adaptor beside `lsq` and ReLU.

`python -m benchmarks.training` makes the whole table, with `--quick` in a few minutes the cell of
its last line, `noise_over_lsq=...`: ResNet-20 at CIFAR's shape with the default generator. A step
is the whole of it, jitted with the state donated: normalisation, forward, backward and SGD; random
images, not augmented. Every competitor runs once a round, in turn; a ratio is the median over
rounds of the ratio within a round. Memory is the compiled step's temporary one, without the state.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from benchmarks.timing import in_turn, median, ratio
from nadaptor._files import write_csv, write_json
from nadaptor._provenance import machine
from nadaptor.configs.build import build_model, build_optimizer
from nadaptor.configs.config import Config, Dtype, Prng, replace
from nadaptor.data.registry import get_spec
from nadaptor.models.config import Activation
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


class Competitor(NamedTuple):
    """A compiled step that keeps its own state."""

    call: Callable[[], None]
    temporary_bytes: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Only the cell of the last line; writes no files.
    quick: bool = False
    # Rounds a cell.
    rounds: int = 15
    # Images a step of ResNet-50 at 224 pixels; an accelerator takes more.
    large_batch: int = 4
    # Type of the computation.
    dtype: Dtype = "float32"
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> float:
    """Times every cell, writes training.csv and .json, prints the machine-readable line."""
    quick = Cell("cifar_resnet20", "cifar10", 64)
    large = Cell("resnet50", "imagenet2012", options.large_batch)
    cells = [quick] if options.quick else [quick, quick._replace(batch=128), large]
    rows = [row for cell in cells for row in time_cell(cell, options)]
    print(markdown([{name: str(value) for name, value in row.items()} for row in rows]))
    if not options.quick:
        facts = {"machine": device(), "jax": jax.__version__, "rounds": options.rounds}
        write_csv(options.out / "training.csv", [{"machine": device(), **row} for row in rows])
        write_json(options.out / "training.json", {**facts, "rows": rows})
    wanted = _name("noise_adaptor", BASE.step.prng)
    noise_over_lsq = next(row["time_over_lsq"] for row in rows if row["competitor"] == wanted)
    print(f"noise_over_lsq={noise_over_lsq:.3f}")
    return noise_over_lsq


def time_cell(cell: Cell, options: Options) -> list[dict[str, Any]]:
    """Times all competitors on one network and batch; returns a row for each."""
    competitors = {
        name: build(replace(config, dtype=options.dtype), cell)
        for name, config in _configs().items()
    }
    seconds = in_turn({name: c.call for name, c in competitors.items()}, options.rounds, warmup=2)
    base = competitors[BASELINE].temporary_bytes
    return [
        {
            "network": cell.model,
            "batch": cell.batch,
            "dtype": options.dtype,
            "competitor": name,
            "milliseconds": round(1000 * median(times), 1),
            "time_over_lsq": round(ratio(times, seconds[BASELINE]), 3),
            "temporary_MiB": round(competitors[name].temporary_bytes / MIB, 1),
            "memory_over_lsq": round(competitors[name].temporary_bytes / base, 3),
        }
        for name, times in seconds.items()
    ]


def build(config: Config, cell: Cell) -> Competitor:
    """Compiles one competitor's step, as `train.py` runs it on one device."""
    spec = get_spec(cell.dataset)
    config = replace(config, model=cell.model)
    step = jax.jit(build_step(config, spec, STEPS), donate_argnums=0)
    model = build_model(config, num_classes=spec.num_classes)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (cell.batch, *spec.image_shape), np.uint8)
    images, labels = jax.device_put(pixels), jax.device_put(np.arange(cell.batch, dtype=np.int32))
    key = jax.random.key(0, impl=config.step.prng)
    start = jax.numpy.asarray(rng.standard_normal(pixels.shape, np.float32))
    state = init_state(model, build_optimizer(config, STEPS), start, key)
    compiled = step.lower(state, images, labels, key).compile()
    states = [state]

    def call() -> None:
        states[0], _ = compiled(states[0], images, labels, key)
        jax.block_until_ready(states[0])

    return Competitor(call, compiled.memory_analysis().temp_size_in_bytes)


def device() -> str:
    """Returns the kind of the device that runs the steps."""
    first = jax.devices()[0]
    return machine() if first.platform == "cpu" else first.device_kind


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

    run(tyro.cli(Options))
