"""Both codings on one random network: error to the quantized network, and spikes per value.

python -m benchmarks.codings
"""

import functools
import math

import jax
import jax.numpy as jnp

import nadaptor

NUM_STEPS, SHOWN = 24, (1, 2, 4, 6, 8, 12, 16, 24)


def network(levels, weights, x):
    """Five quantized layers of 32 features; the range of each is 0 to 0.8."""
    for w in weights[:-1]:
        x = nadaptor.lsq(1.5 * x @ w + 0.1, 0.8 / levels, levels)
    return x @ weights[-1]


def main():
    """Prints a row for each number of levels and coding."""
    keys = jax.random.split(jax.random.key(0), 7)
    weights = [jax.random.normal(key, (32, 32)) / math.sqrt(32) for key in keys[:6]]
    x = jax.random.normal(keys[6], (64, 32))
    steps = ", ".join(map(str, SHOWN))
    print(f"| p | coding | error at T = {steps} | spikes per value | settled |")
    print("|---|---|---|---|---|")
    for levels in (1, 2, 4, 8):
        f = functools.partial(network, levels)
        wanted = jax.jit(f)(weights, x)
        for coding in ("rate", "sum"):
            run = functools.partial(nadaptor.simulate, f, num_steps=NUM_STEPS, coding=coding)
            sim = jax.jit(run)(weights, x)
            error = jnp.abs(sim.outputs - wanted).mean((1, 2)) / jnp.abs(wanted).mean()
            shown = " / ".join(f"{float(error[t - 1]):.3f}" for t in SHOWN)
            spikes = sum(float(counts.mean()) for counts in sim.spike_counts) / 5
            settled = "-" if sim.settled is None else int(sim.settled)
            print(f"| {levels} | {coding} | {shown} | {spikes:.2f} | {settled} |")


if __name__ == "__main__":
    main()
