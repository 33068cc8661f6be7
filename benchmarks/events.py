"""Convolutions by events: what they gain at which share of spikes, alone and in a network.

`python -m benchmarks.events --data-dir DIR` times single convolutions of ResNet-20 and ResNet-18
beside the direct path, and the published ResNet-20, calibrated at the 99.9th percentile, beside T
forward passes of JAX's ANN. All on one core, in turn; it counts the seconds of the processor, which
say something on a busy machine, too, and takes the least of all rounds. DIR as for
`benchmarks.calibrated_resnet20`.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before jax is first used: one core for each convolution, as a device has in the simulator.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax.numpy as jnp
import numpy as np

import nadaptor
from benchmarks.calibrated_resnet20 import (
    SETTINGS,
    calibrate_model,
    load_images,
    load_network,
)
from benchmarks.competitors import OURS
from benchmarks.timing import compiled, in_turn
from nadaptor._execution import events
from nadaptor._execution.convolution import in_pairs, kn2row
from nadaptor._files import write_csv
from nadaptor._provenance import machine
from nadaptor.models import ClippedRelu

RESULTS = Path(__file__).parent / "results"
# Channels from and to, pixels along an edge, stride, width of the kernel.
SHAPES = (
    (16, 16, 32, 1, 3),
    (16, 32, 32, 2, 3),
    (32, 32, 16, 1, 3),
    (64, 64, 8, 1, 3),
    (64, 64, 32, 1, 3),
    (64, 128, 32, 2, 3),
    (128, 128, 16, 1, 3),
    (256, 256, 8, 1, 3),
    (512, 512, 4, 1, 3),
    (64, 256, 14, 1, 1),
)
RATES = (0.05, 0.1, 0.2, 0.3)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Folder with tfds/cifar10 and weights/resnet20-12fca82f.th.
    data_dir: Path
    # Time steps of the network.
    steps: tuple[int, ...] = (4, 16, 64)
    # Images of the network.
    batch: int = 32
    # Rounds.
    rounds: int = 7
    # Seconds after which no further round of a comparison begins.
    seconds: float = 60.0
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> None:
    """Times every shape and the network, and writes the tables."""
    network, shapes = time_network(options), (time_shape(*shape) for shape in SHAPES)
    for name, found in (("events_resnet20", network), ("events_shapes", shapes)):
        rows: list[dict[str, Any]] = []
        for row in found:
            print(row, flush=True)
            rows.append({"machine": machine(), **row})
            write_csv(options.out / f"{name}.csv", rows)


def time_shape(inputs: int, outputs: int, size: int, stride: int, width: int) -> dict[str, Any]:
    """One row: how many times as fast as the direct path at each share of spikes, and if dense."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((width, width, inputs, outputs)), jnp.float32)
    padding, row = ((width // 2, width // 2),) * 2, {}
    by_events = functools.partial(events.convolve_events, padding=padding, strides=(stride, stride))
    for rate in RATES:
        x = jnp.asarray(rng.random((16, size, size, inputs)) < rate, jnp.float32)
        calls = {"direct": compiled(functools.partial(_direct, padding, stride), x, w)}
        calls |= {
            "events": _with_most(1.0, by_events, x, w),
            "dense": _with_most(-1, by_events, x, w),
        }
        least = _least(calls, 200, 1.0)
        row[f"{rate:.0%}"] = round(least["direct"] / least["events"], 2)
    ours = {"by no events": round(least["direct"] / least["dense"], 2)}
    shape = f"{width}x{width}, {inputs} to {outputs}, {size} pixels, stride {stride}"
    return {"convolution": shape, "direct ms": round(1e3 * least["direct"], 2), **row, **ours}


def _with_most(most: float, f: Callable[..., Any], *args: jax.Array) -> Callable[[], Any]:
    """The compiled call with another break-even: 1 for events always, -1 for never."""
    kept = events.MOST_SPIKES
    try:
        events.MOST_SPIKES = dict.fromkeys(kept, most)
        return compiled(lambda *args: f(*args), *args)
    finally:
        events.MOST_SPIKES = kept


def _direct(padding: Any, stride: int, x: jax.Array, w: jax.Array) -> jax.Array:
    """What the simulator has without events."""
    if stride == 1 and w.shape[0] == 3 and w.shape[-1] <= 16:
        return in_pairs(x, w, padding)
    if stride == 1 and w.shape[0] == 3 and x.shape[1] <= 4:
        return kn2row(x, w, padding)
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=dimensions
    )


def time_network(options: Options) -> Iterator[dict[str, Any]]:
    """The shares of the limit at each T, and the spikes a value of each layer."""
    model, variables = load_network(options.data_dir)
    images, _ = load_images(options.data_dir, "train", 128)
    setting, calibration = next(iter(SETTINGS.items()))
    found = calibrate_model(model, variables, images, calibration)
    x, _ = load_images(options.data_dir, "test", options.batch)
    network = model.clone(activation=ClippedRelu)
    for steps in options.steps:
        outputs: dict[str, Any] = {}
        calls = {"limit": compiled(model.apply, variables, x)}
        for name, ours in OURS.items():
            simulate = functools.partial(nadaptor.simulate, network.apply, num_steps=steps)
            f = compiled(functools.partial(simulate, **{"in_axes": (None, 0), **ours}), found, x)
            calls[name] = functools.partial(_keep, outputs, name, f)
        least = _least(calls, options.rounds, options.seconds)
        rates = [float(c.mean()) / steps for c in outputs["ours events"].spike_counts]
        direct, by_events = (outputs[f"ours {k}"].outputs for k in ("direct", "events"))
        other = int((direct.argmax(-1) != by_events.argmax(-1)).any(0).sum())
        yield {
            "calibration": setting,
            "T": steps,
            **{k: round(steps * least["limit"] / least[k], 2) for k in outputs},
            "predictions that differ": other,
            "mean spikes a value": round(float(np.mean(rates)), 3),
            "by layer": " ".join(f"{rate:.3f}" for rate in rates),
        }


def _keep(outputs: dict[str, Any], name: str, call: Callable[[], Any]) -> None:
    outputs[name] = call()


def _least(calls: dict[str, Any], rounds: int, budget: float) -> dict[str, float]:
    """The least seconds of the processor that each call took."""
    seconds = in_turn(calls, rounds, budget=budget, clock=time.process_time)
    return {name: min(times) for name, times in seconds.items()}


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
