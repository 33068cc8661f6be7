"""Where the simulator's time goes: the convolutions of ResNet-18 and ResNet-20, one by one.

`python -m benchmarks.convolutions` times each 3x3 convolution at stride 1 on 16 images, what a tile
of 4 examples and 4 steps gives it: XLA's, the pairs of columns, the filter's positions one by one,
Winograd's along both axes and along the height alone, and the transform of Winograd's filters,
which the simulator does once a call. Each is repeated in a compiled loop, as the simulator's steps
are; everything in turn, medians over rounds.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.timing import compiled, in_turn, median, ratio
from nadaptor._execution.convolution import in_pairs, kn2row
from nadaptor._execution.winograd import (
    convolve,
    convolve_rows,
    transform_filter,
    transform_filter_rows,
)
from nadaptor._files import write_csv
from nadaptor._provenance import machine
from nadaptor.reports.tables import markdown

RESULTS = Path(__file__).parent / "results"
PADDING = ((1, 1), (1, 1))
# Convolutions a call, each of the one before's result.
REPEATS = 8
# (channels, pixels along an edge): ResNet-20's three stages, ResNet-18's four.
SHAPES = ((16, 32), (32, 16), (64, 8), (64, 32), (128, 16), (256, 8), (512, 4))


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Images a call: examples times steps.
    images: int = 16
    # Rounds.
    rounds: int = 15
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> None:
    """Times every shape and writes the table."""
    rows = [time_shape(channels, size, options) for channels, size in SHAPES]
    print(markdown([{k: str(v) for k, v in row.items()} for row in rows]))
    write_csv(options.out / "convolutions.csv", rows)


def time_shape(channels: int, size: int, options: Options) -> dict[str, Any]:
    """One row of the table."""
    x = jax.random.normal(jax.random.key(0), (options.images, size, size, channels))
    # Values keep their size from one convolution to the next.
    w = jax.random.normal(jax.random.key(1), (3, 3, channels, channels)) / (3 * channels**0.5)
    calls = {"transform": compiled(transform_filter, w)}
    for name, f, filters in (
        ("xla", direct, w),
        ("pairs", in_pairs, w),
        ("positions", kn2row, w),
        ("winograd", convolve, jax.jit(transform_filter)(w)),
        ("height", convolve_rows, jax.jit(transform_filter_rows)(w)),
    ):
        calls[name] = compiled(repeated(functools.partial(f, padding=PADDING)), x, filters)
    seconds = in_turn(calls, options.rounds, warmup=2)
    return {
        "machine": machine(),
        "channels": channels,
        "pixels": size,
        **{f"{name} ms": _milliseconds(name, times) for name, times in seconds.items()},
        **{
            f"xla over {name}": round(ratio(seconds["xla"], times), 2)
            for name, times in seconds.items()
            if name not in ("xla", "transform")
        },
    }


def repeated(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function that applies f again and again to its own result."""
    return lambda x, filters: jax.lax.fori_loop(0, REPEATS, lambda _, y: f(y, filters), x)


def direct(x: jax.Array, w: jax.Array, padding: Any) -> jax.Array:
    """XLA's own convolution."""
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=names)


def _milliseconds(name: str, times: list[float]) -> float:
    """Of one convolution, or one transform."""
    return round(1e3 * median(times) / (1 if name == "transform" else REPEATS), 3)


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
