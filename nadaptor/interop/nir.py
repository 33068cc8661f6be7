"""Networks in the Neuromorphic Intermediate Representation (NIR), out and in.

NIR's integrate-and-fire neuron has a hard reset, starts at 0 and fires above its threshold; ours
subtracts the threshold, starts at half of it and fires at it. The metadata of each IF node say so,
and a reader that does not look there can be given `start="bias"`.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from nadaptor._checks import check_count, check_data_argnum, extra
from nadaptor._files import making, write_bytes
from nadaptor._jaxpr.trace import to_jaxpr, trace, variables
from nadaptor.interop.nir_read import build
from nadaptor.interop.nir_signals import BATCH, CHANNEL, Signal, Term
from nadaptor.interop.nir_walk import Layout, Walker
from nadaptor.transformation import spiking

Start = Literal["potential", "bias"]
KEY = "nadaptor"


def to_nir(
    f: Callable[..., Any],
    *args: Any,
    data_argnum: int = -1,
    start: Start = "potential",
    num_steps: int | None = None,
) -> Any:
    """Returns a network with quantized activations as a NIR graph of one example.

    Each activation becomes an IF node that gives out 1 at a spike, its threshold in units of the
    scale; scales are folded into the weights before and after it. The metadata of an IF node are
    `reset`, `start`, `fires` and `amplitude`, and those of the Input and Output node the `axes` of
    the arrays in JAX; in the graph images are [channels, height, width].

    Args:
        f: function whose activations are quantizers of `nadaptor`.
        *args: its arguments.
        data_argnum: which argument is the data, one float32 array with the examples along axis 0.
        start: "potential" leaves the start potential, half a threshold, to the reader, who finds it
            in the metadata; "bias" spreads it over the steps as a part of the bias, for readers
            that start at 0.
        num_steps: T, with `start="bias"` only.

    Returns:
        A `nir.NIRGraph`.

    Raises:
        ValueError: as `nadaptor.spiking`, or an operation has no node in NIR; the message names it.
        MissingPackageError: nir is not installed.

    Example:
        >>> import nadaptor, jax.numpy as jnp
        >>> f = lambda w, x: nadaptor.lsq(x @ w, 0.5, levels=2) @ w.T
        >>> graph = to_nir(f, jnp.eye(3), jnp.ones((1, 3)))
        >>> [type(node).__name__ for node in graph.nodes.values()]
        ['Input', 'Linear', 'IF', 'Linear', 'Output']

    Source: Pedersen et al., Neuromorphic intermediate representation, Nature Communications, 2024.
    """
    if start not in ("potential", "bias") or (start == "bias") != (num_steps is not None):
        raise ValueError(
            f"start={start!r} and num_steps={num_steps!r}: use start='potential', or start='bias' "
            "with the number of steps over which to spread it"
        )
    spread = 0 if num_steps is None else check_count(num_steps, "num_steps")
    position = check_data_argnum(data_argnum, args)
    data = args[position]
    if not hasattr(data, "shape") or len(data.shape) < 2:
        raise ValueError(
            f"data_argnum={data_argnum} must name one array with examples along axis 0"
        )
    layers = spiking(f, *args).layers
    # Not as `spiking` traces it: a convolution that was rewritten for speed is none for NIR.
    traced = trace(to_jaxpr(f, *args)[0])
    # Axes are x1, x2, ... until an operation says what they are.
    names = (BATCH, *(f"x{i}" for i in range(1, len(data.shape))))
    if len(names) == 2:
        names = (BATCH, CHANNEL)
    while True:
        # An operation that tells the axes apart names them, and the walk begins anew.
        try:
            return _walk(traced, args, position, layers, names, spread)
        except Layout as found:
            names = tuple(found.args[0].get(name, name) for name in names)


def from_nir(
    graph: Any, start: float | None = None
) -> tuple[Callable[[Mapping[str, Any], Any], Any], dict[str, Any]]:
    """Returns a NIR graph as a function with quantized activations, and its weights.

    `nadaptor.simulate(f, weights, x, num_steps=T)` runs it on x with the examples along axis 0, in
    the layout that the metadata name, or in that of NIR.

    Args:
        graph: a `nir.NIRGraph` of Conv1d, Conv2d, Affine, Linear, Scale, AvgPool2d, SumPool2d,
            Flatten and IF nodes, without loops.
        start: start potential of IF nodes without our metadata as a fraction of the threshold,
            which are then taken to be reset by subtraction; None refuses them, because NIR's own
            have a hard reset, which no ANN has the rates of.

    Returns:
        `f(weights, x)`, and the weights by the names of the nodes.

    Raises:
        ValueError: a node cannot be had here; the message names it.

    Example:
        >>> import nadaptor, jax.numpy as jnp
        >>> f = lambda w, x: nadaptor.lsq(x @ w, 0.5, levels=2) @ w.T
        >>> x = jnp.array([[0.25, 0.5, 1.0]])
        >>> g, weights = from_nir(to_nir(f, jnp.eye(3), x))
        >>> nadaptor.simulate(g, weights, x, num_steps=4).outputs[-1].tolist()
        [[0.25, 0.5, 1.0]]
    """
    return build(graph, start)


@making("path")
def write_nir(path: str | Path, graph: Any) -> None:
    """Writes a NIR graph, whole or not at all, with a digest in its metadata.

    Args:
        path: file to write, such as "net.nir".
        graph: a `nir.NIRGraph`.

    Raises:
        MissingPackageError: nir is not installed.
    """
    with extra("nir", "nadaptor.interop.nir"):
        import nir

    graph.metadata[KEY] = {"format": 1, "digest": _digest(graph)}
    # Any: nir declares a raw file, and writes to any.
    content: Any = io.BytesIO()
    nir.write(content, graph)
    write_bytes(Path(path), content.getvalue())


def read_nir(path: str | Path) -> Any:
    """Reads a NIR graph, and verifies the digest where there is one.

    Args:
        path: the file.

    Returns:
        The `nir.NIRGraph`.

    Raises:
        ValueError: there is no such file, or it is damaged.
        MissingPackageError: nir is not installed.
    """
    with extra("nir", "nadaptor.interop.nir"):
        import nir

    if not Path(path).is_file():
        raise ValueError(f"no file at {path}; nadaptor.interop.nir.write_nir writes one")
    try:
        graph = nir.read(path)
    # HDF5 and nir raise anything on what they cannot read.
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or no NIR: {line}; write it again") from error
    # Graphs of other programs have no digest.
    told = graph.metadata.get(KEY)
    if told is not None:
        wanted = told.get("digest") if isinstance(told, dict) else None
        wanted = wanted.decode(errors="replace") if isinstance(wanted, bytes) else wanted
        if wanted != _digest(graph):
            raise ValueError(f"{path} is damaged: its digest is another; write it again")
    return graph


def _walk(
    traced: Any,
    args: tuple[Any, ...],
    position: int,
    layers: Any,
    names: tuple[str, ...],
    spread: int,
) -> Any:
    """Writes the graph, with the input's axes named."""
    with extra("nir", "nadaptor.interop.nir"):
        import nir

    first = len(jax.tree.leaves(args[:position]))
    leaves = jax.tree.leaves(args)
    values = {**traced.consts, **dict(zip(traced.inputs, leaves, strict=True))}
    shape = tuple(args[position].shape)
    sizes = dict(zip(names, shape, strict=True))
    # Channels first, as in NIR; axes without a name keep their order.
    order = [n for n in (CHANNEL, "s0", "s1") if n in sizes] or names[1:]
    inner = tuple(sizes[n] for n in order)
    unnamed = {n: s for n, s in sizes.items() if n == BATCH or n.startswith("x")}
    walker = Walker(traced, values, layers, unnamed)
    told = {KEY: {"axes": " ".join(names)}}
    source = nir.Input(input_type={"input": np.array(inner)}, metadata=told)
    walker.writer.emit("input", source, ())
    one, zero = np.ones((), np.float32), np.zeros((), np.float32)
    data = Signal((Term(("input",), None, one, inner[1:]),), zero, names, inner)
    # The data is a signal, and no array to compute with.
    del values[traced.inputs[first]]
    walker.signals[traced.inputs[first]] = data

    def fire(layer: Any, x: Signal) -> Signal:
        levels, begin = layer.threshold, layer.start
        if spread:
            # After T steps the neuron has taken in what it would have begun with.
            x, begin = x._replace(offset=np.asarray(x.offset + begin / spread, np.float32)), 0.0
        threshold = np.full(x.shape, levels, np.float32)
        told = {"reset": "subtract", "start": float(begin), "amplitude": 1.0, "fires": "at"}
        node = nir.IF(np.ones_like(threshold), threshold, metadata={KEY: told})
        name = walker.writer.emit(layer.name, node, walker.writer.settle(x))
        # A spike is 1 there and `levels` here: the factor goes into the next weights.
        term = Term((name,), None, np.asarray(levels, np.float32), x.shape[1:])
        return x._replace(terms=(term,), offset=zero)

    walker.run(fire)
    outputs = traced.outputs
    if len(outputs) != 1 or variables(outputs)[0] not in walker.signals:
        raise ValueError("cannot write to NIR: the function has to return one array of spikes")
    result = walker.signals[variables(outputs)[0]]
    if result.order is not None:
        raise ValueError("cannot write to NIR: the result is a flattened image; return the image")
    told = {KEY: {"axes": " ".join(result.axes)}}
    sink = nir.Output(output_type={"output": np.array(result.shape)}, metadata=told)
    walker.writer.emit("output", sink, walker.writer.settle(result))
    return nir.NIRGraph(walker.writer.nodes, walker.writer.edges)


def _digest(graph: Any) -> str:
    """A SHA-256 over all nodes and edges, however the arrays were stored."""
    told = graph.to_dict()
    # The digest stands there.
    told.pop("metadata", None)
    return hashlib.sha256(json.dumps(_plain(told), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A node as JSON can hold it: arrays by the digest of their numbers."""
    if isinstance(value, dict):
        # What is empty is not stored.
        kept = {k: v for k, v in value.items() if v is not None and not _is_empty(v)}
        return {str(k): _plain(v) for k, v in kept.items()}
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "OSU":
        return [_plain(x) for x in array.tolist()]
    # Whatever type they are stored in, equal numbers have one digest.
    exact = np.ascontiguousarray(array, np.float64)
    return [list(array.shape), hashlib.sha256(exact.tobytes()).hexdigest()]


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value
