"""What the simulator's benchmark times: each competitor as a call that waits for its result."""

import functools
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nadaptor
from benchmarks.networks import Network
from nadaptor.models import Relu

Call = Callable[[], np.ndarray]
LAYOUTS = ("NHWC", "NCHW")
OURS: Mapping[str, Mapping[str, Any]] = {
    "ours direct": {},
    "ours fast": {"fast_convolution": True},
    "ours events": {"events": True},
    # The whole batch, step by step: what tiles and chunks are worth.
    "ours direct plain": {"tile_size": 10_000, "steps_per_chunk": 1},
}


def competitors(
    network: Network, images: np.ndarray, steps: int, wanted: Set[str] | None = None
) -> dict[str, Call]:
    """Everything that is timed on one network, batch and T, or what is wanted of it.

    A name ends in its setting, if it has any: the peers' memory layout. Names that begin with
    "limit" make one forward pass of the ANN, the others T steps and return means [T, N, 10].
    """
    makers = {**_ours(network, images, steps), **_peers(network, images, steps)}
    return {name: make() for name, make in makers.items() if wanted is None or name in wanted}


def _ours(network: Network, images: np.ndarray, steps: int) -> dict[str, Callable[[], Call]]:
    x = jnp.asarray(images)

    def forward() -> Call:
        weights = {"params": without_thresholds(network.variables["params"])}
        ann = network.model.clone(activation=Relu)
        return functools.partial(_fetch, jax.jit(ann.apply).lower(weights, x).compile(), weights, x)

    def simulator(options: Mapping[str, Any]) -> Call:
        compiled = compile_simulator(network, images, steps, **options)
        return functools.partial(_fetch, compiled, network.variables, x)

    return {
        "limit jax": forward,
        **{name: functools.partial(simulator, options) for name, options in OURS.items()},
    }


def compile_simulator(network: Network, images: Any, steps: int, **options: Any) -> Any:
    """The compiled simulator, from (variables, images) to running means [T, N, 10]."""

    def simulated(variables: Any, images: jax.Array) -> jax.Array:
        axes = (None, 0)
        # One device a core: see `benchmarks.simulator.run`.
        devices = jax.devices() if len(images) % len(jax.devices()) == 0 else None
        where = {"in_axes": axes, "devices": devices}
        run = functools.partial(nadaptor.simulate, num_steps=steps, **where, **options)
        return run(network.model.apply, variables, images).outputs

    return jax.jit(simulated).lower(network.variables, images).compile()


def without_thresholds(tree: Any) -> Any:
    """The parameters of the layers that a ReLU network has."""
    if not isinstance(tree, Mapping):
        return tree
    return {k: without_thresholds(v) for k, v in tree.items() if not k.startswith("act")}


def _peers(network: Network, images: np.ndarray, steps: int) -> dict[str, Callable[[], Call]]:
    """torch's ANN, eager and compiled, SpikingJelly's two modes and the QCFS loop, by layout.

    All run in inference mode, with batch norm folded.
    """
    import torch

    from benchmarks import peers

    variables = jax.device_get(network.variables)
    formats = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
    networks = {
        "limit torch eager": lambda: peers.ann(variables),
        "limit torch compiled": lambda: peers.ann(variables),
        "spikingjelly single": lambda: peers.SingleStep(variables, steps),
        "spikingjelly multi": lambda: peers.MultiStep(variables, steps),
        "qcfs loop": lambda: peers.QcfsLoop(variables, steps),
    }

    def prepare(name: str, layout: str) -> Call:
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        x = x.contiguous(memory_format=formats[layout])
        run = networks[name]().eval().to(memory_format=formats[layout])
        run = torch.compile(run) if name.endswith("compiled") else run

        def call() -> np.ndarray:
            with torch.inference_mode():
                return run(x).numpy()

        if name.endswith("compiled"):
            call()
        return call

    return {
        f"{name} {layout}": functools.partial(prepare, name, layout)
        for layout in LAYOUTS
        for name in networks
    }


def _fetch(f: Callable, *args: Any) -> np.ndarray:
    return np.asarray(f(*args))
