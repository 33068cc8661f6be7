"""A NIR graph as a function: each node by its type, in the order of the edges."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor.quantizers import lsq, slip_relu

KEY = "nadaptor"
_WEIGHTS = {
    "Conv1d": ("weight", "bias"),
    "Conv2d": ("weight", "bias"),
    "Affine": ("weight", "bias"),
    "Linear": ("weight",),
    "Scale": ("scale",),
}
_OTHERS = {"Input", "Output", "IF", "AvgPool2d", "SumPool2d", "Flatten"}
_AXES = ("c", "s0", "s1")


def build(
    graph: Any, start: float | None
) -> tuple[Callable[[Mapping[str, Any], Any], Any], dict[str, Any]]:
    """Returns the graph as `f(weights, x)`, and its weights; see `nadaptor.interop.nir.from_nir`.

    Args:
        graph: a `nir.NIRGraph`.
        start: start potential of IF nodes without metadata, as a fraction of the threshold.

    Raises:
        ValueError: a node cannot be had here.
    """
    before = _before(graph)
    order = _ordered(graph, before)
    neurons = {n: _neuron(n, graph.nodes[n], start) for n in order if _kind(graph, n) == "IF"}
    weights = {
        name: {w: jnp.asarray(getattr(graph.nodes[name], w), jnp.float32) for w in names}
        for name in order
        if (names := _WEIGHTS.get(_kind(graph, name)))
    }

    def f(weights: Mapping[str, Any], x: Any) -> Any:
        values: dict[str, Any] = {}
        for name in order:
            node, kind = graph.nodes[name], _kind(graph, name)
            inputs = [values[source] for source in before[name]]
            if kind == "Input":
                values[name] = _moved(jnp.asarray(x), node, inward=True)
                continue
            total = sum(inputs[1:], inputs[0])
            if kind == "Output":
                return _moved(total, node, inward=False)
            # The slashes of a layer's scopes are dots in a graph.
            with jax.named_scope(name.replace(".", "/")):
                fire = neurons.get(name)
                values[name] = fire(total) if fire else _node(kind, node, weights.get(name), total)
        raise ValueError("the graph has no Output node")

    return f, weights


def _kind(graph: Any, name: str) -> str:
    # By name, so that nir is not imported to read a graph.
    return type(graph.nodes[name]).__name__


def _before(graph: Any) -> dict[str, list[str]]:
    before: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        if source not in before or target not in before:
            raise ValueError(f"an edge leads from {source!r} to {target!r}, which are no two nodes")
        before[target].append(source)
    return before


def _ordered(graph: Any, before: Mapping[str, list[str]]) -> list[str]:
    """The nodes, each after those before it."""
    known = _WEIGHTS.keys() | _OTHERS
    for name in graph.nodes:
        kind = _kind(graph, name)
        if kind not in known:
            raise ValueError(
                f"node {name!r} is a {kind}, which has no quantized network; the nodes that can be "
                f"read are {', '.join(sorted(known))}"
            )
        if kind != "Input" and not before[name]:
            raise ValueError(f"no edge leads to node {name!r}")
    order: list[str] = []
    left = dict(before)
    while left:
        ready = [n for n, sources in left.items() if not left.keys() & set(sources)]
        if not ready:
            raise ValueError(f"the nodes {', '.join(left)} form a loop; only loops in time fire")
        order += ready
        left = {n: sources for n, sources in left.items() if n not in ready}
    return order


def _neuron(name: str, node: Any, start: float | None) -> Callable[[Any], Any]:
    """An IF node as a quantizer."""
    told = node.metadata.get(KEY) or {}
    threshold = np.asarray(node.v_threshold, np.float32)
    if not told and start is None:
        raise ValueError(
            f"IF node {name!r} has a hard reset, as NIR defines it, and no quantized network has "
            "its rates; where it is reset by subtraction say so, with its start potential as a "
            "fraction of the threshold: start=0.0, or 0.5 for the best"
        )
    if np.any(node.v_reset) or not (threshold > 0).all() or _text(told, "reset") != "subtract":
        raise ValueError(
            f"IF node {name!r} is not reset by subtraction, or to another potential than 0, or has "
            "a threshold that is not positive"
        )
    if told and "start" not in told:
        raise ValueError(
            f"IF node {name!r} has metadata of nadaptor without its start potential, 'start'; "
            "write the graph again by nadaptor.interop.nir.write_nir"
        )
    level = float(threshold.flat[0])
    same = bool((threshold == level).all())
    # A whole threshold is a number of levels; any other is one level of that scale.
    levels = int(level) if same and level == int(level) else 1
    scale = np.float32(1) if levels == level and same else threshold / np.float32(levels)
    begin = float(told["start"]) / level if told else float(start or 0)
    resistance, amplitude = np.asarray(node.r, np.float32), float(told.get("amplitude", 1.0))

    def fire(x: Any) -> Any:
        x = x if (resistance == 1).all() else x * resistance
        # slip_relu with slope 0 is lsq with another start.
        if begin == 0.5:
            y = lsq(x, scale, levels)
        else:
            y = slip_relu(x, scale * levels, levels, slope=0.0, floor_shift=begin)
        # A spike is worth the amplitude there, and scale * levels here.
        return y / (scale * np.float32(levels) / np.float32(amplitude))

    return fire


def _text(told: Mapping[str, Any], field: str) -> str:
    value = told.get(field, "subtract")
    # HDF5 may give text back as bytes.
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _node(kind: str, node: Any, weights: Any, x: Any) -> Any:
    """What a node without neurons makes of [B, channels, ...]."""
    if kind in ("Affine", "Linear"):
        y = x @ weights["weight"].T
        return y + weights["bias"] if kind == "Affine" else y
    if kind == "Scale":
        return x * weights["scale"]
    if kind == "Flatten":
        # NIR counts axes without the batch.
        first, last = int(node.start_dim), int(node.end_dim)
        shape = x.shape[1:]
        first, last = first % len(shape), last % len(shape)
        return x.reshape(x.shape[0], *shape[:first], -1, *shape[last + 1 :])
    if kind in ("AvgPool2d", "SumPool2d"):
        return _pool(kind, node, x)
    rank = x.ndim - 2
    stride, dilation = (_each(value, rank) for value in (node.stride, node.dilation))
    padding = node.padding
    padding = (
        _text({"p": padding}, "p").upper()
        if isinstance(padding, str | bytes)
        else [(p, p) for p in _each(padding, rank)]
    )
    y = jax.lax.conv_general_dilated(
        x,
        weights["weight"],
        stride,
        padding,
        rhs_dilation=dilation,
        feature_group_count=int(node.groups),
    )
    return y + weights["bias"].reshape(-1, *[1] * rank)


def _pool(kind: str, node: Any, x: Any) -> Any:
    kernel, stride, padding = (
        _each(value, 2) for value in (node.kernel_size, node.stride, node.padding)
    )
    pads = [(0, 0), (0, 0), *((p, p) for p in padding)]
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, *kernel), (1, 1, *stride), pads)
    return total / np.float32(np.prod(kernel)) if kind == "AvgPool2d" else total


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in np.ravel(value))
    return values * rank if len(values) == 1 else values


def _moved(x: Any, node: Any, inward: bool) -> Any:
    """Moves axes between the layout of JAX, which the metadata name, and that of NIR."""
    told = node.metadata.get(KEY)
    if not told:
        return x
    axes = _text(told, "axes").split()
    units = [i for i, axis in enumerate(axes) if axis == "1"]
    named = [axis for axis in axes if axis != "1"]
    # An input without channels and pixels has the order of NIR already.
    ours = ["b", *(a for a in _AXES if a in named)]
    if sorted(ours) != sorted(named):
        return x
    if inward:
        return jnp.squeeze(x, units).transpose([named.index(axis) for axis in ours])
    return jnp.expand_dims(x.transpose([ours.index(axis) for axis in named]), units)
