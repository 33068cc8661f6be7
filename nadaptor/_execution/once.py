"""Programs that run once: compiled for a fast compilation, and not for a fast run.

On a CPU LLVM vectorizes and unrolls the loops of a program, which takes up to three quarters of
its compilation: worth it for a training step, and not for the first values of a network's weights.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer

# Elements of images: with fewer, tens of time steps take less than their compilation.
_SMALL = 2**12
P = ParamSpec("P")
R = TypeVar("R")

# By platform; GPUs and TPUs compile as ever.
_QUICK: dict[str, dict[str, Any]] = {
    "cpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
}


def jit_once(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """Is `jax.jit` for a function of little work that is called once or twice with the same shapes.

    Args:
        function: to be compiled.
        **options: as for `jax.jit`, such as `static_argnums`.

    Returns:
        The function as a program; its sums are rounded as those of any other program.

    Example:
        >>> float(jit_once(jax.numpy.square)(3.0))
        9.0
    """

    # The platform is asked for at the call: at import nothing may start it.
    @functools.cache
    def program(platform: str) -> Any:
        return jax.jit(function, compiler_options=_QUICK.get(platform), **options)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Part of another program, it is compiled with that one: jit takes no options there.
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return function(*args, **kwargs)
        return program(jax.default_backend())(*args, **kwargs)

    return call


def jit_by_size(images: int, function: Callable[..., R], **options: Any) -> Callable[..., R]:
    """Is `jit_once` where a call has few images, and `jax.jit` where it has many.

    Args:
        images: the place of the images among the arguments.
        function: to be compiled.
        **options: as for `jax.jit`.

    Example:
        >>> float(jit_by_size(0, jax.numpy.sum)(jax.numpy.ones(3)))
        3.0
    """
    quick, thorough = jit_once(function, **options), jax.jit(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        return (quick if np.size(args[images]) < _SMALL else thorough)(*args, **kwargs)

    return call
