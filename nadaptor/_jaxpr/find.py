"""Where the ReLUs and max-pools of a traced function are, and which of them become quantizers.

A maximum with zero is written in many ways, and most maxima are no activation. It is one where

1. it is of floating point numbers, and one side of it is a constant zero;
2. data reaches it, not the parameters alone: a weight may be clipped at zero;
3. the data has met a product with weights before: an image may be clipped to [0, 1];
4. it does not run elementwise into a root, a logarithm or a divisor: every fast batch norm holds
   `maximum(0, mean(x^2) - mean(x)^2)`;
5. it is no part of another function of a library: `softplus` holds `maximum(x, 0)`.

What would go wrong without a word, the derivative of a ReLU or a ReLU in a branch, is refused.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from nadaptor._jaxpr.flat import (
    ACROSS_TURNS,
    MOVES,
    Flat,
    FlatOp,
    Path,
    words,
)
from nadaptor._jaxpr.found import (
    NO_NEURON,
    NOT_SELECTED,
    PART_OF,
    Found,
    Left,
    Plan,
    QuantizedLayer,
)
from nadaptor._jaxpr.patterns import Relu, find_relu, is_max_pool
from nadaptor._jaxpr.places import layer_name
from nadaptor._jaxpr.trace import Atom, sub_jaxprs, variables

# Through these a maximum still guards the root or divisor behind them (rule 4).
_ELEMENTWISE = MOVES | words(
    "carry turn add sub mul div max min neg abs sign select_n clamp integer_pow square pow "
    "stop_gradient slice dynamic_slice gather concatenate pad split rev"
)
# What counts as a product with weights (rule 3).
_CONTRACTIONS = words("dot_general conv_general_dilated ragged_dot_general")
# Spikes could not pass these either: a maximum that is left before them loses nothing.
_ROOTS = words("sqrt rsqrt cbrt log log1p pow")
_COMPARISONS = words("gt ge lt le eq ne")
# Functions of the libraries that hold a maximum with zero and are no ReLU.
_OTHERS = words(
    "hard_sigmoid hard_silu hard_swish hard_tanh hard_shrink soft_shrink sparse_sigmoid "
    "sparse_plus softplus log_sigmoid logsigmoid gelu silu swish mish elu celu selu leaky_relu "
    "prelu glu squareplus logaddexp logaddexp2 logsumexp softmax log_softmax uniform bernoulli "
    "hinge_loss"
)
# What is worth a line in the report where spikes reach it: no neuron can come of it.
_NONLINEAR = words(
    "max min clamp reduce_max reduce_min tanh logistic erf erfc exp exp2 expm1 sin cos abs sort "
    "top_k argmax reduce_window_max reduce_window cummax cond while"
)


def find(
    closed: ClosedJaxpr,
    data: Sequence[bool],
    select: Callable[[QuantizedLayer], bool] | None = None,
    pools: bool = True,
) -> Found:
    """Finds what becomes a quantizer, and what becomes a mean.

    Args:
        closed: the function.
        data: for each of its inputs, whether it is data rather than parameters.
        select: says of a layer whether to replace it; None for all.
        pools: whether max-pools that spikes reach become means.

    Raises:
        ValueError: the derivative of a ReLU stands beside it, or a ReLU stands in a branch or in a
            loop that is no scan.
    """
    return _Finder(Flat(closed), data, select, pools).find()


class _Finder:
    """Goes once through the operations, with what is known of each variable."""

    def __init__(self, flat: Flat, data: Sequence[bool], select: Any, pools: bool) -> None:
        self.flat, self.select, self.pools = flat, select, pools
        self.reached = flat.forward(v for v, d in zip(flat.inputs, data, strict=True) if d)
        products = [op for op in flat.ops if op.name in _CONTRACTIONS and self._data(op)]
        self.met = flat.forward(v for op in products for v in op.outputs)
        self.guards = flat.backward(_divisors(flat.ops), lambda op: op.name in _ELEMENTWISE)
        # Those that `select` rejects are counted, too: a name does not depend on it.
        self.uses: collections.Counter[str] = collections.Counter()
        self.neurons: list[FlatOp] = []
        self.covered: dict[Path, FlatOp] = {}
        self.plans: dict[Path, Plan] = {}
        self.left: list[tuple[FlatOp, Left]] = []

    def find(self) -> Found:
        """Returns the plans and what is left."""
        pooled, others = [], []
        for op in self.flat.ops:
            if op.eqn is None or op.path in self.covered or self.flat.live.isdisjoint(op.outputs):
                continue
            if (relu := find_relu(self.flat, op)) is not None:
                self._add(op, relu)
            elif self.pools and is_max_pool(op.eqn) and self._data(op):
                pooled.append(op)
            else:
                # A loop over parameters alone may clip them.
                if self._data(op):
                    _check_no_relu_inside(op, self.pools)
                others.append(op)
        # Only now that all ReLUs are known: a carry may bring spikes to a pool before them.
        spikes, unselected = self._behind(self.covered.values()), self._behind(self.neurons)
        for op in pooled:
            read = variables(op.inputs)
            self._add_pool(op, not spikes.isdisjoint(read), not unselected.isdisjoint(read))
        left = [entry for op, entry in self.left if op.path not in self.covered]
        # Of a function without a ReLU, what its data meet behind weights instead.
        touched = spikes if unselected else self.met
        left += [self._other(op) for op in others if self._is_nonlinear(op, touched)]
        # A function of a library is several operations, and one entry.
        return Found(dict(sorted(self.plans.items())), tuple(dict.fromkeys(left)))

    def _behind(self, ops: Iterable[FlatOp]) -> set[int]:
        made = [v for op in ops for v in op.outputs]
        return self.flat.forward(made) if made else set()

    def _data(self, op: FlatOp) -> bool:
        return not self.reached.isdisjoint(variables(op.inputs))

    def _add(self, op: FlatOp, relu: Relu) -> None:
        kind = "relu" if relu.bound is None else "bounded_relu"
        layer = self._layer(op, kind)._replace(bound=relu.bound)
        operand = relu.operand(op)
        if why := self._why_not(op, operand):
            self.left.append((op, Left(*layer[:4], why)))
            return
        self.uses[_scope(op) or layer.name] += 1
        self.neurons.append(op)
        if self._rejects(op, layer):
            return
        self.covered.update((part.path, part) for part, _ in relu.parts)
        # Parts pass their operand on, so that the quantizer takes in what the ReLU took in.
        plans = {part.path: Plan(None, i) for part, i in relu.parts}
        plans[op.path] = Plan(layer, operand)
        self.plans.update(self._whole_call(op, relu, plans[op.path]) or plans)
        self._check_no_derivative(op, op.inputs[operand])
        self._check_no_loss(op, layer)

    def _add_pool(self, op: FlatOp, spikes: bool, unselected: bool) -> None:
        """Adds a pool that spikes reach, or would reach if all layers were selected."""
        layer = self._layer(op, "max_pool")
        self.uses[_pool_scope(op)] += unselected
        if not spikes:
            self.left.append((op, Left(*layer[:4], "it stands before the first neuron")))
        elif not self._rejects(op, layer):
            self.plans[op.path] = Plan(layer, 0)

    def _rejects(self, op: FlatOp, layer: QuantizedLayer) -> bool:
        """Asks `select`, and notes what it rejects."""
        rejected = self.select is not None and not self.select(layer)
        if rejected:
            self.left.append((op, Left(*layer[:4], NOT_SELECTED)))
        return rejected

    def _layer(self, op: FlatOp, kind: str) -> QuantizedLayer:
        """The entry of an operation, named as `spiking` names its layers."""
        # Among the neurons alone, as `spiking` counts: pools are added after them.
        own = _pool_scope(op) if kind == "max_pool" else _scope(op)
        name = own or f"layer{len(self.neurons)}"
        name = f"{name}:{self.uses[name] + 1}" if self.uses[name] else name
        shape = op.eqn.outvars[0].aval.shape
        return QuantizedLayer(name, kind, shape, op.location.source, turns=op.turns)

    def _why_not(self, op: FlatOp, operand: int) -> str:
        """Why a ReLU is left, whatever is selected; "" where it may be replaced."""
        v = op.inputs[operand]
        if not jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.floating):
            return "it is of integers; convert the data to floating point before"
        if isinstance(v, Literal) or v not in self.reached:
            return "no data reaches it"
        if v not in self.met:
            return "it stands before the first product with weights"
        if not self.guards.isdisjoint(op.outputs):
            return "it guards a root, a logarithm or a divisor"
        for call in (op.location.call, *op.calls):
            # Optax's losses end so.
            if call in _OTHERS or call.endswith("_loss"):
                return f"{PART_OF}{call}"
        return ""

    def _whole_call(self, op: FlatOp, relu: Relu, plan: Plan) -> dict[Path, Plan]:
        """Where a call with a derivative of its own is nothing but the ReLU, the plan for it."""
        ends = {v for part, _ in relu.parts for v in part.outputs}
        begins = [part.inputs[i] for part, i in relu.parts]
        begins = set(variables(begins)) - ends
        # The outermost first: a call that is replaced whole has no derivative left to lose.
        for path in (op.path[:i] for i in range(len(op.path))):
            call = self.flat.calls.get(path)
            if call is None or len(call.outputs) != 1 or ends.isdisjoint(variables(call.outputs)):
                continue
            for i, v in enumerate(call.inputs):
                if not isinstance(v, Literal) and v in begins:
                    return {path: plan._replace(operand=i)}
        return {}

    def _check_no_derivative(self, op: FlatOp, v: Atom) -> None:
        """Refuses a function that holds the slope of a ReLU: it would stay that of the ReLU."""
        for test in self._later(v, ACROSS_TURNS):
            if test.name not in _COMPARISONS or test.path in self.covered:
                continue
            # A comparison alone is no slope: a count of active features has one, too.
            for reader in self._later(test.outputs[0], ACROSS_TURNS | words("and or not")):
                chooses = reader.name == "select_n" or reader.name in ("mul", "div")
                if chooses and reader.path not in self.covered and not self._is_relu(reader):
                    raise ValueError(
                        f"cannot quantize: beside the ReLU at {op.location.source} stands its "
                        "derivative, which would stay that of the ReLU; quantize the network's "
                        "function and differentiate the result: jax.grad(nadaptor.quantize(f))"
                    )

    def _is_relu(self, op: FlatOp) -> bool:
        return find_relu(self.flat, op) is not None

    def _later(self, v: Atom, through: frozenset[str]) -> list[FlatOp]:
        """The operations that read v or a copy of it."""
        found, stack, seen = [], [v], set()
        while stack:
            for reader in self.flat.readers(stack.pop()):
                if reader.name not in through:
                    found.append(reader)
                elif reader.outputs[0] not in seen:
                    seen.add(reader.outputs[0])
                    stack.append(reader.outputs[0])
        return found

    def _check_no_loss(self, op: FlatOp, layer: QuantizedLayer) -> None:
        """Refuses a maximum of which nothing but a scalar comes: a hinge or triplet loss."""
        # Where no result is a scalar, none is a loss.
        if not layer.shape or all(aval.shape for aval in self.flat.out_avals):
            return
        after = self.flat.forward(op.outputs)
        avals = zip(self.flat.outputs, self.flat.out_avals, strict=True)
        scalar = all(
            not aval.shape for v, aval in avals if not isinstance(v, Literal) and v in after
        )
        # With weights behind it a maximum is a layer, whatever its network's results become.
        products = (o for o in self.flat.ops if o.name in _CONTRACTIONS)
        if scalar and all(after.isdisjoint(variables(o.inputs)) for o in products):
            raise ValueError(
                f"cannot quantize: of the maximum at {op.location.source} nothing but a scalar "
                "comes, with no weights between, as in a hinge loss; leave the loss outside: "
                "loss(nadaptor.quantize(f)(scales, ...)), or keep it by select"
            )

    def _is_nonlinear(self, op: FlatOp, spikes: set[int]) -> bool:
        touched = not spikes.isdisjoint(variables(op.inputs))
        chooses = op.name == "select_n" and not isinstance(op.inputs[0], Literal)
        nonlinear = op.name in _NONLINEAR or (chooses and op.inputs[0] in spikes)
        return touched and nonlinear and self.guards.isdisjoint(op.outputs)

    def _other(self, op: FlatOp) -> Left:
        kind = op.location.call or op.name
        shape = op.eqn.outvars[0].aval.shape
        return Left(_scope(op), kind, shape, op.location.source, NO_NEURON)


def _divisors(ops: Sequence[FlatOp]) -> list[int]:
    """The operands of roots and logarithms, and the divisors."""
    found: list[Atom] = []
    for op in ops:
        if op.name in _ROOTS or (op.name == "integer_pow" and op.eqn.params["y"] < 0):
            found.append(op.inputs[0])
        elif op.name in ("div", "rem"):
            found.append(op.inputs[1])
    return variables(found)


def _check_no_relu_inside(op: FlatOp, pools: bool) -> None:
    """Refuses an operation with a body of its own, a branch or a loop, that holds a ReLU."""
    if any(_holds_relu(body, pools) for body in _bodies(op.eqn)):
        raise ValueError(
            f"cannot quantize: {op.name} at {op.location.source} holds a ReLU or a max-pool; write "
            "the branch or loop in Python, or as lax.scan, and apply shard_map and pmap around "
            "the quantized function"
        )


def _holds_relu(jaxpr: Any, pools: bool) -> bool:
    flat = Flat(ClosedJaxpr(jaxpr, [None] * len(jaxpr.constvars)))
    finder = _Finder(flat, [True] * len(flat.inputs), None, pools)
    # What enters the body may be data, and may have met weights, outside of it.
    finder.met = finder.reached
    for op in flat.ops:
        if op.eqn is None:
            continue
        relu = find_relu(flat, op)
        if relu is not None:
            if not finder._why_not(op, relu.operand(op)):
                return True
        elif (pools and is_max_pool(op.eqn)) or any(
            _holds_relu(body, pools) for body in _bodies(op.eqn)
        ):
            return True
    return False


def _bodies(eqn: Any) -> list[Any]:
    """The jaxprs in an equation that the flat view does not enter, but those of quantizers.

    Bodies of scalars alone, as of a reduction or a sort, hold no layer.
    """
    if eqn.primitive.name.startswith("custom_") or eqn.primitive.name in ("jit", "pjit"):
        return []
    return [
        sub
        for sub in sub_jaxprs(eqn.params)
        if any(getattr(var.aval, "shape", ()) for inner in sub.eqns for var in inner.outvars)
    ]


def _scope(op: FlatOp) -> str:
    return layer_name(op.location.scope)


def _pool_scope(op: FlatOp) -> str:
    return "/".join(filter(None, (_scope(op), "max_pool")))
