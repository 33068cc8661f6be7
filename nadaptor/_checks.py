"""Argument checks of the public functions: each raises a ValueError with the value and the remedy.

Values are checked only where they are concrete: a traced array has a shape and a dtype, no value.
"""

import contextlib
import difflib
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nadaptor.errors import MissingPackageError


def check_levels(levels: int) -> int:
    """Returns `levels` as an int; it must be a positive integer (and not a bool)."""
    try:
        value = operator.index(levels)
    except TypeError:
        value = 0
    if isinstance(levels, bool) or value < 1:
        raise ValueError(f"levels must be a positive int such as 2, not {levels!r}")
    return value


def check_count(count: int, name: str) -> int:
    """Returns a step count as an int; it must be at least 1."""
    try:
        value = operator.index(count)
    except TypeError:
        value = 0
    if isinstance(count, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, not {count!r}")
    return value


def check_floating(v: ArrayLike, name: str) -> jax.Array:
    """Returns `v` as an array; it must be floating point."""
    dtype = jnp.result_type(v)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating point, not {dtype}; "
            f"convert it first: {name}.astype('float32')"
        )
    return jnp.asarray(v)


def check_key(key: jax.Array) -> jax.Array:
    """Returns `key`; it must be one typed PRNG key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key must be a typed PRNG key from jax.random.key(seed), not {_brief(key)}; "
            "a legacy uint32 key converts with jax.random.wrap_key_data(key)"
        )
    if key.shape:
        raise ValueError(
            f"key must be a single key, not an array of keys of shape {key.shape}; use jax.vmap"
        )
    return key


def check_scale(scale: ArrayLike, shape: tuple[int, ...], name: str) -> jax.Array:
    """Returns `scale` as a floating point array; it must broadcast to `shape`."""
    scale = jnp.asarray(scale)
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        scale = scale.astype(jnp.float32)
    try:
        # Broadcast the other way, it would change the activation's shape.
        fits = jnp.broadcast_shapes(scale.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of shape {scale.shape} does not broadcast to the activation's shape {shape}; "
            "pass a scalar, or one value a channel shaped to line up with the channel axis"
        )
    return scale


# Beyond them, 1 / scale in float32 is infinity or 0, as it is divided by here.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-126, 2.0**126


def check_positive(scale: ArrayLike, name: str) -> ArrayLike:
    """Returns `scale`; where it is concrete, every value must be finite and positive.

    To be called before it becomes an array, which under `jax.jit` is a tracer.
    """
    if not isinstance(scale, jax.core.Tracer):
        values = np.asarray(scale, np.float64)
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if wrong.size:
            raise ValueError(
                f"{name} must be finite and positive, not {wrong.flat[0]:.6g}; start it from data "
                "and keep it positive in training by projecting to a small floor after each update"
            )
        beyond = values[(values < _SMALLEST_SCALE) | (values > _LARGEST_SCALE)]
        if beyond.size:
            raise ValueError(
                f"{name} must be from {_SMALLEST_SCALE:.2g} to {_LARGEST_SCALE:.2g}, not "
                f"{beyond.flat[0]:.3g}: one over it is no normal float32"
            )
    return scale


def _brief(value: object) -> str:
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    return f"{dtype}{list(shape)}" if shape is not None else repr(value)


def check_name(name: str, known: Mapping[str, Any], what: str) -> str:
    """Returns `name`, a key of `known`.

    Raises:
        ValueError: it is not; the message suggests the nearest, or lists all.

    Example:
        >>> check_name("digit_na", {"digits_na": 1, "digits_relu": 2}, "config")
        Traceback (most recent call last):
        ValueError: unknown config 'digit_na'; did you mean 'digits_na'?
        >>> check_name("resnet56", {"resnet50": 1, "cifar_resnet56": 2}, "model")
        Traceback (most recent call last):
        ValueError: unknown model 'resnet56'; did you mean 'cifar_resnet56'?
    """
    if name in known:
        return name
    # A part of a name, as "resnet56" of "cifar_resnet56", is nearer than what looks like it.
    within = [k for k in known if name in k] if name else []
    close = difflib.get_close_matches(name, within or known, n=1, cutoff=0.0 if within else 0.6)
    remedy = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known))}"
    raise ValueError(f"unknown {what} {name!r}; {remedy}")


def check_data_argnum(data_argnum: int, args: Sequence[Any]) -> int:
    """Returns the position, from 0, of the argument that is the data.

    Args:
        data_argnum: its number, from the end where it is negative.
        args: the arguments of the function.

    Raises:
        ValueError: there is no such argument.

    Example:
        >>> check_data_argnum(-1, ("weights", "images"))
        1
    """
    if not -len(args) <= data_argnum < len(args):
        raise ValueError(f"data_argnum={data_argnum}, but there are {len(args)} arguments")
    return data_argnum % len(args)


def check_scales(scales: Any, layers: Sequence[Any]) -> dict[str, jax.Array]:
    """Returns the scale of each layer; they must be of just these layers.

    Args:
        scales: a mapping by layer name, or one number for all layers.
        layers: with `name`, `source` and `turns`, the lengths of the scans around the layer.
    """
    if not isinstance(scales, Mapping):
        scale = jnp.asarray(check_positive(scales, "the scale of all layers"), jnp.float32)
        return {layer.name: jnp.broadcast_to(scale, layer.turns) for layer in layers}
    missing = [layer for layer in layers if layer.name not in scales]
    extra = sorted(set(scales) - {layer.name for layer in layers})
    if missing or extra:
        lacking = ", ".join(f"{layer.name!r} ({layer.source})" for layer in missing[:4])
        raise ValueError(
            f"the scales are of another network: there is no scale for {lacking or 'no layer'}, "
            f"and no layer for {', '.join(map(repr, extra[:4])) or 'no scale'}; measure them by "
            "init on this function, and keep by select a layer that only one mode of f has"
        )
    return {layer.name: _check_layer_scale(layer, scales[layer.name]) for layer in layers}


def _check_layer_scale(layer: Any, scale: Any) -> jax.Array:
    scale = jnp.asarray(check_positive(scale, f"the scale of {layer.name} ({layer.source})"))
    if scale.shape[: len(layer.turns)] != layer.turns:
        raise ValueError(
            f"the scale of {layer.name} ({layer.source}) has the shape {scale.shape}, but the "
            f"layer stands in a scan of length {layer.turns} and has a scale for each turn; "
            "measure the scales by init with a scan of this length"
        )
    return scale


def check_local(path: object, what: str) -> None:
    """Checks that a path is of this machine's file system, and no address such as gs://bucket.

    Raises:
        ValueError: it is an address; all that is written there would be lost.

    Example:
        >>> check_local("runs/mine", "--workdir")
    """
    # Path("gs://bucket") is gs:/bucket.
    scheme = re.match(r"([A-Za-z][\w+.-]+):/+(?=[^/])", str(path))
    if scheme:
        address = f"{scheme[1]}://{str(path)[scheme.end() :]}"
        raise ValueError(
            f"{what} must be a local folder, not {address}; mount the bucket, as gcsfuse does, or "
            "use local disk and copy"
        )


@contextlib.contextmanager
def extra(name: str, user: str) -> Iterator[None]:
    """Names the extra that has the package, where an import inside finds none.

    Args:
        name: the extra.
        user: what imports, for the message.

    Raises:
        MissingPackageError: a package that is not of the project is missing.

    Example:
        >>> with extra("train", "models"):
        ...     import no_such
        Traceback (most recent call last):
        nadaptor.errors.MissingPackageError: models needs no_such: pip install "nadaptor[train]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        # A module of our own that is missing is a fault here, which no extra mends.
        if package in ("", "nadaptor"):
            raise
        message = f'{user} needs {package}: pip install "nadaptor[{name}]"'
        raise MissingPackageError(message, name=package) from error
