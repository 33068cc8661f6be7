"""Where the operations of a traced function come from, in the words of an error message."""

import jax
import jax.numpy as jnp
import pytest

import nadaptor
from nadaptor._jaxpr.trace import trace

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def q(v):
    return nadaptor.lsq(v, 0.5, 2)


def message(f, *args):
    with pytest.raises(ValueError, match="cannot convert to spikes") as error:
        nadaptor.spiking(f, *args)
    return str(error.value)


def line(f, offset):
    return f"{__file__}:{f.__code__.co_firstlineno + offset} "


def test_library_function_is_named_at_the_call_that_acts_on_spikes():
    """Its trace is reused, and the traceback within it is that of the first call."""

    def f(x):
        x = jax.nn.relu(x)
        x = q(x)
        return jax.nn.relu(x)

    assert f"relu (max) at {line(f, 3)}" in message(f, X)


def test_own_function_is_named_by_the_line_inside_it():
    @jax.jit
    def helper(x):
        return x * x

    def f(x):
        return helper(q(helper(x)))

    assert f"mul at {line(helper.__wrapped__, 2)}" in message(f, X)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap])
def test_line_is_found_through_calls(wrap):
    def f(x):
        x = q(x)
        return jnp.sort(x)

    assert f"sort at {line(f, 2)}" in message(wrap(f), X)


def test_line_is_found_in_the_body_of_a_scan():
    def body(x, _):
        x = q(x)
        return jnp.tanh(x), None

    text = message(lambda x: jax.lax.scan(body, x, None, length=2)[0], X)
    assert f"tanh at {line(body, 2)}" in text


def test_outermost_library_call_and_scope_are_named():
    def f(x):
        with jax.named_scope("head"):
            return jax.nn.standardize(q(x))

    text = message(jax.vmap(f), X)
    assert f"standardize (square) at {line(f, 2)}in head acts on spikes" in text


def test_line_typed_at_a_prompt_is_named():
    code = compile("f = lambda x: abs(q(x))", "<stdin>", "exec")
    names = {"q": q}
    exec(code, names)
    assert "abs at <stdin>:1 acts" in message(names["f"], X)


def test_operations_that_no_output_needs_are_dropped_and_spikes_are_followed():
    def f(x, unused):
        y = q(2 * x)
        jnp.sort(y), unused + 1
        return y + x

    traced = trace(jax.make_jaxpr(f)(X, X))
    names = [op.primitive.name for op in traced.ops if op.mark is None]
    assert "sort" not in names
    assert names.count("add") == 1
    spiking = [op.primitive.name for op in traced.ops if set(op.outputs) & traced.spiking]
    assert spiking == ["jit", "mul", "add"]
