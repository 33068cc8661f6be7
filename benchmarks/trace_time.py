"""How long `nadaptor.quantize` takes to trace, beside the same network written by hand.

`python -m benchmarks.trace_time` traces ResNet-50 at 224 pixels on abstract weights: with ReLUs as
they are, with the activation layers in their place, and with ReLUs that `quantize` replaces; each
as a function and as its simulation. Processor seconds, in turn; a ratio is the median of the ratios
within a round.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nadaptor
from benchmarks.timing import in_turn, median, ratio
from nadaptor._files import write_csv
from nadaptor._provenance import machine
from nadaptor.models import Lsq, create, fold_batch_norm
from nadaptor.reports.tables import markdown

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to trace."""

    # Name of the network, in nadaptor.models.MODELS.
    model: str = "resnet50"
    # Pixels of a side.
    image_size: int = 224
    # Rounds.
    rounds: int = 9
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> list[dict[str, Any]]:
    """Times every trace, prints the table, writes trace_time.csv."""
    rows = list(measure(options))
    print(markdown([{name: str(value) for name, value in row.items()} for row in rows]))
    write_csv(options.out / "trace_time.csv", [{"machine": machine(), **row} for row in rows])
    return rows


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Yields a row for the function and one for its simulation."""
    images = jax.ShapeDtypeStruct((4, options.image_size, options.image_size, 3), jnp.float32)
    relu = create(options.model, 1000, norm=None)
    hand = relu.clone(activation=functools.partial(Lsq, levels=2))
    quantized = nadaptor.quantize(relu.apply, levels=2)
    # Folded weights, for the spiking network has no norms.
    normed = create(options.model, 1000, activation=functools.partial(Lsq, levels=2))
    weights = jax.eval_shape(lambda x: fold_batch_norm(normed.init(jax.random.key(0), x)), images)
    scales = jax.eval_shape(quantized.init, weights, images)
    calls = {
        "relu": (relu.apply, (weights, images)),
        "hand": (hand.apply, (weights, images)),
        "quantize": (quantized, (scales, weights, images)),
    }
    for what, names in (("function", list(calls)), ("simulation", ["hand", "quantize"])):
        simulated = what == "simulation"
        traces = {name: _trace(*calls[name], simulated) for name in names}
        seconds = in_turn(traces, options.rounds, clock=time.process_time)
        yield {
            "traced": what,
            **{f"{n}, s": round(median(seconds[n]), 3) if n in seconds else "" for n in calls},
            "quantize over hand": round(ratio(seconds["quantize"], seconds["hand"]), 2),
        }


def _trace(f: Callable[..., Any], args: tuple[Any, ...], simulated: bool) -> Callable[[], Any]:
    """A call that traces f anew, or its simulation."""
    if simulated:
        f = functools.partial(nadaptor.simulate, f, num_steps=16)

    def trace() -> Any:
        jax.clear_caches()
        return jax.make_jaxpr(lambda *args: f(*args))(*args)

    return trace


if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
