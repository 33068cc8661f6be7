"""Values of a traced network as sums of NIR nodes, with what is still to be folded into a node.

NIR knows no scales or offsets beside its weights. So a value on its way to a neuron is a sum of
terms, each the output of nodes through a linear map that is not yet a node, times a factor, and
one offset. Factors and offsets end in the weights and biases of the node that is written last.
Nodes have the layout of NIR, [channels, height, width]; a signal remembers the layout of JAX.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BATCH, CHANNEL, UNIT = "b", "c", "1"


class Linear(NamedTuple):
    """A convolution or, without spatial axes, a matrix: out channels first, then in channels."""

    weight: np.ndarray  # [out, in / groups, *window]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


class Term(NamedTuple):
    """The sum of some nodes, through a linear map that is yet to be written, times a factor."""

    nodes: tuple[str, ...]
    linear: Linear | None
    scale: np.ndarray  # [] or [channels]
    inner: tuple[int, ...]  # spatial sizes before the linear map


class Signal(NamedTuple):
    """A value of the traced function."""

    terms: tuple[Term, ...]
    offset: np.ndarray  # [] or [channels], float32
    axes: tuple[str, ...]  # of each axis in JAX "b", "c", "s0", "s1", or "1" of length 1
    shape: tuple[int, ...]  # in NIR: channels, then the spatial sizes
    order: np.ndarray | None = None  # of a flattened one: where in NIR each entry of JAX is


class Writer:
    """The nodes and edges that are written."""

    def __init__(self) -> None:
        """Starts without any."""
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []

    def emit(self, name: str, node: Any, sources: Sequence[str]) -> str:
        """Adds a node after others, under the name or the next that is free."""
        # A slash would open a group in HDF5.
        name = name.replace("/", ".")
        unique, number = name, 1
        while unique in self.nodes:
            number += 1
            unique = f"{name}:{number}"
        self.nodes[unique] = node
        self.edges += [(source, unique) for source in sources]
        return unique

    def settle(self, signal: Signal) -> tuple[str, ...]:
        """Returns nodes whose sum is the signal; what is pending becomes nodes."""
        terms = list(signal.terms)
        if signal.offset.any():
            # The offset goes into a term with weights, or else into weights of its own.
            holder = next((i for i, t in enumerate(terms) if t.linear), 0)
            terms.insert(0, terms.pop(holder))
        nodes: list[str] = []
        for i, term in enumerate(terms):
            offset = signal.offset if i == 0 else np.float32(0)
            if term.linear is None and np.all(term.scale == 1) and not np.any(offset):
                nodes += term.nodes
            else:
                nodes.append(self._write(term, signal.shape, np.asarray(offset)))
        return tuple(dict.fromkeys(nodes))

    def plain(self, signal: Signal) -> tuple[Term, ...]:
        """Returns the signal as terms of nodes and factors alone, one for each factor."""
        if signal.offset.any():
            one = np.float32(1)
            return (Term(self.settle(signal), None, np.asarray(one), signal.shape[1:]),)
        groups: dict[bytes, Term] = {}
        for term in signal.terms:
            if term.linear is not None:
                node = self._write(term, signal.shape, np.zeros((), np.float32))
                term = Term((node,), None, np.ones((), np.float32), signal.shape[1:])
            # Terms of equal factors share one linear map on the sum of their nodes.
            key = np.broadcast_to(term.scale, signal.shape[:1]).tobytes()
            nodes = (*groups[key].nodes, *term.nodes) if key in groups else term.nodes
            groups[key] = term._replace(nodes=nodes)
        return tuple(groups.values())

    def _write(self, term: Term, shape: tuple[int, ...], offset: np.ndarray) -> str:
        """Writes the linear map of a term, or one that only scales, with the offset as bias."""
        import nir

        channels = shape[0]
        linear = term.linear or identity(channels, len(shape) - 1)
        # A term's factor is one for each output channel.
        scale = np.broadcast_to(term.scale, (channels,)).astype(np.float32)
        weight = whole(linear.weight, linear.groups)
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = np.broadcast_to(offset, (channels,)).astype(np.float32)
        if len(shape) == 1:
            node = nir.Affine(weight, bias) if bias.any() else nir.Linear(weight)
            return self.emit("linear", node, term.nodes)
        inner: Any = term.inner if term.linear else shape[1:]
        stride: Any = linear.stride
        padding: Any = linear.padding
        dilation: Any = linear.dilation
        if len(inner) == 1:
            node = nir.Conv1d(inner[0], weight, stride[0], padding[0], dilation[0], 1, bias)
        else:
            node = nir.Conv2d(inner, weight, stride, padding, dilation, 1, bias)
        return self.emit("conv", node, term.nodes)


def identity(channels: int, spatial: int) -> Linear:
    """Returns weights that change nothing: a convolution of one pixel, or a matrix."""
    if not spatial:
        return Linear(np.eye(channels, dtype=np.float32))
    window = np.ones((channels, 1, *[1] * spatial), np.float32)
    return pointwise(window, spatial, channels)


def pointwise(weight: np.ndarray, spatial: int, groups: int = 1, stride: int = 1) -> Linear:
    """Returns a convolution with a window of one pixel."""
    ones = (1,) * spatial
    return Linear(weight, (stride,) * spatial, (0,) * spatial, ones, groups)


def through(writer: Writer, signal: Signal, linear: Linear) -> tuple[Term, ...]:
    """Returns the terms of a linear map on a signal, factors folded into its weights."""
    terms = []
    per_group = linear.weight.shape[1]
    for term in writer.plain(signal):
        scale = np.broadcast_to(term.scale, signal.shape[:1]).reshape(linear.groups, per_group)
        # [out, in / groups]: an output sees the factors of its own group's inputs.
        each = np.repeat(scale, len(linear.weight) // linear.groups, axis=0)
        window = [1] * (linear.weight.ndim - 2)
        weight = (linear.weight * each.reshape(*each.shape, *window)).astype(np.float32)
        one = np.ones((), np.float32)
        terms.append(Term(term.nodes, linear._replace(weight=weight), one, signal.shape[1:]))
    return tuple(terms)


def symmetric(linear: Linear, pads: Sequence[tuple[int, int]]) -> Linear | None:
    """Returns a convolution with the same padding on both sides and a square window.

    Its window is filled up with zeros where they differ: the shape check of the package nir takes
    windows to be square.

    Args:
        linear: the convolution, its padding not yet set.
        pads: before and after, along each spatial axis.

    Returns:
        The convolution; None where a window would have to be filled and is dilated, or cannot be.

    Example:
        >>> filled = symmetric(pointwise(np.ones((1, 1, 1)), 1), [(0, 1)])
        >>> filled.weight.tolist(), filled.padding
        ([[[0.0, 1.0]]], (1,))
    """
    if min(min(pair) for pair in pads) < 0:
        return None
    lacking = [size - sum(pair) for size, pair in zip(linear.weight.shape[2:], pads, strict=True)]
    # n + 2p with p on both sides makes as many outputs as the window with its own padding.
    wanted = max(n + 2 * max(pair) for n, pair in zip(lacking, pads, strict=True))
    if any((wanted - n) % 2 for n in lacking):
        return None
    both = [(wanted - n) // 2 for n in lacking]
    fill = [(p - low, p - high) for p, (low, high) in zip(both, pads, strict=True)]
    if any(any(pair) for pair in fill) and set(linear.dilation) != {1}:
        return None
    weight = np.pad(linear.weight, [(0, 0), (0, 0), *fill])
    return linear._replace(weight=weight, padding=tuple(both))


def whole(weight: np.ndarray, groups: int) -> np.ndarray:
    """Returns the weights of a convolution in groups as those of one group, zeros between them.

    The shape check of the package nir knows no groups.
    """
    out, per_group = weight.shape[:2]
    full = np.zeros((out, per_group * groups, *weight.shape[2:]), np.float32)
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        full[rows, group * per_group : (group + 1) * per_group] = weight[rows]
    return full
