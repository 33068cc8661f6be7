"""Where on a mesh of devices an array lies: a carry of a scan has to begin where it ends."""

from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def shard_like(x: jax.Array, like: Any) -> jax.Array:
    """Gives `x` the sharding that `like` has, an array's type or shape."""
    # On other meshes the compiler places arrays. What has not the shape of its layer, as the start
    # of `StBif`, lies whole on every device.
    sharding = like.sharding
    if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
        x = jax.sharding.reshard(x, sharding) if x.shape == like.shape else x
    return _vary(x, like.manual_axis_type)


def explicit_axes(x: Any, axis: int | None = None) -> tuple[str, ...]:
    """The axes of an explicit mesh on which an array lies, or which cut one of its axes."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return ()
    if axis is None:
        return tuple(sharding.mesh.axis_names)
    # A spec may be shorter than its array: the axes beyond it are not cut.
    names = sharding.spec[axis] if -len(sharding.spec) <= axis < len(sharding.spec) else None
    return names if isinstance(names, tuple) else () if names is None else (names,)


def gather(x: jax.Array) -> jax.Array:
    """Gives each device of an explicit mesh the whole array, as what sorts it needs."""
    cut = any(explicit_axes(x, axis) for axis in range(x.ndim))
    return jax.sharding.reshard(x, PartitionSpec()) if cut else x


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Gives `x` the axes of a `shard_map` along which the array `like` varies."""
    return _vary(x, jax.typeof(like).manual_axis_type)


def _vary(x: jax.Array, manual: Any) -> jax.Array:
    axes = () if manual is None else manual.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
