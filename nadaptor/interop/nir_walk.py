"""From the operations of a traced network to NIR nodes, one rule for each operation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from nadaptor._jaxpr.affine import describe
from nadaptor._jaxpr.trace import Op, Trace
from nadaptor.interop.nir_signals import (
    BATCH,
    CHANNEL,
    UNIT,
    Linear,
    Signal,
    Term,
    Writer,
    pointwise,
    symmetric,
    through,
)

_ZERO = np.zeros((), np.float32)
_SAME = {"convert_element_type", "copy", "copy_p", "stop_gradient", "name", "reduce_precision"}
_SPATIAL = ("s0", "s1")


class Layout(Exception):
    """Which axis of the input is which, as the first operation that tells them apart says it."""


class Walker:
    """Goes through the operations of a function; live values are signals, the others arrays."""

    def __init__(
        self,
        traced: Trace,
        values: dict[int, Any],
        layers: Sequence[Any],
        sizes: Mapping[str, int],
    ) -> None:
        """Starts before the first operation; `sizes` are those of the batch and unnamed axes."""
        self.sizes = sizes
        self.ops, self.values, self.layers = traced.ops, values, iter(layers)
        self.writer = Writer()
        self.signals: dict[int, Signal] = {}

    def run(self, fire: Callable[[Any, Signal], Signal]) -> None:
        """Evaluates every operation; `fire` writes a layer of neurons."""
        for op in self.ops:
            live = [not isinstance(i, Literal) and i in self.signals for i in op.inputs]
            if op.mark is not None:
                if not live[0]:
                    raise _refusal(op, "no data reach it")
                self.signals[op.outputs[0]] = fire(next(self.layers), self._read(op.inputs[0]))
            elif any(live):
                self.signals[op.outputs[0]] = self._apply(op, live)
            else:
                outputs = op.bind(*map(self._read, op.inputs))
                self.values.update(zip(op.outputs, outputs, strict=True))

    def _read(self, atom: Any) -> Any:
        if isinstance(atom, Literal):
            return atom.val
        return self.signals[atom] if atom in self.signals else self.values[atom]

    def _apply(self, op: Op, live: Sequence[bool]) -> Signal:
        rule = getattr(self, f"_{op.primitive.name.replace('-', '_')}", None)
        if op.avals[0].dtype != np.float32:
            raise _refusal(op, f"NIR's weights are float32, not {op.avals[0].dtype}")
        if op.primitive.name in _SAME:
            return self._read(op.inputs[0])
        if rule is None:
            raise _refusal(op)
        return rule(op, live, *map(self._read, op.inputs))

    def _neg(self, op: Op, live: Any, x: Signal) -> Signal:
        return _scaled(x, np.float32(-1))

    def _mul(self, op: Op, live: Sequence[bool], x: Any, y: Any) -> Signal:
        signal, constant = (x, y) if live[0] else (y, x)
        return _scaled(signal, _of_channels(op, signal, constant))

    def _div(self, op: Op, live: Sequence[bool], x: Any, y: Any) -> Signal:
        if not live[0]:
            raise _refusal(op)
        return _scaled(x, np.float32(1) / _of_channels(op, x, y))

    def _add(self, op: Op, live: Sequence[bool], x: Any, y: Any) -> Signal:
        if not all(live):
            signal, constant = (x, y) if live[0] else (y, x)
            return signal._replace(offset=signal.offset + _of_channels(op, signal, constant))
        same = x.axes == y.axes and x.shape == y.shape
        if not same or (x.order is None) != (y.order is None):
            raise _refusal(op, "it adds values of different layouts")
        return x._replace(terms=_merged(x.terms + y.terms), offset=x.offset + y.offset)

    _add_any = _add

    def _sub(self, op: Op, live: Sequence[bool], x: Any, y: Any) -> Signal:
        y = _scaled(y, np.float32(-1)) if live[1] else -np.asarray(y)
        return self._add(op, live, x, y)

    def _transpose(self, op: Op, live: Any, x: Signal) -> Signal:
        return x._replace(axes=tuple(x.axes[i] for i in op.params["permutation"]))

    def _broadcast_in_dim(self, op: Op, live: Any, x: Signal, *sizes: Any) -> Signal:
        places, shape = op.params["broadcast_dimensions"], op.params["shape"]
        old = _lengths(x, self)
        if any(shape[new] != old[i] for i, new in enumerate(places)):
            raise _refusal(op, "it repeats a value")
        axes = [UNIT] * len(shape)
        for i, new in enumerate(places):
            axes[new] = x.axes[i]
        if any(a == UNIT and n != 1 for a, n in zip(axes, shape, strict=True)):
            raise _refusal(op, "it repeats a value")
        return x._replace(axes=tuple(axes))

    def _reshape(self, op: Op, live: Any, x: Signal, *sizes: Any) -> Signal:
        return self._reshaped(op, x, op.avals[0].shape)

    _squeeze = _expand_dims = _reshape

    def _reshaped(self, op: Op, x: Signal, shape: tuple[int, ...]) -> Signal:
        """Axes of length 1 come and go; all but the batch may become one."""
        known = [(a, n) for a, n in zip(x.axes, _lengths(x, self), strict=True)]
        kept = [(a, n) for a, n in known if a != UNIT]
        sizes = [n for n in shape if n != 1]
        if [n for _, n in kept if n != 1] == sizes and len(shape) >= len(kept):
            return x._replace(axes=_with_units(kept, shape))
        batch = next(n for a, n in known if a == BATCH)
        entries = int(np.prod(x.shape))
        if x.axes[0] == BATCH and sizes == [n for n in (batch, entries) if n != 1]:
            return self._flat(op, x)
        raise _refusal(op, f"it makes {list(shape)} of axes {' '.join(x.axes)}")

    def _flat(self, op: Op, x: Signal) -> Signal:
        import nir

        if len(x.shape) == 1:
            return x._replace(axes=(BATCH, CHANNEL))
        if any(axis.startswith("x") for axis in x.axes):
            # No convolution before: channels and pixels are what the input's order makes them.
            raise _layout(op, x, next(axis for axis in x.axes if axis.startswith("x")))
        terms = []
        for term in self.writer.plain(x):
            node = nir.Flatten({"input": np.array(x.shape)}, start_dim=0, end_dim=-1)
            name = self.writer.emit("flatten", node, term.nodes)
            each = np.repeat(np.broadcast_to(term.scale, x.shape[:1]), int(np.prod(x.shape[1:])))
            terms.append(Term((name,), None, each if term.scale.ndim else term.scale, ()))
        places = np.arange(int(np.prod(x.shape))).reshape(x.shape)
        names = (CHANNEL, *_SPATIAL[: len(x.shape) - 1])
        order = [names.index(axis) for axis in x.axes if axis not in (BATCH, UNIT)]
        at = places.transpose(order).ravel()
        shape = (at.size,)
        return Signal(tuple(terms), _ZERO, (BATCH, CHANNEL), shape, at)

    def _slice(self, op: Op, live: Any, x: Signal) -> Signal:
        """Every nth pixel from the first on: a convolution of one pixel with a stride."""
        lengths = _lengths(x, self)
        strides = op.params["strides"] or (1,) * len(lengths)
        spatial = {a: s for a, s in zip(x.axes, strides, strict=True) if a in _SPATIAL}
        whole = all(
            start == 0 and (-(-n // s) == size) and (s == 1 or a in _SPATIAL)
            for a, n, start, s, size in zip(
                x.axes, lengths, op.params["start_indices"], strides, op.avals[0].shape, strict=True
            )
        )
        if not whole or len(set(spatial.values())) != 1:
            raise _refusal(op, "only every nth pixel can be picked")
        stride, rank = next(iter(spatial.values())), len(x.shape) - 1
        ones = np.ones((x.shape[0], 1, *[1] * rank), np.float32)
        linear = pointwise(ones, rank, x.shape[0], stride)
        shape = (x.shape[0], *(-(-n // stride) for n in x.shape[1:]))
        return x._replace(terms=through(self.writer, x, linear), offset=_ZERO, shape=shape)

    def _pad(self, op: Op, live: Any, x: Signal, value: Any) -> Signal:
        """Channels of zeros: a convolution of one pixel."""
        config = op.params["padding_config"]
        moved = [a for a, pads in zip(x.axes, config, strict=True) if any(pads)]
        low, high, inner = config[x.axes.index(CHANNEL)]
        zeros = moved == [CHANNEL] and not inner and min(low, high) >= 0 and not np.any(value)
        if not zeros or x.order is not None:
            raise _refusal(op, "only channels of zeros can be added")
        rank = len(x.shape) - 1
        weight = np.pad(np.eye(x.shape[0], dtype=np.float32), ((low, high), (0, 0)))
        weight = weight.reshape(*weight.shape, *[1] * rank)
        linear = pointwise(weight, rank) if rank else Linear(weight)
        shape = (x.shape[0] + low + high, *x.shape[1:])
        return x._replace(terms=through(self.writer, x, linear), offset=_ZERO, shape=shape)

    def _dot_general(self, op: Op, live: Sequence[bool], x: Any, y: Any) -> Signal:
        contract, batch = op.params["dimension_numbers"]
        signal, weight = (x, y) if live[0] else (y, x)
        here, there = contract if live[0] else contract[::-1]
        weight = np.asarray(weight, np.float32)
        if all(live) or any(batch) or len(here) != 1 or weight.ndim != 2:
            raise _refusal(op, "it is no matrix on one axis")
        if signal.axes[here[0]].startswith("x"):
            raise _layout(op, signal, signal.axes[here[0]])
        if signal.axes[here[0]] != CHANNEL:
            raise _refusal(op, "it mixes pixels")
        weight = weight.T if there[0] == 0 else weight  # [out, in], in the order of JAX
        if signal.order is not None:
            ordered = np.empty_like(weight)
            ordered[:, signal.order] = weight
            weight = ordered
        rank = len(signal.shape) - 1
        full = weight.reshape(*weight.shape, *[1] * rank)
        linear = pointwise(full, rank) if rank else Linear(weight)
        rest = tuple(a for i, a in enumerate(signal.axes) if i != here[0])
        axes = (*rest, CHANNEL) if live[0] else (CHANNEL, *rest)
        shape = (len(weight), *signal.shape[1:])
        return Signal(through(self.writer, signal, linear), _ZERO, axes, shape)

    def _conv_general_dilated(self, op: Op, live: Sequence[bool], x: Any, y: Any) -> Signal:
        params, spec = op.params, op.params["dimension_numbers"]
        if not live[0] or live[1]:
            raise _refusal(op)
        wanted = (BATCH, CHANNEL, *_SPATIAL)[: len(spec.lhs_spec)]
        found = tuple(x.axes[i] for i in spec.lhs_spec)
        if any(axis.startswith("x") for axis in found):
            raise Layout(dict(zip(found, wanted, strict=True)))
        rank = len(found) - 2
        if found != wanted or rank not in (1, 2):
            raise _refusal(op, f"its axes are {' '.join(found)}")
        if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
            raise _refusal(op, "it is a transposed convolution")
        weight = np.asarray(y, np.float32).transpose(spec.rhs_spec)
        groups, dilation = params["feature_group_count"], params["rhs_dilation"]
        linear = Linear(weight, params["window_strides"], (), dilation, groups)
        linear = symmetric(linear, params["padding"])
        if linear is None:
            raise _refusal(op, "its window cannot be made square, with equal padding")
        axes = [BATCH] * len(found)
        for place, axis in zip(spec.out_spec, wanted, strict=True):
            axes[place] = axis
        sizes = tuple(op.avals[0].shape[i] for i in spec.out_spec[1:])
        return Signal(through(self.writer, x, linear), _ZERO, tuple(axes), sizes)

    def _reduce_window_sum(self, op: Op, live: Any, x: Signal) -> Signal:
        params = op.params
        dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
        if dilated or any(any(pad) for pad in params["padding"]):
            raise _refusal(op, "its windows are padded or dilated")
        each = zip(x.axes, params["window_dimensions"], params["window_strides"], strict=True)
        windows = {axis: (size, stride) for axis, size, stride in each if (size, stride) != (1, 1)}
        if len(x.shape) != 3 or not windows.keys() <= set(_SPATIAL):
            raise _refusal(op, "it does not pool the pixels of an image")
        kernel, stride = zip(*(windows.get(a, (1, 1)) for a in _SPATIAL), strict=True)
        lengths = dict(zip(x.axes, op.avals[0].shape, strict=True))
        shape = (x.shape[0], *(lengths[a] for a in _SPATIAL))
        return x._replace(terms=self._pooled(x, kernel, stride), offset=_ZERO, shape=shape)

    def _reduce_sum(self, op: Op, live: Any, x: Signal) -> Signal:
        summed = {x.axes[i] for i in op.params["axes"]} - {UNIT}
        if len(x.shape) != 3 or summed != set(_SPATIAL):
            raise _refusal(op, "it does not sum all pixels of an image")
        axes = tuple(a for i, a in enumerate(x.axes) if i not in op.params["axes"])
        kernel = x.shape[1:]
        pooled = self._pooled(x, kernel, kernel)
        flat = x._replace(terms=pooled, offset=_ZERO, shape=(x.shape[0], 1, 1))
        return self._flat(op, flat)._replace(axes=axes, order=None)

    def _pooled(
        self, x: Signal, kernel: tuple[int, ...], stride: tuple[int, ...]
    ) -> tuple[Term, ...]:
        """A sum over windows as a mean times the size of the window."""
        import nir

        terms, size = [], np.float32(np.prod(kernel))
        for term in self.writer.plain(x):
            node = nir.AvgPool2d(np.array(kernel), np.array(stride), np.array((0, 0)))
            name = self.writer.emit("pool", node, term.nodes)
            terms.append(Term((name,), None, term.scale * size, ()))
        return tuple(terms)


def _layout(op: Op, x: Signal, channel: str) -> Layout:
    """The axis of the channels as it is said, and all others as those of pixels in their order."""
    others = [axis for axis in x.axes if axis not in (BATCH, UNIT, channel)]
    if len(others) > len(_SPATIAL):
        raise _refusal(op, f"NIR has two axes of pixels, not {len(others)}")
    return Layout({channel: CHANNEL, **dict(zip(others, _SPATIAL, strict=False))})


def _scaled(x: Signal, factor: np.ndarray | np.float32) -> Signal:
    terms = tuple(t._replace(scale=np.asarray(t.scale * factor, np.float32)) for t in x.terms)
    return x._replace(terms=terms, offset=np.asarray(x.offset * factor, np.float32))


def _merged(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Terms of the same nodes as one: NIR has one edge between two nodes."""
    plain: dict[tuple[str, ...], Term] = {}
    for term in terms:
        if term.linear is None:
            if (before := plain.get(term.nodes)) is not None:
                scale = np.asarray(before.scale + term.scale, np.float32)
                term = term._replace(scale=scale)
            plain[term.nodes] = term
    return (*(t for t in terms if t.linear is not None), *plain.values())


def _of_channels(op: Op, x: Signal, constant: Any) -> np.ndarray:
    """A constant as one number, or one for each channel in the order of NIR."""
    array = np.asarray(constant, np.float32)
    if array.size == 1 or np.ptp(array) == 0:
        return np.asarray(array.ravel()[0])
    if CHANNEL not in x.axes or array.ndim != len(x.axes):
        if any(axis.startswith("x") for axis in x.axes):
            raise _layout(op, x, x.axes[-1])
        raise _refusal(op, "a constant differs within a channel")
    each = np.moveaxis(array, x.axes.index(CHANNEL), 0).reshape(x.shape[0], -1)
    if np.ptp(each, axis=1).any():
        raise _refusal(op, "a constant differs between the pixels of a channel")
    if x.order is None:
        return each[:, 0]
    ordered = np.empty_like(each[:, 0])
    ordered[x.order] = each[:, 0]
    return ordered


def _lengths(x: Signal, walker: Walker) -> tuple[int, ...]:
    sizes = dict(zip((CHANNEL, *_SPATIAL), x.shape, strict=False))
    sizes |= {UNIT: 1, **walker.sizes}
    return tuple(sizes[axis] for axis in x.axes)


def _with_units(kept: list[tuple[str, int]], shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names the axes of a shape: those kept in their order, the new ones of length 1."""
    axes, rest = [], list(kept)
    spare = len(shape) - len(kept)
    for size in shape:
        if rest and rest[0][1] == size and not (size == 1 and rest[0][1] != 1):
            axes.append(rest.pop(0)[0])
        elif size == 1 and spare:
            axes.append(UNIT)
            spare -= 1
    return tuple(axes)


def _refusal(op: Op, why: str = "NIR has no node for it") -> ValueError:
    where = f" at {op.location.source}" if op.location.source else ""
    return ValueError(
        f"cannot write to NIR: {describe(op)}{where}: {why}; NIR holds convolutions, matrices, "
        "sums, scales, average pooling and flattening between neurons"
    )
