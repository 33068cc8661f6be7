"""Which operations may act on spikes: the affine ones, and what to say of the others.

Between two neurons a spiking network adds, scales and moves spikes. An affine operation on each
step's spikes has the time average of the operation on the averages, so the network's rates are
those of the network it came from; after any other operation they would not be.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr

from nadaptor._jaxpr.trace import Op, contains, is_mark, reached, sub_jaxprs


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Affine in all operands together.
_JOINTLY = _words(
    "add sub add_any neg concatenate stack unstack pad reshape squeeze expand_dims transpose "
    "broadcast_in_dim slice split rev reduce_sum cumsum reduce_window_sum convert_element_type "
    "reduce_precision copy copy_p tile name optimization_barrier sharding_constraint device_put "
    "layout_constraint reshard "
    "psum psum_invariant pvary pcast ppermute all_gather all_gather_invariant all_to_all "
    "reduce_scatter stop_gradient fft real imag conj complex"
)
# Affine in any one operand while the others are static.
_PRODUCTS = _words("mul dot_general conv_general_dilated event_convolution fast_convolution")
# Affine in the operands at these positions; the others are indices, predicates or divisors.
_POSITIONS = {
    "div": (0,),
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter-sub": (0, 2),
    "scatter-mul": (0,),
    "triangular_solve": (1,),
}
# Affine in one of the operands at these positions while all others are static.
_EITHER = {
    "ragged_dot_general": (0, 1),
    "bcoo_dot_general": (0, 2),
    "bcsr_dot_general": (0, 3),
}
_RANDOM = _words("random_bits threefry2x32 rng_bit_generator rng_uniform random_gamma")

# What a max-pool is in a trace, and what its forward derivative makes of it.
_NAMES = {"reduce_window_max": "max_pool", "select_and_gather_add": "max_pool"}
_ACTIVATION = "replace it by a quantized activation such as nadaptor.lsq before training"
_LOGITS = (
    "return the logits: only the output after the last neuron may use it, outside the converted "
    "function"
)
_NORM = (
    "a norm that measures its input is not affine: use batch norm with running averages "
    "(use_running_average=True)"
)
INFERENCE = (
    "evaluate batch norm with its running averages (use_running_average=True in Linen, "
    "model.eval() in NNX and torch, inference_mode in Equinox)"
)
_BRANCH = "write the loop or branch in Python, or as lax.scan"
_PROBABILITIES = _words("sigmoid logistic log_sigmoid")
# Effects that may as well happen at every step: they look, and change nothing.
_STEP_EFFECTS = {"DebugEffect", "OrderedDebugEffect"}
# By the library's function, the primitive or the Flax module, whichever is known first.
_REMEDIES = {
    "max_pool": "replace max_pool by avg_pool before training",
    "max": "for a ReLU use a quantized activation such as nadaptor.lsq; for pooling, avg_pool",
    "reduce_max": "replace the maximum by a mean, such as avg_pool, before training",
    "dot_product_attention": "attention weights computed from spikes are not affine in them",
    **dict.fromkeys(
        _words(
            "relu relu6 gelu silu swish elu celu selu leaky_relu sigmoid logistic tanh softplus "
            "mish hard_tanh hard_sigmoid hard_silu hard_swish log_sigmoid erf"
        ),
        _ACTIVATION,
    ),
    **dict.fromkeys(_words("softmax log_softmax logsumexp argmax argmin top_k one_hot"), _LOGITS),
    **dict.fromkeys(
        _words("LayerNorm GroupNorm RMSNorm InstanceNorm BatchNorm standardize var std rsqrt"),
        _NORM,
    ),
    **dict.fromkeys(_words("while while_loop fori_loop cond switch"), _BRANCH),
}
_PRODUCT = (
    "a product of two spiking values is not affine: one factor has to be static (a scale, a "
    "statistic or attention weights computed from spikes cannot be)"
)
_DIVISOR = (
    "a scale that depends on spikes changes at every step: make it a parameter, or use batch norm "
    "with running averages"
)
_NOT_AFFINE = "acts on spikes and is not affine"
_NOT_KNOWN = "acts on spikes and is not known to be affine"
_OPTIONS = "; or let it act on running means, nonaffine='running_mean', or on sums, coding='sum'"
_DEFAULT = "between quantizers only affine operations can act on spikes; replace it or move it out"


def check_affine(op: Op, spiking: Sequence[bool], last: bool = False) -> None:
    """Raises a ValueError unless `op` is affine in the operands for which `spiking` is true.

    Args:
        op: an operation that spikes reach.
        spiking: for each operand, whether spikes reach it.
        last: whether its result is one of the function's.
    """
    name = op.primitive.name
    count = sum(spiking)
    # First of all, as what keeps its body would leave a quantizer in it analog.
    if any(contains(sub, is_mark) for sub in sub_jaxprs(op.params)):
        check_no_inner_mark(op)
    elif op.bodies:
        _check_bodies(op)
    # It looks and passes nothing on; `check_effects` has refused what does more.
    elif op.effects and not op.outputs:
        pass
    elif name in _JOINTLY:
        _check_floating(op)
    elif name in _PRODUCTS:
        if count > 1:
            raise _refusal(op, _PRODUCT)
    elif name == "select_n":
        if spiking[0]:
            raise _refusal(op, "the choice depends on spikes; the predicate has to be static")
    elif name in _POSITIONS:
        if any(spikes and i not in _POSITIONS[name] for i, spikes in enumerate(spiking)):
            raise _refusal(op, _DIVISOR if name == "div" else "its indices depend on spikes")
    elif name in _EITHER:
        if count > 1 or not any(spiking[i] for i in _EITHER[name]):
            raise _refusal(op, _PRODUCT)
    elif name == "custom_linear_solve":
        # The operands before the last ones are the matrix.
        if any(spiking[: sum(op.params["const_lengths"])]):
            raise _refusal(op, _DIVISOR)
    # A sigmoid at the end makes probabilities of logits: to quantize it would be another network.
    elif last and _PROBABILITIES.intersection((name, op.location.call)):
        raise _refusal(op, _LOGITS)
    elif not (_is_sum(op) or (name == "integer_pow" and op.params["y"] == 1)):
        raise _refusal(op, _remedy(op))


def is_affine(op: Op, spiking: Sequence[bool]) -> bool:
    """Says whether `op` is known to be affine in the operands for which `spiking` is true."""
    try:
        check_affine(op, spiking)
    except ValueError:
        return False
    return True


def _check_bodies(op: Op) -> None:
    """Checks what a call that is kept whole does with the spikes that reach it."""
    for body in op.bodies:
        for inner in body.ops:
            spikes = reached(body.spiking, inner.inputs)
            try:
                if any(spikes):
                    check_affine(inner, spikes)
                else:
                    check_not_random(inner)
            except ValueError as error:
                if op.primitive.name == "cond":
                    raise _refusal(op, _BRANCH) from error
                raise


def check_effects(op: Op) -> None:
    """Raises a ValueError for what has an effect that a time step cannot repeat."""
    if op.effects - _STEP_EFFECTS:
        raise _refusal(
            op,
            "only jax.debug.print and jax.debug.callback can run at every time step; take it out "
            "of the function",
            f"has a side effect ({', '.join(sorted(op.effects))})",
        )


def check_no_batch_statistics(op: Op) -> None:
    """Raises a ValueError for the mean of a batch in a library's batch norm.

    Seen is what Flax, Equinox, Haiku and Keras call so, with no `remat` around it. A norm written
    by hand is not: of a function without `in_axes` it is not known which axis holds the examples.
    """
    if op.location.in_batch_norm and op.primitive.name in ("reduce_sum", "psum"):
        raise _refusal(
            op,
            INFERENCE,
            "measures the batch that it is given, so that an output depends on other examples",
        )


def _is_sum(op: Op) -> bool:
    """Says whether it is a sum that JAX did not recognise, as with a traced start value."""
    if op.primitive.name not in ("reduce", "reduce_window"):
        return False
    return [eqn.primitive.name for eqn in op.params["jaxpr"].eqns] == ["add"]


def check_no_inner_mark(op: Op) -> None:
    """Raises a ValueError if a quantizer stands inside an operation that keeps its own body."""
    if any(contains(sub, is_mark) for sub in sub_jaxprs(op.params)):
        raise _refusal(
            op,
            "a quantizer inside it would silently stay analog; move the quantizer out, write the "
            "loop or branch in Python, or apply shard_map and pmap around the simulation instead",
            "holds a quantizer",
        )


def check_apart(op: Op) -> None:
    """Raises a ValueError for a call kept whole: of its operands, it was followed for spikes only.

    Spikes times a frame would be wrong, and inside of such a call would not be seen.
    """
    if op.bodies:
        raise _refusal(
            op,
            "inside one call with a derivative, branch or loop of its own; take one of the two out "
            "of it",
            "takes spikes and an argument that varies over time together",
        )


def check_not_random(op: Op, varies: Sequence[bool] = ()) -> None:
    """Raises a ValueError if the operation draws random bits: one draw would serve all steps.

    Args:
        op: the operation.
        varies: for each operand, whether it is another at every step, as frames of keys are; a draw
            from such a key is another, too. Without, none is.
    """
    if _draws_once(op.primitive.name, op.params, varies):
        raise _refusal(
            op,
            "one draw would be frozen for all time steps; switch dropout off (deterministic=True), "
            "or draw the numbers first and pass them as an argument",
            "draws random numbers outside a quantizer",
        )


def _draws_once(name: str, params: dict[str, Any], varies: Sequence[bool]) -> bool:
    # The key is the first operand.
    if name in _RANDOM and not any(varies[:1]):
        return True
    return any(_body_draws_once(sub, varies) for sub in sub_jaxprs(params))


def _body_draws_once(jaxpr: Jaxpr, varies: Sequence[bool]) -> bool:
    # What a body does not take, as the predicate of a branch, stands before what it takes.
    pairs = zip(reversed(jaxpr.invars), reversed(varies), strict=False)
    varying = {var for var, other in pairs if other}
    for eqn in jaxpr.eqns:
        found = reached(varying, eqn.invars)
        if _draws_once(eqn.primitive.name, eqn.params, found):
            return True
        if any(found):
            varying.update(eqn.outvars)
    return False


def _check_floating(op: Op) -> None:
    # A conversion to integers or booleans rounds.
    for aval in op.avals:
        if not jnp.issubdtype(aval.dtype, jnp.inexact):
            raise _refusal(op, f"it turns spikes into {aval.dtype}; keep them floating point")


def _remedy(op: Op) -> str:
    # Flax calls a module's second layer of a kind BatchNorm_1.
    module = op.location.scope.split("/")[-1].partition("_")[0]
    call = op.location.call
    if call.endswith("_loss") or "cross_entropy" in call:
        return _LOGITS
    # Over an axis it is a pool, and no ReLU, whatever numpy calls it.
    call = "reduce_max" if call == "max" and op.primitive.name == "reduce_max" else call
    names = (call, _NAMES.get(op.primitive.name, op.primitive.name), module)
    return next((_REMEDIES[name] for name in names if name in _REMEDIES), _DEFAULT)


def describe(op: Op) -> str:
    """What an operation is to its user: "softmax (reduce_max)"."""
    name = str(_NAMES.get(op.primitive.name, op.primitive.name))
    return f"{op.location.call} ({name})" if op.location.call not in ("", name) else name


def _refusal(op: Op, remedy: str, fault: str = _NOT_AFFINE) -> ValueError:
    # Running means and sums help what is not affine, and nothing else that is refused.
    others = _OPTIONS if fault == _NOT_AFFINE else ""
    # What stands in none of the tables may be affine all the same: say no more than is known.
    if fault == _NOT_AFFINE and remedy == _DEFAULT:
        fault = _NOT_KNOWN
    shown = describe(op)
    where = f" at {op.location.source}" if op.location.source else ""
    scope = f" in {op.location.scope}" if op.location.scope else ""
    return ValueError(f"cannot convert to spikes: {shown}{where}{scope} {fault}: {remedy}{others}")
