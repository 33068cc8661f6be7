"""Where on a mesh of devices an array lies: a carry of a scan has to begin where it ends."""

from typing import Any

import jax
from jax.sharding import AxisType


def shard_like(x: jax.Array, like: Any) -> jax.Array:
    """Gives `x` the sharding that `like` has, an array's type or shape."""
    sharding, manual = like.sharding, like.manual_axis_type
    if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
        x = jax.sharding.reshard(x, sharding) if x.shape == like.shape else x
    axes = () if manual is None else manual.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
