"""How long the simulator takes to compile: ResNet-50 at 224 pixels, T = 64, on abstract weights.

`python -m benchmarks.compile_time` traces, lowers and compiles it with every correction, with a
surrogate derivative, and with tiles and chunks that leave a rest; no persistent cache is used.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nadaptor
from nadaptor._files import write_csv, write_json
from nadaptor._provenance import machine
from nadaptor.models import Lsq, create, fold_batch_norm
from nadaptor.neurons import triangle
from nadaptor.reports.tables import markdown

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
SURROGATE = nadaptor.IntegrateAndFire(surrogate=triangle)
SETTINGS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "whole batch, 4 steps a chunk": {"tile_size": 10_000, "steps_per_chunk": 4},
    "tiles of 3 and chunks of 5, both with a rest": {"tile_size": 3, "steps_per_chunk": 5},
    "fast convolution": {"fast_convolution": True},
    "negative spikes": {"neuron": nadaptor.SignedIntegrateAndFire()},
    "offset spikes, rho = 8": {"correction": nadaptor.OffsetSpikes(8)},
    "SRP, tau = 8": {"correction": nadaptor.Srp(8)},
    "offset spikes and surrogate": {"correction": nadaptor.OffsetSpikes(8), "neuron": SURROGATE},
    "gradient through a surrogate": {"neuron": SURROGATE},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    # Name of the network, in nadaptor.models.MODELS.
    model: str = "resnet50"
    # Pixels of a side.
    image_size: int = 224
    # Images a call.
    batch_size: int = 4
    # T.
    num_steps: int = 64
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> list[dict[str, Any]]:
    """Compiles every setting, prints the table, writes compile_time.csv and .json."""
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [compile_one(name, setting, options) for name, setting in SETTINGS.items()]
    print(markdown([{name: str(value) for name, value in row.items()} for row in rows]))
    facts = {"machine": machine(), "jax": jax.__version__, "model": options.model}
    facts |= {k: getattr(options, k) for k in ("image_size", "batch_size", "num_steps")}
    write_csv(options.out / "compile_time.csv", [{"machine": machine(), **row} for row in rows])
    write_json(options.out / "compile_time.json", {**facts, "rows": rows})
    return rows


def compile_one(name: str, setting: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Compiles the simulator with one setting from nothing; returns the seconds of each part."""
    jax.clear_caches()
    images = jax.ShapeDtypeStruct(
        (options.batch_size, options.image_size, options.image_size, 3), jnp.float32
    )
    model = create(options.model, 1000, activation=functools.partial(Lsq, levels=3))
    weights = jax.eval_shape(
        lambda key, x: fold_batch_norm(model.init(key, x)), jax.random.key(0), images
    )
    outputs = simulator(model.clone(norm=None).apply, setting, options.num_steps)
    function = jax.grad(lambda *args: outputs(*args).sum()) if "gradient" in name else outputs
    times = [time.perf_counter()]
    traced = jax.jit(function).trace(weights, images)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    parts = [round(b - a, 2) for a, b in itertools.pairwise(times)]
    return {
        "simulator": name,
        **dict(zip(("trace_s", "lower_s", "compile_s"), parts, strict=True)),
        "total_s": round(times[-1] - times[0], 2),
        "temporary_MiB": round(compiled.memory_analysis().temp_size_in_bytes / MIB),
    }


def simulator(
    apply: Callable[..., jax.Array], setting: Mapping[str, Any], num_steps: int
) -> Callable[..., jax.Array]:
    """The function to compile, from weights and images to running means."""

    def outputs(weights: Any, images: jax.Array) -> jax.Array:
        return nadaptor.simulate(
            apply, weights, images, num_steps=num_steps, in_axes=(None, 0), **setting
        ).outputs

    return outputs


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
