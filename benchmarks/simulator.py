"""The simulator beside its peers: images x steps a second on the same weights, in one run.

`python -m benchmarks.simulator --data-dir DIR` makes the whole table, with `--quick` in under ten
minutes the cells of its last line. DIR holds `tfds/cifar10` and `weights/`. Every competitor runs
once a round, in turn; a ratio is the median over rounds of the ratio within a round. The limit is
T forward passes of the faster of torch's and JAX's ANN.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nadaptor
from benchmarks.networks import Network, calibrated
from benchmarks.timing import fastest, in_turn, median, ratio
from nadaptor.models import Relu
from nadaptor.training.files import write_csv, write_json
from nadaptor.training.provenance import machine

RESULTS = Path(__file__).parent / "results"
QUICK = (("resnet18", 32, 4), ("resnet20", 32, 16))
FULL = tuple((n, b, t) for n in ("resnet18", "resnet20") for b in (32, 100) for t in (1, 4, 16, 32))
# (examples a tile, steps a chunk): None is the library's own choice.
SETTINGS = {"auto": (None, None), "plain": (10_000, 1)}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Folder with tfds/cifar10 and weights/resnet20-12fca82f.th.
    data_dir: Path
    # Weights of a CIFAR-10 ResNet-18 in torch's layout; without them that network is left out.
    resnet18: Path | None = None
    # Only the cells of the last line.
    quick: bool = False
    # Rounds a cell.
    rounds: int = 7
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> dict[str, Any]:
    """Times every cell, writes simulator.csv and .json, prints the machine-readable line."""
    networks = {"resnet20": ("cifar_resnet20", options.data_dir / "weights/resnet20-12fca82f.th")}
    if options.resnet18 is not None:
        networks["resnet18"] = ("cifar_resnet18", options.resnet18)
    loaded = {
        name: calibrated(model, weights, options.data_dir, 100)
        for name, (model, weights) in networks.items()
    }
    rows, line = [], {}
    for name, batch, steps in QUICK if options.quick else FULL:
        if name in loaded:
            cell = time_cell(loaded[name], batch, steps, options.rounds)
            rows += [{"network": name, "batch": batch, "T": steps, **row} for row in cell["rows"]]
            line |= {f"{name}_T{steps}_{k}": v for k, v in cell["ratios"].items()}
            print(*(f"{k}={v:.3f}" for k, v in cell["ratios"].items()), flush=True)
    line["memory_T64_over_T4"] = memory_growth(loaded["resnet20"])
    write_csv(options.out / "simulator.csv", rows)
    write_json(options.out / "simulator.json", {"machine": machine(), "ratios": line, "rows": rows})
    print(*(f"{name}={value:.3f}" for name, value in line.items()))
    return line


def time_cell(network: Network, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Times all competitors on one network, batch and T, and compares what they predict."""
    images = network.images[:batch]
    calls = {
        **torch_calls(network, images, steps),
        **{f"ours {k}": v for k, v in our_calls(network, images, steps).items()},
        "limit jax": jax_ann(network, images),
    }
    outputs = {name: call() for name, call in calls.items() if not name.startswith("limit")}
    seconds = in_turn(calls, rounds)
    limit = fastest(seconds, "limit")
    reference = outputs["ours plain direct"]
    rows = [
        {
            "competitor": name,
            "images_x_steps_per_second": batch * passes(name, steps) / median(times),
            "share_of_limit": ratio(seconds[limit], times) * passes(name, steps),
            "predictions_that_differ": differing(outputs.get(name), reference),
        }
        for name, times in seconds.items()
    ]
    return {"rows": rows, "ratios": ratios(seconds, limit, steps)}


def ratios(seconds: dict[str, list[float]], limit: str, steps: int) -> dict[str, float]:
    """Ours against each peer's best setting, and against T passes of the ANN."""
    found = {}
    for kind in ("direct", "fast"):
        ours = seconds[f"ours auto {kind}"]
        found[f"vs_spikingjelly_{kind}"] = ratio(seconds[fastest(seconds, "spikingjelly")], ours)
        found[f"vs_qcfs_{kind}"] = ratio(seconds["qcfs loop"], ours)
        found[f"vs_limit_{kind}"] = ratio(seconds[limit], ours) * steps
    return found


def passes(name: str, steps: int) -> int:
    """How many steps a call of this competitor makes: an ANN makes one."""
    return 1 if name.startswith("limit") else steps


def differing(outputs: Any, reference: np.ndarray) -> int | None:
    """Images whose prediction at any t is another than in the reference."""
    if outputs is None:
        return None
    return int((np.asarray(outputs).argmax(-1) != reference.argmax(-1)).any(0).sum())


def our_calls(network: Network, images: np.ndarray, steps: int) -> dict[str, Callable]:
    """Our simulator: the library's own choice and the plain loop, direct and fast."""
    calls = {}
    for setting, (tile, chunk) in SETTINGS.items():
        for kind, fast in (("direct", False), ("fast", True)):
            compiled = compile_simulator(network, images, steps, tile, chunk, fast)
            arguments = compiled, network.variables, jnp.asarray(images)
            calls[f"{setting} {kind}"] = functools.partial(fetch, *arguments)
    return calls


def fetch(f: Callable, *args: Any) -> np.ndarray:
    """Calls a compiled function and waits for its result."""
    return np.asarray(f(*args))


def compile_simulator(
    network: Network,
    images: np.ndarray,
    steps: int,
    tile: int | None = None,
    chunk: int | None = None,
    fast: bool = False,
) -> Any:
    """The compiled simulator, from (variables, images) to running means [T, N, 10]."""

    def simulated(variables: Any, images: jax.Array) -> jax.Array:
        return nadaptor.simulate(
            network.model.apply,
            variables,
            images,
            num_steps=steps,
            in_axes=(None, 0),
            tile_size=tile,
            steps_per_chunk=chunk,
            fast_convolution=fast,
        ).outputs

    return jax.jit(simulated).lower(network.variables, images).compile()


def jax_ann(network: Network, images: np.ndarray) -> Callable[[], np.ndarray]:
    """One forward pass of the ANN in JAX."""
    forward = jax.jit(network.model.clone(activation=Relu).apply)
    weights = {"params": without_thresholds(network.variables["params"])}
    return lambda: np.asarray(forward(weights, images))


def without_thresholds(tree: Any) -> Any:
    """The parameters of the layers that a ReLU network has."""
    if not isinstance(tree, Mapping):
        return tree
    return {k: without_thresholds(v) for k, v in tree.items() if not k.startswith("act")}


def torch_calls(network: Network, images: np.ndarray, steps: int) -> dict[str, Callable]:
    """torch's ANN, eager and compiled, SpikingJelly's two modes and the QCFS loop.

    Channels last is the better layout for torch's convolutions here and is given to all of them.
    """
    import torch

    from benchmarks import peers

    variables = jax.device_get(network.variables)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    x = x.contiguous(memory_format=torch.channels_last)
    forward = peers.ann(variables).to(memory_format=torch.channels_last)
    runs = {
        "limit torch eager": forward,
        "limit torch compiled": torch.compile(forward),
        "spikingjelly single": peers.spikingjelly_single(variables, steps),
        "spikingjelly multi": peers.spikingjelly_multi(variables, steps),
        "qcfs loop": peers.qcfs_loop(variables, steps),
    }

    def call(f: Callable) -> np.ndarray:
        with torch.inference_mode():
            return f(x).numpy()

    return {name: functools.partial(call, f) for name, f in runs.items()}


def memory_growth(network: Network) -> float:
    """Temporary memory of the compiled simulator at T = 64 over that at T = 4, outputs excluded."""
    sizes = [
        compile_simulator(network, network.images[:32], t).memory_analysis().temp_size_in_bytes
        for t in (64, 4)
    ]
    return sizes[0] / sizes[1]


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
