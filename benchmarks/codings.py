"""Both codings on one random network: error to the quantized network, and spikes per value.

python -m benchmarks.codings
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nadaptor
from nadaptor._files import write_csv

OUT = Path(__file__).parent / "results" / "codings.csv"
NUM_STEPS, SHOWN = 24, (1, 2, 4, 6, 8, 12, 16, 24)


def network(levels: int, weights: list[jax.Array], x: jax.Array) -> jax.Array:
    """Five quantized layers of 32 features; the range of each is 0 to 0.8."""
    for w in weights[:-1]:
        x = nadaptor.lsq(1.5 * x @ w + 0.1, 0.8 / levels, levels)
    return x @ weights[-1]


def main() -> None:
    """Writes a row for each number of levels and coding."""
    rows = list(measure())
    write_csv(OUT, rows)
    for row in rows:
        print(row)


def measure() -> Iterator[dict[str, Any]]:
    """Yields the rows."""
    keys = jax.random.split(jax.random.key(0), 7)
    weights = [jax.random.normal(key, (32, 32)) / math.sqrt(32) for key in keys[:6]]
    x = jax.random.normal(keys[6], (64, 32))
    for levels in (1, 2, 4, 8):
        f = functools.partial(network, levels)
        wanted = jax.jit(f)(weights, x)
        for coding in ("rate", "sum"):
            run = functools.partial(nadaptor.simulate, f, num_steps=NUM_STEPS, coding=coding)
            sim = jax.jit(run)(weights, x)
            error = jnp.abs(sim.outputs - wanted).mean((1, 2)) / jnp.abs(wanted).mean()
            spikes = sum(float(counts.mean()) for counts in sim.spike_counts) / 5
            yield {
                "p": levels,
                "coding": coding,
                **{f"T = {t}": f"{float(error[t - 1]):.3f}" for t in SHOWN},
                "spikes per value": f"{spikes:.2f}",
                "settled": "-" if sim.settled is None else int(sim.settled),
            }


if __name__ == "__main__":
    main()
