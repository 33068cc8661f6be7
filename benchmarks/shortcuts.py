"""Work that cannot change the result and is not done: each shortcut on and off, in one run.

`python -m benchmarks.shortcuts --data-dir DIR` times the published ResNet-20 on 100 CIFAR-10 test
images: the static prefix evaluated once or at every step; tiles that stop once all their images
are sure, or run for T steps. It also counts how often a whole layer of a tile is silent in a step,
which is what skipping its convolution could save. DIR holds `tfds/cifar10` and `weights/`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nadaptor
from benchmarks.networks import Network, load
from benchmarks.timing import compiled, in_turn, median, ratio
from nadaptor._execution.steps import run_chunk
from nadaptor._files import write_csv, write_json
from nadaptor._provenance import provenance
from nadaptor.early_exit import early_exit, simulate_with_early_exit
from nadaptor.reports.tables import markdown
from nadaptor.simulation import start_carry

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Folder with tfds/cifar10 and weights/resnet20-12fca82f.th.
    data_dir: Path
    # T, time steps.
    num_steps: int = 32
    # Softmax confidence at which an image stops.
    confidence: float = 0.9
    # Images simulated at a time.
    tile_size: int = 4
    # Rounds.
    rounds: int = 7
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> None:
    """Times every shortcut on and off, and writes the table."""
    network = load("resnet20", options.data_dir, 100)
    calls = {**prefix(network, options), **exits(network, options)}
    seconds = in_turn(calls, options.rounds)
    pairs = [("static prefix", "prefix on", "prefix off")]
    for n in tiles(options):
        pairs.append((f"early exit, tiles of {n}", f"exit on {n}", f"exit off {n}"))
    rows = [
        {
            "shortcut": name,
            "seconds on": round(median(seconds[on]), 3),
            "seconds off": round(median(seconds[off]), 3),
            "on over off": round(ratio(seconds[on], seconds[off]), 3),
        }
        for name, on, off in pairs
    ]
    facts = {**quality(network, options), "silent_layers": silent(network, options)}
    print(markdown([{k: str(v) for k, v in row.items()} for row in rows]), facts, sep="\n\n")
    write_csv(options.out / "shortcuts.csv", rows)
    settings = {k: v for k, v in dataclasses.asdict(options).items() if not isinstance(v, Path)}
    found = {**provenance(), "settings": settings, **facts, "seconds": seconds}
    write_json(options.out / "shortcuts.json", found)


def tiles(options: Options) -> tuple[int, int]:
    """Images that stop together: with one, none waits for another."""
    return options.tile_size, 1


def prefix(network: Network, options: Options) -> dict[str, Callable[[], Any]]:
    """The step loop on one tile, with the static part before it or inside."""
    images = jnp.asarray(network.images[: options.tile_size])

    def simulated(variables: Any, images: jax.Array, *, once: bool) -> jax.Array:
        net = nadaptor.spiking(network.model.apply, variables, images)
        prepared = net.prepare(variables, images)
        carry = start_carry(net, prepared, None)

        def step(carry: Any, _: None) -> tuple[Any, Any]:
            if once:
                return run_chunk(net, prepared, carry, 1)
            # Tied to the loop, so that the compiler cannot move it out either.
            again = jax.lax.optimization_barrier((variables, images, carry.time))[:2]
            return run_chunk(net, net.prepare(*again), carry, 1)

        return jax.lax.scan(step, carry, length=options.num_steps)[1]

    return {
        name: compiled(functools.partial(simulated, once=once), network.variables, images)
        for name, once in (("prefix on", True), ("prefix off", False))
    }


def exits(network: Network, options: Options) -> dict[str, Callable[[], Any]]:
    """All images, until they are sure or for T steps."""
    images, calls = jnp.asarray(network.images), {}
    for size in tiles(options):
        runs = {f"exit on {size}": until_sure, f"exit off {size}": whole}
        for name, f in runs.items():
            part = functools.partial(f, network, options, size)
            calls[name] = compiled(part, network.variables, images)
    return calls


def until_sure(
    network: Network, options: Options, size: int, variables: Any, images: jax.Array
) -> Any:
    """The steps and predictions, with no more steps than a tile needs."""
    run = functools.partial(simulate_with_early_exit, network.model.apply, variables, images)
    sizes = {"num_steps": options.num_steps, "in_axes": (None, 0), "tile_size": size}
    return run(**sizes, confidence=options.confidence, steps_per_chunk=1)


def whole(network: Network, options: Options, size: int, variables: Any, images: jax.Array) -> Any:
    """The same from all T steps."""
    run = functools.partial(nadaptor.simulate, network.model.apply, variables, images)
    sizes = {"num_steps": options.num_steps, "in_axes": (None, 0), "tile_size": size}
    outputs = run(**sizes, steps_per_chunk=1).outputs
    return early_exit(outputs, jnp.array([options.confidence]))


def quality(network: Network, options: Options) -> dict[str, float]:
    """Accuracy and mean number of steps, and whether both ways agree."""
    images = jnp.asarray(network.images)
    on, off = (
        jax.jit(functools.partial(f, network, options, options.tile_size))(
            network.variables, images
        )
        for f in (until_sure, whole)
    )
    differ = (on.steps != off.steps) | (on.predictions != off.predictions)
    return {
        "images": int(on.steps.size),
        "mean_steps": float(on.steps.mean()),
        "accuracy": float((on.predictions[0] == network.labels).mean()),
        "images_that_differ": int(differ.sum()),
    }


def silent(network: Network, options: Options) -> dict[str, float]:
    """The share of layers and steps in which no neuron fires, in a tile and in single images."""

    def counted(variables: Any, images: jax.Array) -> jax.Array:
        net = nadaptor.spiking(network.model.apply, variables, images)
        prepared = net.prepare(variables, images)

        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            after, _ = run_chunk(net, prepared, carry, 1)
            fired = [a > b for a, b in zip(after.counts, carry.counts, strict=True)]
            return after, jnp.stack([f.any(tuple(range(1, f.ndim))) for f in fired])

        carry = start_carry(net, prepared, None)
        return jax.lax.scan(step, carry, length=options.num_steps)[1]

    images = jnp.asarray(network.images[: 8 * options.tile_size])
    fired = jax.jit(counted)(network.variables, images)  # [T, layers, images]
    in_tiles = fired.reshape(*fired.shape[:2], -1, options.tile_size).any(-1)
    return {"tile": float(1 - in_tiles.mean()), "image": float(1 - fired.mean())}


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
