"""How the simulator's cost grows with T, the batch, the width and the depth of the network.

`python -m benchmarks.growth` starts from a ResNet-20 at 32 pixels, 32 images and T = 16, changes
one of the four at a time, and fits the exponent e of `cost ~ value^e`, a line through the
logarithms. Beside it, the exponent of one forward pass of the ANN. The weights are random: what is
computed does not depend on them. All values of one axis run in turn; medians over rounds.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import nadaptor
from benchmarks.timing import in_turn, median
from nadaptor._files import write_csv
from nadaptor._provenance import machine
from nadaptor.models import Lsq, Relu, ResNet, create, fold_batch_norm, start_scales
from nadaptor.reports.tables import markdown

RESULTS = Path(__file__).parent / "results"


class Size(NamedTuple):
    """What is simulated."""

    T: int = 16
    batch: int = 32
    width: int = 16  # features of the first stage; the others have twice and four times as many
    depth: int = 20  # 6 n + 2 layers


AXES = {
    "T": (4, 8, 16, 32, 64),
    "batch": (8, 16, 32, 64, 128),
    "width": (8, 16, 32, 64),
    "depth": (8, 14, 20, 32, 44),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Rounds an axis.
    rounds: int = 5
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> None:
    """Times all sizes, prints the exponents, and writes growth.csv and growth_exponents.csv."""
    rows, fits = [], []
    for axis, values in AXES.items():
        measured = time_axis(axis, values, options.rounds)
        rows += measured
        columns = ("seconds", "temporary_mib", "ann_seconds")
        found = {column: round(exponent(measured, column), 2) for column in columns}
        span = f"{values[0]} to {values[-1]}"
        fits.append({"machine": machine(), "axis": axis, "values": span, **found})
    print(markdown([{name: str(value) for name, value in fit.items()} for fit in fits]))
    write_csv(options.out / "growth.csv", rows)
    write_csv(options.out / "growth_exponents.csv", fits)


def time_axis(axis: str, values: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each value: seconds of the simulator and of an ANN, and temporary memory."""
    sizes = [Size()._replace(**{axis: value}) for value in values]
    programs = {size: programs_of(size) for size in sizes}
    calls = {
        (size, kind): functools.partial(_wait, program, args)
        for size, both in programs.items()
        for kind, (program, args) in both.items()
    }
    seconds = in_turn(calls, rounds)
    return [
        {
            "machine": machine(),
            "axis": axis,
            **size._asdict(),
            "seconds": round(median(seconds[size, "snn"]), 5),
            "ann_seconds": round(median(seconds[size, "ann"]), 5),
            "temporary_mib": round(_temporary_mib(programs[size]["snn"][0]), 2),
        }
        for size in sizes
    ]


def programs_of(size: Size) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The compiled simulator and ANN of that size, each with its arguments."""
    model = _network(size, functools.partial(Lsq, levels=2))
    images = jax.random.normal(jax.random.key(0), (size.batch, 32, 32, 3))
    weights = _weights(size, model, images)

    def simulated(weights: Any, images: jax.Array) -> jax.Array:
        where = {"in_axes": (None, 0), "num_steps": size.T}
        return nadaptor.simulate(model.clone(norm=None).apply, weights, images, **where).outputs

    ann = _network(size, Relu).clone(norm=None)
    return {
        kind: (jax.jit(f).lower(weights, images).compile(), (weights, images))
        for kind, f in (("snn", simulated), ("ann", ann.apply))
    }


def exponent(rows: Sequence[dict[str, Any]], column: str) -> float:
    """The slope of the column's logarithm over that of the axis's value."""
    values = [np.log([row[name] for row in rows]) for name in (rows[0]["axis"], column)]
    return float(np.polyfit(*values, deg=1)[0])


def _network(size: Size, activation: Any) -> ResNet:
    stages = ((size.depth - 2) // 6,) * 3
    options: dict[str, Any] = {"stage_sizes": stages, "width": size.width}
    return create("cifar_resnet20", 10, activation=activation, **options)


def _weights(size: Size, model: ResNet, images: jax.Array) -> Any:
    """Random weights with scales from the images, batch norm folded."""
    variables = _network(size, Relu).init(jax.random.key(1), images[:1])
    return fold_batch_norm(start_scales(model, variables, images[:8], jax.random.key(2)))


def _wait(program: Any, args: tuple[Any, ...]) -> None:
    jax.block_until_ready(program(*args))


def _temporary_mib(program: Any) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
