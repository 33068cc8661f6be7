"""The shapes and dtypes that the public core writes down as types are those of its calls."""

import inspect
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nadaptor
from nadaptor import neurons, quantizers

NAMES = {n: getattr(jaxtyping, n) for n in ("Array", "Float", "Float32", "Key", "Shaped")}
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
FLOATS = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])


def checked(function, *args, **kwargs):
    """Calls a function, and compares what goes in and out with its annotations."""
    signature, module = inspect.signature(function), inspect.getmodule(function)
    bound = signature.bind(*args, **kwargs).arguments
    out = function(*args, **kwargs)
    with jaxtyping.jaxtyped("context"):
        for name, value in {**bound, "return": out}.items():
            text = signature.parameters[name].annotation if name in bound else None
            expect(
                value, eval(text or signature.return_annotation, {**NAMES, **vars(module)}), name
            )
    return out


def expect(value, kind, name):
    if typing.get_origin(kind) is tuple and ... not in typing.get_args(kind):
        for part, of_part in zip(value, typing.get_args(kind), strict=True):
            expect(part, of_part, name)
    elif isinstance(value, tuple) and hasattr(kind, "_fields"):
        for field, text in kind.__annotations__.items():
            text = getattr(text, "__forward_arg__", text)
            expect(getattr(value, field), eval(text, {**NAMES, **vars(neurons)}), field)
    else:
        kinds = typing.get_args(kind) or (kind,)
        if any("jaxtyping" in str(type(one)) for one in kinds):
            fits = any(isinstance(value, one) for one in kinds)
            assert fits, f"{name}: {jax.typeof(value)} is no {kind}"


def test_what_does_not_fit_is_found():
    def wrong(v):
        return v.sum()

    wrong.__annotations__ = dict.fromkeys(("v", "return"), 'Float[Array, "*shape"]')

    assert checked(wrong, jnp.zeros(())).shape == ()
    with pytest.raises(AssertionError, match=r"return: float32\[\] is no"):
        checked(wrong, jnp.zeros(3))
    with pytest.raises(AssertionError, match=r"v: int32\[3\] is no"):
        checked(wrong, jnp.zeros(3, int))


@given(SHAPES, FLOATS, st.booleans())
def test_quantizers(shape, dtype, per_channel):
    v = jnp.linspace(-1, 3, 27)[: len(jnp.zeros(shape).ravel())].reshape(shape).astype(dtype)
    scale = jnp.full(shape[-1:], 0.5) if per_channel else 0.5
    checked(nadaptor.lsq, v, scale, 2)
    checked(nadaptor.noise_adaptor, jax.random.key(0), v, scale, 2)
    checked(nadaptor.clipped_relu, v, scale)
    checked(nadaptor.qcfs, v, scale, 2)
    checked(nadaptor.slip_relu, v, scale, 2)
    checked(quantizers.round_half_up, v)
    if v.size:
        checked(quantizers.mmse_scale, v, 2, tuple(range(v.ndim)))


@pytest.mark.parametrize("kind", [neurons.IntegrateAndFire, neurons.SignedIntegrateAndFire])
@given(SHAPES)
def test_neurons_of_rates(kind, shape):
    state = checked(kind().init, shape, 2, 1.0)
    state, out = checked(kind().step, state, jnp.ones(shape), 2)
    checked(kind().step, state, out, 2)


@given(SHAPES, FLOATS)
def test_neuron_of_sums_and_surrogates(shape, dtype):
    state = checked(neurons.StBif().init, shape, 2, 1.0)
    checked(neurons.StBif().step, state, jnp.ones(shape), 2)
    checked(neurons.fire, jnp.ones(shape, dtype), 2, neurons.triangle)
    checked(neurons.triangle, jnp.ones(shape, dtype))
    checked(neurons.rectangle, jnp.ones(shape, dtype))
