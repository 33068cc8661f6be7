"""Random networks of affine operations and quantizers, as JAX and as plain numpy in float64.

The numbers are dyadic and small enough that float32 rounds none of them: what is the same in
mathematics is the same to the bit. The numpy side shares nothing with the package: an integrate-
and-fire neuron is written out here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import nadaptor

EXAMPLES, FEATURES = 3, 4


class Operation(NamedTuple):
    """One operation, its operands by their positions, and what it is parametrised by."""

    name: str
    operands: tuple[int, ...]
    detail: Any = None


# Each affine operation on [B, FEATURES], for numpy and jax alike; `xp` is one of the two.
AFFINE = {
    "matmul": lambda xp, d, a: a @ d,
    "add": lambda xp, d, a: a + d[0],
    "scale": lambda xp, d, a: a * d[0],
    "negate": lambda xp, d, a: -a,
    "plus": lambda xp, d, a, b: a + b,
    "minus": lambda xp, d, a, b: a - b,
    "reverse": lambda xp, d, a: a[:, ::-1],
    "gather": lambda xp, d, a: a[:, [3, 0, 0, 2]],
    "roll": lambda xp, d, a: xp.roll(a, 1, 1),
    "pad": lambda xp, d, a: xp.pad(a[:, 1:], ((0, 0), (1, 0)), constant_values=0.5),
    "concatenate": lambda xp, d, a, b: xp.concatenate([a[:, :2], b[:, 2:]], 1),
    "select": lambda xp, d, a, b: xp.where(d[0] > 0, a, b),
    "sum": lambda xp, d, a: a + a.sum(1, keepdims=True),
    "mean": lambda xp, d, a: xp.repeat(a.reshape(-1, 2, 2).mean(2), 2, 1),
    "cumsum": lambda xp, d, a: xp.cumsum(a, 1),
    "transpose": lambda xp, d, a: (d.T @ a.T).T,
    "reshape": lambda xp, d, a: (a.reshape(-1, 2) * d[0, :2]).reshape(a.shape),
    "einsum": lambda xp, d, a: xp.einsum("bi,ij->bj", a, d),
}
# What else has to be seen through: written in JAX alone, each with its equal in numpy.
WRAPPED = {
    "jit": (lambda d, a: jax.jit(lambda a: 2 * a)(a), lambda d, a: 2 * a),
    "checkpoint": (lambda d, a: jax.checkpoint(lambda a: a @ d)(a), lambda d, a: a @ d),
    "vmap": (lambda d, a: jax.vmap(lambda a: d @ a)(a), lambda d, a: a @ d.T),
    "scan": (
        lambda d, a: jax.lax.scan(lambda c, y: (c + y, c), jnp.zeros(len(a)), a.T)[1].T,
        lambda d, a: np.cumsum(a, 1) - a,
    ),
    "half": (lambda d, a: jax.lax.stop_gradient(a) * 0.5, lambda d, a: a / 2),
    "switch": (lambda d, a: jax.lax.cond(d[0, 0] > 0, lambda a: a, lambda a: a + 1, a),
               lambda d, a: a if d[0, 0] > 0 else a + 1),
}  # fmt: skip
GROWTH = {"matmul": 4, "sum": 5, "cumsum": 4, "transpose": 4, "einsum": 4, "scan": 3, "vmap": 4,
          "jit": 2, "checkpoint": 4, "plus": 2, "minus": 2, "add": 2, "pad": 2}  # fmt: skip
MOST = 64.0
# Quantizers by name: how jax writes them, from v, a scale and p, and where their neuron starts.
QUANTIZERS = {
    "lsq": nadaptor.lsq,
    "qcfs": lambda v, s, p: nadaptor.qcfs(v, s * p, p),
    "noise_adaptor": lambda v, s, p: nadaptor.noise_adaptor(jax.random.key(p), v, s, p),
    # What stands before the first weights would stay as it is.
    "relu": lambda v, s, p: jax.nn.relu(v @ jnp.eye(FEATURES, dtype=v.dtype)),
}


@st.composite
def graphs(draw, most=7, quantizers=("lsq", "qcfs", "noise_adaptor")):
    """Draws the operations of a network: spikes reach every value but the input."""
    first, sizes = draw(_quantizers(0, quantizers)), [2.0, 2.0]
    operations = [first]
    for _ in range(draw(st.integers(1, most))):
        at = st.integers(1, len(sizes) - 1)
        name = draw(st.sampled_from(["quantizer", *AFFINE, *WRAPPED]))
        a, b = draw(at), draw(st.integers(0, len(sizes) - 1))
        grown = GROWTH.get(name, 1) * max(sizes[a], sizes[b], 1.0)
        if name == "quantizer" or grown > MOST:
            operations.append(draw(_quantizers(a, quantizers)))
            sizes.append(2.0)
            continue
        operands = (a, b) if name in ("plus", "minus", "concatenate", "select") else (a,)
        operations.append(Operation(name, operands, _dyadic(draw, 2)))
        sizes.append(grown)
    return operations


def inputs(draw):
    """Draws the input of a network."""
    return _dyadic(draw, 8, (EXAMPLES, FEATURES))


def _quantizers(at, names):
    scales, levels = st.sampled_from([0.25, 0.5, 1.0]), st.integers(1, 4)
    detail = st.tuples(st.sampled_from(names), scales, levels)
    return detail.map(lambda d: Operation("quantizer", (at,), d))


def _dyadic(draw, most, shape=(FEATURES, FEATURES)):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random.integers(-most, most + 1, shape) / (2.0 if most == 2 else 4.0)


def as_jax(operations):
    """The network as a function of the input; it returns every value that spikes reach."""

    def f(x):
        values = [x]
        for name, operands, detail in operations:
            given = [values[i] for i in operands]
            if name == "quantizer":
                kind, scale, levels = detail
                values.append(QUANTIZERS[kind](*given, scale, levels))
                continue
            constant = jnp.asarray(detail, jnp.float32)
            if name in AFFINE:
                values.append(AFFINE[name](jnp, constant, *given))
            else:
                values.append(WRAPPED[name][0](constant, *given))
        return tuple(values[1:])

    return f


def evaluate(operations, x, activate):
    """The network in numpy, with `activate(i, v, scale, levels)` as its i-th quantizer."""
    values, number = [np.asarray(x, np.float64)], 0
    for name, operands, detail in operations:
        given = [values[i] for i in operands]
        if name == "quantizer":
            _, scale, levels = detail
            values.append(activate(number, given[0], scale, levels))
            number += 1
        elif name in AFFINE:
            values.append(AFFINE[name](np, detail, *given))
        else:
            values.append(WRAPPED[name][1](detail, *given))
    return values[1:]


def quantized(operations, x):
    """What the quantized network computes without noise."""
    return evaluate(operations, x, lambda i, v, s, p: s * np.clip(np.floor(v / s + 0.5), 0, p))


def over_time(operations, x, num_steps, start=None):
    """The spiking network, step by step: mean outputs at every step, spikes of each layer.

    Args:
        operations: the network.
        x: its input at every step.
        num_steps: T.
        start: of each layer, the potential to start from; None for half a threshold.
    """
    number = sum(op.name == "quantizer" for op in operations)
    potentials = list(start) if start else [None] * number
    counts, total, outputs = [0] * number, 0, []

    def fire(i, v, scale, levels):
        begin = potentials[i] if potentials[i] is not None else levels / 2
        u = begin + v / scale
        fired = u >= levels
        potentials[i] = u - levels * fired
        counts[i] = counts[i] + fired.astype(int)
        return scale * levels * fired

    for t in range(1, num_steps + 1):
        values = evaluate(operations, x, fire)
        total = [a + b for a, b in zip(total, values, strict=True)] if t > 1 else values
        outputs.append([v / t for v in total])
    return [np.stack(values) for values in zip(*outputs, strict=True)], counts, potentials


def offset_start(operations, x, num_steps):
    """The potentials that `OffsetSpikes` starts from, one layer after the other.

    Args:
        operations: the network.
        x: its input at every step.
        num_steps: rho.
    """
    levels = [op.detail[2] for op in operations if op.name == "quantizer"]
    starts, fired = [], []
    for layer, threshold in enumerate(levels):
        currents = []
        for t in range(num_steps):

            def replay(i, v, scale, levels, layer=layer, t=t, currents=currents):
                if i < layer:
                    return scale * levels * fired[i][t]
                currents += [v / scale / levels] * (i == layer)
                return np.zeros_like(v)

            evaluate(operations, x, replay)
        start = 0.5 + _shift(currents)
        starts.append(threshold * start)
        fired.append(_spikes(start, currents)[0])
    return starts


def _shift(currents):
    """Of one layer, in units of its threshold."""
    spikes, before, u = _spikes(np.full(currents[0].shape, 0.5), currents)
    lowest = np.where(spikes, before, np.inf).min(0)
    highest = np.where(spikes, -np.inf, before).max(0)
    gain = np.where(np.isinf(highest), 1, np.maximum(1, 1.001 - highest))
    surplus = (u < 0) & spikes.any(0)
    return np.where(surplus, -np.maximum(1, lowest - 0.999), np.where(u >= 1, gain, 0))


def _spikes(u, currents):
    """Of one layer: its spikes and potentials before them at every step, and its potential."""
    spikes, before = [], []
    for current in currents:
        before.append(u + current)
        spikes.append(before[-1] >= 1)
        u = before[-1] - spikes[-1]
    return np.stack(spikes), np.stack(before), u
