import jax
import jax.numpy as jnp

from nadaptor._execution import once


def test_it_is_jit():
    traced = []

    def power(x, n):
        traced.append(n)
        return x**n

    run = once.jit_once(power, static_argnums=1)
    assert [float(run(jnp.float32(3), n)) for n in (2, 3, 3)] == [9, 27, 27]
    assert traced == [2, 3]
    assert run.__name__ == "power"


def test_it_can_be_part_of_another_program():
    run = once.jit_once(jnp.square)
    assert jax.eval_shape(run, jnp.zeros(3)).shape == (3,)
    assert float(jax.jit(jax.grad(run))(3.0)) == 6


def test_on_a_cpu_it_is_compiled_for_a_fast_compilation_and_elsewhere_as_ever(monkeypatch):
    asked = []
    monkeypatch.setattr(
        once.jax, "jit", lambda f, compiler_options=None: asked.append(compiler_options) or f
    )
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(once.jax, "default_backend", lambda platform=platform: platform)
        once.jit_once(abs)(-1)
    assert asked == [
        {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
        None,
    ]


def test_few_images_are_computed_by_a_program_that_compiles_fast_and_many_by_one_that_runs_fast(
    monkeypatch,
):
    chosen = []
    monkeypatch.setattr(once, "jit_once", lambda f, **_: lambda *a: chosen.append("once") or f(*a))
    monkeypatch.setattr(once.jax, "jit", lambda f, **_: lambda *a: chosen.append("jit") or f(*a))
    run = once.jit_by_size(1, lambda weights, images: weights)
    for size in (1, 2**12 - 1, 2**12):
        run(0, jnp.zeros(size))
    assert chosen == ["once", "once", "jit"]
